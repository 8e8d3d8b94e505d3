"""How much of the samples lies on the real data's manifold, and how much of that they cover, by nearest neighbours.

A set's manifold is the union of balls around its points that reach to their k-th nearest neighbour in the set. All four
numbers depend on the number of points: few points have large balls. Compare at equal n, beside real data.

Reference: Kynkaanniemi et al. (2019), arXiv 1904.06991, Eq. 1-3; Naeem et al. (2020), arXiv 2002.09797, Eq. 4-5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ltd.evaluation.banks import FeatureBank

#: Neighbours in the papers: 3 for precision and recall, 5 for density and coverage.
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5

_VALUES_PER_BLOCK = 2**24
#: Squared distances below this share of the squared lengths are rounding: copies are at distance zero.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class ManifoldResult:
    """Four shares and what they were computed from."""

    precision: float  #: Samples inside the real manifold, 0 to 1.
    recall: float  #: Real points inside the samples' manifold, 0 to 1.
    density: float  #: Real balls that a sample lies in, on average, over k; about 1 for equal distributions, unbounded.
    coverage: float  #: Real points whose ball holds a sample, 0 to 1.
    neighbours: int
    num_reference: int
    num_samples: int


def manifold_metrics(
    samples: FeatureBank, reference: FeatureBank, *, neighbours: int, moved: Callable[[], None] = lambda: None
) -> ManifoldResult:
    """Compute precision, recall, density and coverage. Balls are closed, which matters for exact ties only.

    Args:
        samples: Features of samples.
        reference: Features of real data, of the same width.
        neighbours: ``k``, 1 or more.
        moved: Called at each block of pairs.

    Returns:
        The four numbers.

    Raises:
        ValueError: If the widths differ, or a set has no more than ``neighbours`` points.
    """
    if samples.dim != reference.dim:
        raise ValueError(f"features of width {samples.dim} against a reference of width {reference.dim}")
    n, m = samples.num_samples, reference.num_samples
    if neighbours < 1 or min(n, m) <= neighbours:
        raise ValueError(
            f"precision, recall, density and coverage with k = {neighbours} neighbours: got {n} samples and {m} of the "
            f"reference, needed {max(neighbours, 1) + 1} of each or more, and k of 1 or more; few points have large "
            "balls, so that the numbers compare at equal n only"
        )
    centre = reference.features.mean(dim=0)  # less rounding than far from zero
    x, y = samples.features - centre, reference.features - centre
    radii_x, radii_y = _radii(x, neighbours, moved), _radii(y, neighbours, moved)
    num_precise = num_balls = num_recalled = num_covered = 0
    for rows, distances in _blocks(y, x, moved):  # (block, n) squared, of real points from samples
        inside_real = distances <= radii_y[rows, None]
        num_balls += int(inside_real.sum())
        num_covered += int(inside_real.any(dim=1).sum())
        num_recalled += int((distances <= radii_x[None]).any(dim=1).sum())
    for _, distances in _blocks(x, y, moved):  # (block, m), of samples from real points
        num_precise += int((distances <= radii_y[None]).any(dim=1).sum())
    return ManifoldResult(
        precision=num_precise / n,
        recall=num_recalled / m,
        density=num_balls / (neighbours * n),
        coverage=num_covered / m,
        neighbours=neighbours,
        num_reference=m,
        num_samples=n,
    )


def _radii(points: Tensor, neighbours: int, moved: Callable[[], None]) -> Tensor:
    """Compute the squared distance ``(n,)`` of each point to its k-th nearest other point."""
    blocks = _blocks(points, points, moved)
    return torch.cat([d.kthvalue(neighbours + 1, dim=1).values for _, d in blocks])  # the nearest is itself


def _blocks(a: Tensor, b: Tensor, moved: Callable[[], None]) -> Iterator[tuple[slice, Tensor]]:
    """Compute squared distances of all pairs, some rows of ``a`` at a time: the rows and ``(rows, m)``."""
    lengths_a, lengths_b = a.square().sum(dim=1), b.square().sum(dim=1)
    step = max(1, _VALUES_PER_BLOCK // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        moved()
        lengths = lengths_a[rows, None] + lengths_b[None]
        squares = lengths - 2 * a[rows] @ b.T
        yield rows, squares.where(squares > _ROUNDING * lengths, squares.new_zeros(()))
