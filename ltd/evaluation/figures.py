"""Numbers of one set of clips, with what a reader must know of each: the same wherever rows are made of them.

A set is measured the same way whether it holds samples, reconstructions or the real clips of a floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.distribution import DISTRIBUTION_METRICS, distribution_values
from ltd.evaluation.motion import MotionStatistics, WarpingError
from ltd.evaluation.scores import ClipScore

#: Metrics of optical flow, which read no network.
MOTION_METRICS = ("warping_error", "motion")
_MOTION_FIGURES = {"motion": ("motion_magnitude", "motion_dynamic_degree", "motion_flicker")}
#: Frames of each clip, evenly spread, that a network of images sees of it.
FRAMES_SHOWN = 2


@dataclass(frozen=True)
class Figure:
    """One number of a set of clips."""

    name: str
    value: float
    n: int  #: Clips, or pairs of a frame and a caption.
    unit: str = ""
    how: str = ""  #: How it was computed, behind the preprocessing of the network.
    note: str = ""


def figure_names(metric: str) -> tuple[str, ...]:
    """List the names of the figures that a metric gives.

    Args:
        metric: One of ``DISTRIBUTION_METRICS`` or ``MOTION_METRICS``, or ``clip_score``.

    Returns:
        The names.
    """
    if metric in DISTRIBUTION_METRICS:
        return DISTRIBUTION_METRICS[metric].figures
    return _MOTION_FIGURES.get(metric, (metric,))


def distribution_figures(
    metric: str,
    samples: FeatureBank,
    reference: FeatureBank,
    *,
    seed: int = 0,
    moved: Callable[[], None] = lambda: None,
) -> dict[str, Figure]:
    """Compute a metric of a set against real clips.

    Args:
        metric: One of ``DISTRIBUTION_METRICS``.
        samples: Features of the set, of the output that the metric reads.
        reference: Features of real clips, of the same width and number.
        seed: Seed of subsets and splits.
        moved: Called between the steps of a long computation.

    Returns:
        Figures by name.

    Raises:
        ValueError: If the sets do not fit each other or the metric.
    """
    n, dim, what = samples.num_samples, samples.dim, DISTRIBUTION_METRICS[metric]
    values = distribution_values(metric, samples, reference, seed=seed, moved=moved)
    return {name: Figure(name, value, n, how=what.how(n), note=what.caution(n, dim)) for name, value in values.items()}


def caption_figures(frames: Tensor, texts: Tensor) -> dict[str, Figure]:
    """Compute the CLIP score of a set: each frame is a pair with its clip's caption.

    Args:
        frames: ``(n, k, dim)`` embeddings of ``k`` frames of each clip.
        texts: ``(n, dim)`` embeddings of the captions.

    Returns:
        One figure by name.

    Raises:
        ValueError: If there is no clip, or an embedding is zero or not finite.
    """
    score = ClipScore()
    score.update(frames.flatten(0, 1), texts[:, None].expand_as(frames).flatten(0, 1))
    found = Figure("clip_score", score.value, score.num_pairs, how="100 times the mean cosine", note="more is better")
    return {found.name: found}


def motion_figures(vectors: Mapping[str, Tensor]) -> dict[str, Figure]:
    """Compute how a set moves and flickers.

    Args:
        vectors: By metric: ``warping_error`` the ``(n, 3)`` of ``warping_errors``, ``motion`` those of
            ``motion_statistics``.

    Returns:
        Figures by name: one of the warping error, three of motion.

    Raises:
        ValueError: If there is no clip, or no pixel of any can be followed.
    """
    found = []
    if "warping_error" in vectors:
        error = WarpingError()
        error.count(vectors["warping_error"])
        value = error.value
        note = (
            f"{error.num_followed} of {error.num_clips} clips and {error.visible_share:.0%} of pixels can be followed"
        )
        found.append(Figure("warping_error", value, error.num_clips, "squared, of [0, 1]", note=note))
    if "motion" in vectors:
        motion = MotionStatistics()
        motion.count(vectors["motion"])
        note = "should come near the floor, not below"
        found += [
            Figure("motion_magnitude", motion.magnitude, motion.num_clips, "pixels per frame", note=note),
            Figure("motion_dynamic_degree", motion.dynamic_degree, motion.num_clips, "share", note=note),
            Figure("motion_flicker", motion.flicker, motion.num_clips, "of [0, 1]", note=note),
        ]
    return {figure.name: figure for figure in found}
