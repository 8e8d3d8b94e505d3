"""Parts of a learned codebook: the nearest code, gradients through the choice, and vectors that may become codes.

Knows no model and no process: what must be joined over processes goes through callables. Vectors are rows ``(n, d)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltd.rng import generator

#: Distances that are held at once by ``nearest_codes``: 64 MiB in fp32.
MAX_DISTANCES = 2**24
#: Below this length of ``e_hat + q_hat`` (their angle is within 0.06 degrees of 180) fp32 has no plane to rotate in.
MIN_BISECTOR = 1e-3
#: Below this length of a vector or a code their directions mean nothing.
MIN_NORM = 1e-6
#: Spread of repeated codes around the vector they repeat, in standard deviations of the vectors.
JITTER = 0.01


@torch.no_grad()
def nearest_codes(vectors: Tensor, codes: Tensor, max_distances: int = MAX_DISTANCES) -> Tensor:
    """Find the code with the least Euclidean distance to each vector.

    Args:
        vectors: ``(n, d)`` fp32.
        codes: ``(k, d)`` fp32.
        max_distances: Numbers held at once; the vectors are taken in parts of this many over ``k``.

    Returns:
        ``(n,)`` int64 rows of ``codes``.
    """
    # |v - c|^2 without |v|^2, around the codes' mean: an offset that all share would cost the digits that differ.
    center = codes.mean(0)
    codes = codes - center
    half_squares = 0.5 * codes.square().sum(1)
    rows = max(1, max_distances // len(codes))
    parts = [torch.addmm(half_squares, part - center, codes.T, alpha=-1).argmin(1) for part in vectors.split(rows)]
    return torch.cat(parts)


def straight_through(vectors: Tensor, codes: Tensor) -> Tensor:
    """Give the codes, bit for bit, with the gradient of the vectors: the identity.

    Args:
        vectors: Any shape.
        codes: Of the same shape, what each vector becomes.

    Returns:
        Of the same shape.

    Reference: van den Oord et al. (2017), arXiv 1711.00937, Sec. 3.2.
    """
    return codes.detach() + (vectors - vectors.detach())


def rotate_through(vectors: Tensor, codes: Tensor) -> Tensor:
    """Give the codes, bit for bit, with the gradient of the rotation and scaling that turns each vector into its code.

    The gradient at a vector has the angle to it that the gradient at the code has to the code, and ``|q| / |e|`` times
    its length. Where no such rotation is defined (the two are opposite, or one has no length) it is passed straight
    through.

    Args:
        vectors: ``(n, d)`` fp32, ``e``.
        codes: ``(n, d)`` fp32, ``q``.

    Returns:
        ``(n, d)``.

    Reference: Fifty et al. (2024), arXiv 2410.06424, Sec. 4 (the rotation trick).
    """
    e, q = vectors.detach(), codes.detach()
    e_norm, q_norm = e.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
    e_hat, q_hat = e / e_norm.clamp_min(MIN_NORM), q / q_norm.clamp_min(MIN_NORM)
    r = e_hat + q_hat
    r_norm = r.norm(dim=1, keepdim=True)
    r = r / r_norm.clamp_min(MIN_BISECTOR)
    # R e with R = I - 2 r r^T + 2 q_hat e_hat^T, never formed
    turned = vectors - 2 * r * (vectors * r).sum(1, keepdim=True) + 2 * q_hat * (vectors * e_hat).sum(1, keepdim=True)
    turned = turned * (q_norm / e_norm.clamp_min(MIN_NORM))
    defined = (r_norm > MIN_BISECTOR) & (e_norm > MIN_NORM) & (q_norm > MIN_NORM)
    return straight_through(torch.where(defined, turned, vectors), codes)


@dataclass(frozen=True)
class Candidates:
    """Vectors of a batch that may become codes, in the order of their turn.

    The turn is decided by numbers that belong to the sample, never to a process or to the order of computation: a
    random priority, and between equal ones the draw index and the position inside the sample.
    """

    #: ``(n, 3)`` float64: priority (the least comes first), draw index, position.
    keys: Tensor
    #: ``(n, d)`` fp32.
    vectors: Tensor

    @classmethod
    def of(cls, vectors: Tensor, priority: Tensor, draws: Tensor) -> Candidates:
        """Make candidates of the positions of whole samples.

        Args:
            vectors: ``(b * p, d)``, sample by sample.
            priority: ``(b, p)`` random numbers.
            draws: ``(b,)`` draw index of each sample.

        Returns:
            All of them, in no order.
        """
        b, p = priority.shape
        draw = draws.to(priority.device).double().reshape(b, 1).expand(b, p)
        position = torch.arange(p, dtype=torch.float64, device=priority.device).expand(b, p)
        keys = torch.stack([priority.double(), draw, position], dim=-1).reshape(b * p, 3)
        return cls(keys.to(vectors.device), vectors)

    def first(self, count: int) -> Candidates:
        """Sort, and keep at most ``count`` of them."""
        order = torch.arange(len(self.keys), device=self.keys.device)
        for column in (2, 1, 0):  # stable: the last one decides first
            order = order[self.keys[order, column].argsort(stable=True)]
        order = order[:count]
        return Candidates(self.keys[order], self.vectors[order])

    def merge(self, other: Candidates) -> Candidates:
        """Join two sets, in no order."""
        return Candidates(torch.cat([self.keys, other.keys]), torch.cat([self.vectors, other.vectors]))

    def gathered(self, count: int, gather_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Take the first ``count`` vectors over all processes; called by all of them with the same count.

        Args:
            count: Number of vectors wanted.
            gather_rows: Concatenates rows over processes; every process gives ``count`` rows.

        Returns:
            ``(m, d)`` in the order of their turn; ``m < count`` if there are no more.
        """
        mine = self.first(count)
        missing = count - len(mine.keys)
        # Without a turn: they only make all processes give equally many rows.
        keys = torch.cat([mine.keys, mine.keys.new_full((missing, 3), torch.inf)])
        vectors = torch.cat([mine.vectors, mine.vectors.new_zeros(missing, mine.vectors.shape[1])])
        found = Candidates(gather_rows(keys), gather_rows(vectors)).first(count)
        return found.vectors[found.keys[:, 0].isfinite()]


def repeat_with_jitter(vectors: Tensor, count: int) -> Tensor:
    """Make ``count`` codes of fewer vectors: all of them, then again and again with a little noise.

    Args:
        vectors: ``(m, d)``, ``m >= 1``.
        count: Number of codes, at least ``m``.

    Returns:
        ``(count, d)``; the first ``m`` are the vectors, the others lie ``JITTER`` standard deviations off one of them.
        The noise is the same in every run and on every process.
    """
    m, d = vectors.shape
    noise = torch.randn(count - m, d, generator=generator(0, "codebook", "jitter")).to(vectors)
    again = vectors[torch.arange(m, count, device=vectors.device) % m]
    return torch.cat([vectors, again + JITTER * vectors.std(0, correction=0) * noise])
