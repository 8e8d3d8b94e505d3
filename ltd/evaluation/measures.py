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
from ltd.evaluation.distribution import DISTRIBUTION_METRICS, check_count, distribution_values
from ltd.evaluation.motion import MotionStatistics, WarpingError
from ltd.evaluation.protocol import REPEATS, ClipFeatures, Clips, Reference
from ltd.evaluation.rows import MetricRow
from ltd.evaluation.scores import ClipScore

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
        check_count(name, len(samples) * features.num_vectors(samples.pixels), features.dim)
    rows = []
    for name in metrics:
        metric = DISTRIBUTION_METRICS[name]
        pool = features.vectors(reference.pool.pixels, metric.output)
        mine = _bank(features.vectors(samples.pixels, metric.output))
        found: dict[str, list[float]] = {}
        floors: dict[str, list[float]] = {}
        for repeat in range(REPEATS):
            held, drawn = disjoint_draws(len(pool), len(samples), seed=seed, repeat=repeat)
            against = _bank(pool[held])
            for kept, bank in ((found, mine), (floors, _bank(pool[drawn]))):
                for key, value in distribution_values(name, bank, against, seed=seed).items():
                    kept.setdefault(key, []).append(value)
        how = metric.how(mine.num_samples)
        said = "; ".join(filter(None, (note, metric.caution(mine.num_samples, mine.dim))))
        rows += [
            MetricRow(
                part="samples",
                name=key + suffix,
                value=_mean(values),
                unit="",
                network=features.name,
                preprocessing="; ".join(filter(None, (features.preprocessing, how))),
                n=mine.num_samples,
                floor=_mean(floors[key]),
                note=said,
            )
            for key, values in found.items()
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
    values = []
    for clips in (samples, real):
        score = ClipScore()
        frames = features.vectors(clips.pixels)  # (n, k, dim)
        texts = embed_captions(clips.captions)[:, None].expand_as(frames)
        score.update(frames.flatten(0, 1), texts.flatten(0, 1))
        values.append(score)
    return [
        MetricRow(
            part="samples",
            name="clip_score" + suffix,
            value=values[0].value,
            unit="",
            network=features.name,
            preprocessing=f"{features.preprocessing}; 100 times the mean cosine",
            n=values[0].num_pairs,
            floor=values[1].value,
            note="floor: real clips with their own captions; more is better",
        )
    ]


def motion_rows(
    samples: Clips, reference: Reference, flow: FlowMap, metrics: Sequence[str] = ("warping_error", "motion")
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
    (error, motion), (real_error, real_motion) = (_move(clips.pixels, flow) for clips in (samples, real))
    rows = []
    if "warping_error" in metrics:
        note = (
            f"{error.num_followed} of {error.num_clips} samples and {error.visible_share:.0%} of pixels can be "
            "followed; floor: real clips"
        )
        rows.append(("warping_error", error.value, real_error.value, "squared, of [0, 1]", note))
    if "motion" in metrics:
        for name, unit in (("magnitude", "pixels per frame"), ("dynamic_degree", "share"), ("flicker", "of [0, 1]")):
            note = "floor: real clips; samples should come near it, not below"
            rows.append((f"motion_{name}", getattr(motion, name), getattr(real_motion, name), unit, note))
    return [
        MetricRow(
            part="samples",
            name=name,
            value=value,
            unit=unit,
            network=flow.name,
            preprocessing=flow.preprocessing,
            n=motion.num_clips,
            floor=floor,
            note=note,
        )
        for name, value, floor, unit, note in rows
    ]


def _move(pixels: Tensor, flow: FlowMap) -> tuple[WarpingError, MotionStatistics]:
    error, motion = WarpingError(), MotionStatistics()
    for part in pixels.split(_FLOW_BATCH):
        forward, backward = flow(part)
        error.update(part, forward, backward)
        motion.update(part, forward)
    return error, motion


def _bank(vectors: Tensor) -> FeatureBank:
    """Keep ``(n, k, dim)`` as ``n * k`` samples."""
    return FeatureBank(vectors.shape[-1]).update(vectors.flatten(0, 1))


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())


def _check_sizes(samples: Clips, reference: Reference) -> None:
    if samples.pixels.shape[1:] != reference.pool.pixels.shape[1:]:
        mine, real = (tuple(clips.pixels.shape[1:]) for clips in (samples, reference.pool))
        raise ValueError(f"samples are {mine} and real clips {real} (t, h, w, c): they compare at equal size only")
