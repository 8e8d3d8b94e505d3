"""Metrics of sets of samples by name: which output of a network each reads, and the numbers it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.frechet import FrechetDistance
from ltd.evaluation.kernel import kernel_distance
from ltd.evaluation.manifold import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS, manifold_metrics
from ltd.evaluation.scores import inception_score

Moved: TypeAlias = Callable[[], None]

_SUBSETS, _LARGEST_SUBSET = 100, 1000
_SPLITS, _FULL_SPLIT = 10, 500


@dataclass(frozen=True)
class DistributionMetric:
    """One metric of a set of samples against a set of real ones."""

    #: Which output of the network it reads: ``features``, ``logits`` or ``spatial``.
    output: str
    #: Names of the numbers that it gives.
    figures: tuple[str, ...]
    #: Numbers by name, of the samples' bank and the reference's, a seed, and what to call every few seconds.
    values: Callable[[FeatureBank, FeatureBank, int, Moved], dict[str, float]]
    #: Samples of each set that it needs, at least.
    least: int
    #: How it was computed, of n samples.
    how: Callable[[int], str]
    #: What a reader must know of n samples of features of a width; None where the width is not known yet.
    caution: Callable[[int, int | None], str]


def _frechet(name: str) -> Callable[[FeatureBank, FeatureBank, int, Moved], dict[str, float]]:
    def values(samples: FeatureBank, reference: FeatureBank, seed: int, moved: Moved) -> dict[str, float]:
        del seed
        moments = reference.moments()
        moved()
        distance = FrechetDistance(moments)
        moved()
        moments = samples.moments()
        moved()
        return {name: distance.to(moments).value}

    return values


def _subset_size(n: int) -> int:
    """Choose the size of KID's subsets: 1000, or half of fewer samples, so that the subsets differ."""
    return max(2, min(_LARGEST_SUBSET, n // 2))


def _kernel(samples: FeatureBank, reference: FeatureBank, seed: int, moved: Moved) -> dict[str, float]:
    size = _subset_size(min(samples.num_samples, reference.num_samples))
    found = kernel_distance(samples, reference, subset_size=size, num_subsets=_SUBSETS, seed=seed, moved=moved)
    return {"kid": found.value, "kid_std": found.std}


def _num_splits(n: int) -> int:
    """Choose the number of splits: 10, or one where a split would hold fewer than 500 samples."""
    return _SPLITS if n >= _SPLITS * _FULL_SPLIT else 1


def _inception(samples: FeatureBank, reference: FeatureBank, seed: int, moved: Moved) -> dict[str, float]:
    del reference, moved
    found = inception_score(samples, num_splits=_num_splits(samples.num_samples), seed=seed)
    return {"inception_score": found.value, "inception_score_std": found.std}


def _precision(samples: FeatureBank, reference: FeatureBank, seed: int, moved: Moved) -> dict[str, float]:
    del seed
    found = manifold_metrics(samples, reference, neighbours=PRECISION_NEIGHBOURS, moved=moved)
    return {"precision": found.precision, "recall": found.recall}


def _density(samples: FeatureBank, reference: FeatureBank, seed: int, moved: Moved) -> dict[str, float]:
    del seed
    found = manifold_metrics(samples, reference, neighbours=DENSITY_NEIGHBOURS, moved=moved)
    return {"density": found.density, "coverage": found.coverage}


def _frechet_caution(n: int, dim: int | None) -> str:
    if dim is not None and n > dim:
        return ""
    width = "" if dim is None else f" of {dim} dimensions"
    return f"{n} samples{width}: biased upwards, compare at equal n only"


def _equal_n(n: int, dim: int | None) -> str:
    del n, dim
    return "depends on n: compare at equal n only"


def _plain(n: int) -> str:
    del n
    return ""


DISTRIBUTION_METRICS: dict[str, DistributionMetric] = {
    **{
        name: DistributionMetric(output, (name,), _frechet(name), 2, _plain, _frechet_caution)
        for name, output in (("fid", "features"), ("sfid", "spatial"), ("fvd", "features"))
    },
    "kid": DistributionMetric(
        "features",
        ("kid", "kid_std"),
        _kernel,
        4,
        lambda n: f"{_SUBSETS} subsets of {_subset_size(n)}",
        lambda n, dim: "" if n > _LARGEST_SUBSET else f"{n} samples: unbiased, but of wide spread (kid_std)",
    ),
    "inception_score": DistributionMetric(
        "logits",
        ("inception_score", "inception_score_std"),
        _inception,
        2,
        lambda n: f"{_num_splits(n)} splits",
        lambda n, dim: "" if _num_splits(n) == _SPLITS else f"{n} samples in one split: biased downwards",
    ),
    "precision_recall": DistributionMetric(
        "features",
        ("precision", "recall"),
        _precision,
        PRECISION_NEIGHBOURS + 1,
        lambda n: f"k = {PRECISION_NEIGHBOURS}",
        _equal_n,
    ),
    "density_coverage": DistributionMetric(
        "features",
        ("density", "coverage"),
        _density,
        DENSITY_NEIGHBOURS + 1,
        lambda n: f"k = {DENSITY_NEIGHBOURS}",
        _equal_n,
    ),
}


def distribution_values(
    name: str, samples: FeatureBank, reference: FeatureBank, *, seed: int = 0, moved: Moved = lambda: None
) -> dict[str, float]:
    """Compute a metric of samples against real ones.

    Args:
        name: One of ``DISTRIBUTION_METRICS``.
        samples: Features of samples, of the output that the metric reads.
        reference: Features of real ones, of the same width and number.
        seed: Seed of subsets and splits.
        moved: Called between the steps of a long computation.

    Returns:
        Numbers by name.

    Raises:
        ValueError: If the name is unknown, the sets differ in width or number, or there are too few samples.
    """
    if name not in DISTRIBUTION_METRICS:
        raise ValueError(f"metric {name!r} is unknown, needed one of {', '.join(DISTRIBUTION_METRICS)}")
    metric, n = DISTRIBUTION_METRICS[name], samples.num_samples
    if samples.dim != reference.dim:
        raise ValueError(f"{name}: features of width {samples.dim} against a reference of width {reference.dim}")
    if n != reference.num_samples:
        raise ValueError(
            f"{name}: {n} samples against {reference.num_samples} of the reference: it compares at equal n only"
        )
    check_count(name, n, samples.dim)
    return metric.values(samples, reference, seed, moved)


def check_count(name: str, n: int, dim: int) -> None:
    """Check that there are samples enough for a metric.

    Args:
        name: One of ``DISTRIBUTION_METRICS``.
        n: Samples of each set.
        dim: Width of their features.

    Raises:
        ValueError: If there are too few; it says what bias to expect of few.
    """
    metric = DISTRIBUTION_METRICS[name]
    if n < metric.least:
        raise ValueError(f"{name}: got {n} samples, needed {metric.least} or more; {metric.caution(n, dim)}")
