"""Frechet distance between Gaussians fitted to two sets of features, in float64.

With fewer samples than feature dimensions the covariances lack rank and the distance is biased upwards, the more the
fewer samples: such distances compare only at equal numbers of samples, beside the distance of real data from itself.

Reference: Dowson and Landau (1982), doi 10.1016/0047-259X(82)90077-X; Heusel et al. (2017), 1706.08500, Eq. 6.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def check_features(features: Tensor, dim: int, *, keys: Sequence[int] | None = None, first: int = 0) -> None:
    """Check features before they are counted.

    Args:
        features: ``(n, dim)``.
        dim: Width they should have.
        keys: Number of each sample among all samples; None numbers them from ``first``.
        first: Number of the first one.

    Raises:
        ValueError: If the width is wrong, there are not as many keys, or a value is not finite, naming the samples.
    """
    if features.dim() != 2 or features.shape[1] != dim:
        raise ValueError(f"features: got {tuple(features.shape)}, needed (n, {dim})")
    if keys is not None and len(keys) != len(features):
        raise ValueError(f"{len(keys)} keys for {len(features)} samples")
    bad = (~torch.isfinite(features).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        named = [str(first + row if keys is None else keys[row]) for row in bad]
        listed = ", ".join(named[:8]) + (", ..." if len(named) > 8 else "")
        raise ValueError(f"features: {len(bad)} of {len(features)} rows hold NaN or infinity, of samples {listed}")


class FeatureMoments:
    """Mean and covariance of features, accumulated in float64.

    Reference: Chan, Golub and LeVeque (1983), doi 10.1080/00031305.1983.10483115, for the update.

    Args:
        dim: Width of the features.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.num_samples = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of outer products of deviations

    def update(self, features: Tensor, keys: Sequence[int] | None = None) -> FeatureMoments:
        """Count features.

        Args:
            features: ``(n, dim)``.
            keys: Number of each sample among all samples, for messages; None numbers them in order of arrival.

        Returns:
            Itself.

        Raises:
            ValueError: If the width is wrong or a value is not finite; the message names the samples.
        """
        check_features(features, self.dim, keys=keys, first=self.num_samples)
        if len(features):
            x = features.detach().cpu().double()
            mean = x.mean(dim=0)
            self.merge({"num_samples": len(x), "mean": mean, "scatter": (x - mean).T @ (x - mean)})
        return self

    @property
    def mean(self) -> Tensor:
        """Mean ``(dim,)``."""
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance ``(dim, dim)``."""
        if self.num_samples < 2:
            raise ValueError(f"a covariance needs 2 samples or more, got {self.num_samples}")
        return self._scatter / (self.num_samples - 1)

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: a number and two tensors."""
        return {"num_samples": self.num_samples, "mean": self._mean.clone(), "scatter": self._scatter.clone()}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has counted.

        Args:
            state: Result of ``state``.

        Raises:
            ValueError: If the widths differ.
        """
        if len(state["mean"]) != self.dim:
            raise ValueError(f"moments of width {len(state['mean'])} do not merge into width {self.dim}")
        n, m = self.num_samples, state["num_samples"]
        if n + m == 0:
            return
        delta = state["mean"] - self._mean
        self._mean = self._mean + delta * (m / (n + m))
        self._scatter = self._scatter + state["scatter"] + torch.outer(delta, delta) * (n * m / (n + m))
        self.num_samples = n + m


@dataclass(frozen=True)
class FrechetResult:
    """A Frechet distance and what it was computed from."""

    value: float
    num_reference: int
    num_samples: int
    dim: int

    @property
    def rank_deficient(self) -> bool:
        """Whether there were too few samples for covariances of full rank, so that only equal n compare."""
        return min(self.num_reference, self.num_samples) <= self.dim


class FrechetDistance:
    """Distances of sets of features from one reference set, whose eigenvectors are computed once.

    Args:
        reference: Moments of the reference features, 2 samples or more.

    Raises:
        ValueError: If there are fewer than 2 samples.
        ArithmeticError: If the eigenvectors do not give the covariance back.
    """

    def __init__(self, reference: FeatureMoments) -> None:
        self.reference = reference
        self._covariance = reference.covariance
        values, vectors = torch.linalg.eigh(self._covariance)
        scale = float(self._covariance.norm())
        residual = float(((vectors * values) @ vectors.T - self._covariance).norm())
        if residual > 1e-10 * scale or float(values.min()) < -1e-10 * scale:
            raise ArithmeticError(f"the covariance's eigendecomposition is off: residual {residual:.2e} of {scale:.2e}")
        # n samples give a rank of n - 1 at most; the other eigenvalues are rounding, whose roots would not be small.
        rank = min(reference.dim, reference.num_samples - 1)
        self._root = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()  # (dim, rank), root @ root.T = covariance

    def to(self, samples: FeatureMoments) -> FrechetResult:
        """Compute the squared 2-Wasserstein distance between the two fitted Gaussians.

        Args:
            samples: Moments of the other set, 2 samples or more.

        Returns:
            The distance, not negative. A warning is logged, once for the same numbers, when a set is too small for its
        width.

        Raises:
            ValueError: If the widths differ or there are fewer than 2 samples.
            ArithmeticError: If the matrix under the root is not positive, or the distance comes out negative.
        """
        if samples.dim != self.reference.dim:
            raise ValueError(f"features of width {samples.dim} against a reference of width {self.reference.dim}")
        covariance = samples.covariance
        # tr (S1 S2)^1/2 = sum of the roots of the eigenvalues of A^T S2 A, where S1 = A A^T: symmetric, so no
        # general matrix root is needed.
        values = torch.linalg.eigvalsh(self._root.T @ covariance @ self._root)
        traces = float(self._covariance.trace() + covariance.trace())
        if float(values.min()) < -1e-10 * traces**2:
            raise ArithmeticError(f"the product of covariances has an eigenvalue of {float(values.min()):.2e}")
        squared_mean = float((samples.mean - self.reference.mean).square().sum())
        rank = min(len(values), samples.num_samples - 1)
        value = squared_mean + traces - 2 * float(values[-rank:].clamp(min=0).sqrt().sum())
        if value < -1e-6 * (traces + squared_mean):
            raise ArithmeticError(f"the Frechet distance comes out negative: {value:.3e}")
        result = FrechetResult(max(value, 0.0), self.reference.num_samples, samples.num_samples, samples.dim)
        if result.rank_deficient:
            _warn_few_samples(result.num_reference, result.num_samples, result.dim)
        return result


def frechet_distance(features: Tensor, references: Tensor) -> FrechetResult:
    """Compute the Frechet distance between two sets of features at once.

    Args:
        features: ``(n, dim)``, n of 2 or more.
        references: ``(m, dim)``, m of 2 or more.

    Returns:
        The distance.
    """
    reference = FeatureMoments(references.shape[1]).update(references)
    return FrechetDistance(reference).to(FeatureMoments(references.shape[1]).update(features))


@lru_cache
def _warn_few_samples(num_reference: int, num_samples: int, dim: int) -> None:
    logger.warning(
        "Frechet distance from %d and %d samples of %d-d features: biased upwards, compare only at equal n",
        *(num_reference, num_samples, dim),
    )
