"""Kernel distance (KID): the squared maximum mean discrepancy of two sets of features under a cubic kernel.

The estimate is unbiased, so that it may come out below zero; its spread over random subsets stands beside it. It can be
compared at different numbers of samples, unlike a Frechet distance, but its spread grows as they get fewer.

Reference: Binkowski et al. (2018), arXiv 1801.01401, Eq. 4 and Sec. 4; Gretton et al. (2012), Eq. 3 (the estimate).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltd.evaluation.banks import FeatureBank
from ltd.rng import generator


@dataclass(frozen=True)
class KernelResult:
    """A kernel distance and what it was computed from."""

    value: float  #: Mean over the subsets.
    std: float  #: Deviation over the subsets (of the population, as in every published table).
    num_reference: int
    num_samples: int
    subset_size: int
    num_subsets: int


def squared_mmd(samples: Tensor, reference: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy without bias, with the kernel ``(x . y / dim + 1)^3``.

    Args:
        samples: ``(n, dim)``, n of 2 or more.
        reference: ``(m, dim)``, m of 2 or more.

    Returns:
        The estimate, which may be below zero.

    Raises:
        ValueError: If the widths differ or a set has fewer than 2.
    """
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"features of width {samples.shape[1]} against a reference of width {reference.shape[1]}")
    n, m = len(samples), len(reference)
    if min(n, m) < 2:
        raise ValueError(f"an unbiased kernel distance needs 2 samples of each set or more, got {n} and {m}")
    x, y = samples.double(), reference.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def others(a: Tensor) -> Tensor:  # mean over pairs of two different rows
        matrix = kernel(a, a)
        return (matrix.sum() - matrix.trace()) / (len(a) * (len(a) - 1))

    return float(others(x) + others(y) - 2 * kernel(x, y).mean())


def kernel_distance(
    samples: FeatureBank,
    reference: FeatureBank,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int = 0,
    moved: Callable[[], None] = lambda: None,
) -> KernelResult:
    """Compute the mean and spread of the estimate over random subsets, drawn from each set without replacement.

    Args:
        samples: Features of samples.
        reference: Features of real data, of the same width.
        subset_size: Samples of each set in a subset, 2 or more.
        num_subsets: Subsets.
        seed: Seed of the draws; the same samples give the same numbers, in whatever order they were counted if they
            have keys.
        moved: Called after each subset.

    Returns:
        The distance.

    Raises:
        ValueError: If a set is smaller than a subset.
    """
    if subset_size < 2 or num_subsets < 1:
        raise ValueError(f"KID needs subsets of 2 or more and 1 subset or more, got {subset_size} and {num_subsets}")
    if min(samples.num_samples, reference.num_samples) < subset_size:
        raise ValueError(
            f"KID: got {samples.num_samples} samples and {reference.num_samples} of the reference, needed "
            f"{subset_size} of each; a smaller subset_size keeps the mean unbiased and widens its spread"
        )
    x, y = samples.features, reference.features
    values = []
    for subset in range(num_subsets):
        of_x = torch.randperm(len(x), generator=generator(seed, "kid samples", subset))[:subset_size]
        of_y = torch.randperm(len(y), generator=generator(seed, "kid reference", subset))[:subset_size]
        values.append(squared_mmd(x[of_x], y[of_y]))
        moved()
    found = torch.tensor(values, dtype=torch.float64)
    return KernelResult(float(found.mean()), float(found.std(correction=0)), len(y), len(x), subset_size, num_subsets)
