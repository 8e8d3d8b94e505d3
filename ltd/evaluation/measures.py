"""Metrics asked for by name, as rows: of sets of samples, of samples and captions, of motion; each beside its floor.

The floor is the same number of real clips, as many as there are samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.controls import disjoint_draws
from ltd.evaluation.distribution import DISTRIBUTION_METRICS, check_count
from ltd.evaluation.figures import MOTION_METRICS, Figure, caption_figures, distribution_figures, motion_figures
from ltd.evaluation.motion import motion_statistics, warping_errors
from ltd.evaluation.protocol import REPEATS, ClipFeatures, Clips, Reference
from ltd.evaluation.rows import MetricRow

#: Clips whose flow is computed at once.
_FLOW_BATCH = 4


class FlowMap(Protocol):
    """Flow between the frames of clips, and where it comes from."""

    name: str
    preprocessing: str

    def __call__(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Map uint8 ``(b, t, h, w, 3)`` to forward and backward flow ``(b, t - 1, h, w, 2)``."""
        ...


def outputs_of(metrics: Sequence[str]) -> list[str]:
    """Tell which outputs of a network metrics read."""
    return list(dict.fromkeys(DISTRIBUTION_METRICS[name].output for name in metrics))


def distribution_rows(
    samples: Clips,
    reference: Reference,
    features: ClipFeatures,
    metrics: Sequence[str],
    *,
    suffix: str = "",
    seed: int = 0,
    note: str = "",
) -> list[MetricRow]:
    """Measure samples as a set against real clips, beside real clips against real clips at equal n.

    The pool is split at random into the reference and the real clips of the floor, ``n = len(samples)`` each; values
    are means over three splits.

    Args:
        samples: Generated clips.
        reference: Real clips of the same size; the pool has ``2 n`` or more.
        features: Feature map with the outputs that the metrics read (``outputs_of``).
        metrics: Names in ``DISTRIBUTION_METRICS``.
        suffix: Ends each row's name.
        seed: Seed of splits and subsets.
        note: What a reader must know of the network.

    Returns:
        One or two rows for each metric.

    Raises:
        ValueError: If there are too few samples for a metric, or clips and samples differ in size.
    """
    _check_sizes(samples, reference)
    for name in metrics:
        check_count(name, len(samples) * features.num_vectors(samples.pixels.shape[1]), features.dim)
    rows = []
    for name in metrics:
        output = DISTRIBUTION_METRICS[name].output
        pool = features.vectors(reference.pool.pixels, output)
        mine = _bank(features.vectors(samples.pixels, output))
        found: dict[str, list[Figure]] = {}
        floors: dict[str, list[Figure]] = {}
        for repeat in range(REPEATS):
            held, drawn = disjoint_draws(len(pool), len(samples), seed=seed, repeat=repeat)
            against = _bank(pool[held])
            for kept, bank in ((found, mine), (floors, _bank(pool[drawn]))):
                for key, figure in distribution_figures(name, bank, against, seed=seed).items():
                    kept.setdefault(key, []).append(figure)
        rows += [
            MetricRow(
                part="samples",
                name=key + suffix,
                value=_mean([figure.value for figure in figures]),
                unit="",
                network=features.name,
                preprocessing="; ".join(filter(None, (features.preprocessing, figures[0].how))),
                n=figures[0].n,
                floor=_mean([figure.value for figure in floors[key]]),
                note="; ".join(filter(None, (note, figures[0].note))),
            )
            for key, figures in found.items()
        ]
    return rows


def caption_rows(
    samples: Clips,
    reference: Reference,
    features: ClipFeatures,
    embed_captions: Callable[[Sequence[str]], Tensor],
    *,
    suffix: str = "",
) -> list[MetricRow]:
    """Measure the CLIP score of samples, beside that of real clips with their own captions.

    Args:
        samples: Generated clips.
        reference: Real clips with captions.
        features: Feature map in the space of the captions; each frame shown is a pair with the clip's caption.
        embed_captions: Captions to ``(n, dim)``.
        suffix: Ends the row's name.

    Returns:
        One row.
    """
    real = reference.matched or reference.pool.take(range(len(samples)))
    (found,), (floor,) = (
        caption_figures(features.vectors(clips.pixels), embed_captions(clips.captions)).values()
        for clips in (samples, real)
    )
    return [
        MetricRow(
            part="samples",
            name=found.name + suffix,
            value=found.value,
            unit=found.unit,
            network=features.name,
            preprocessing=f"{features.preprocessing}; {found.how}",
            n=found.n,
            floor=floor.value,
            note=f"floor: real clips with their own captions; {found.note}",
        )
    ]


def motion_vectors(clips: Tensor, flow: FlowMap, metrics: Sequence[str]) -> dict[str, Tensor]:
    """Compute what metrics of motion read of each clip.

    Args:
        clips: uint8 ``(n, t, h, w, 3)``, 2 frames or more.
        flow: Optical flow.
        metrics: ``warping_error``, ``motion`` or both.

    Returns:
        ``(n, 3)`` float64 by metric: ``warping_errors`` and ``motion_statistics``.
    """
    found: dict[str, list[Tensor]] = {metric: [] for metric in metrics}
    for part in clips.split(_FLOW_BATCH):
        forward, backward = flow(part)
        if "warping_error" in found:
            found["warping_error"].append(warping_errors(part, forward, backward))
        if "motion" in found:
            found["motion"].append(motion_statistics(part, forward))
    return {metric: torch.cat(parts) for metric, parts in found.items()}


def motion_rows(
    samples: Clips, reference: Reference, flow: FlowMap, metrics: Sequence[str] = MOTION_METRICS
) -> list[MetricRow]:
    """Measure how samples move and flicker, beside as many real clips.

    Args:
        samples: Generated clips of 2 frames or more.
        reference: Real clips of the same size.
        flow: Optical flow.
        metrics: ``warping_error``, ``motion`` or both.

    Returns:
        One row for the warping error, three for motion.

    Raises:
        ValueError: If clips and samples differ in size.
    """
    _check_sizes(samples, reference)
    real = reference.matched or reference.pool.take(range(len(samples)))
    found, floors = (motion_figures(motion_vectors(clips.pixels, flow, metrics)) for clips in (samples, real))
    return [
        MetricRow(
            part="samples",
            name=name,
            value=figure.value,
            unit=figure.unit,
            network=flow.name,
            preprocessing=flow.preprocessing,
            n=figure.n,
            floor=floors[name].value,
            note=f"{figure.note}; floor: real clips",
        )
        for name, figure in found.items()
    ]


def _bank(vectors: Tensor) -> FeatureBank:
    """Keep ``(n, k, dim)`` as ``n * k`` samples."""
    return FeatureBank(vectors.shape[-1]).update(vectors.flatten(0, 1))


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())


def _check_sizes(samples: Clips, reference: Reference) -> None:
    if samples.pixels.shape[1:] != reference.pool.pixels.shape[1:]:
        mine, real = (tuple(clips.pixels.shape[1:]) for clips in (samples, reference.pool))
        raise ValueError(f"samples are {mine} and real clips {real} (t, h, w, c): they compare at equal size only")
