"""Features of samples, kept whole: what metrics need that compare samples with each other (KID, manifolds, splits).

With keys, the rows stand in the order of their keys, so that a draw of subsets is the same however the samples were
shared out; and a sample that is counted twice is found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ltd.evaluation.frechet import FeatureMoments, check_features

_NAMED = 3


class FeatureBank:
    """Features of all samples, in the order of their keys.

    Args:
        dim: Width of the features.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._parts: list[Tensor] = []
        self._keys: list[int] | None = None

    @property
    def num_samples(self) -> int:
        """Number of samples counted."""
        return sum(len(part) for part in self._parts)

    def update(self, features: Tensor, keys: Sequence[int] | None = None) -> FeatureBank:
        """Keep features.

        Args:
            features: ``(n, dim)``.
            keys: Number of each sample among all samples, each once; None counts in order of arrival.

        Returns:
            Itself.

        Raises:
            ValueError: If the width is wrong, a value is not finite (the message names the samples), a key comes twice,
                or some calls give keys and others do not.
        """
        check_features(features, self.dim, keys=keys, first=self.num_samples)
        self.merge({"features": features.detach().cpu(), "keys": None if keys is None else list(keys)})
        return self

    @property
    def features(self) -> Tensor:
        """All features ``(n, dim)`` float64, in the order of their keys."""
        if not self._parts:
            return torch.zeros(0, self.dim, dtype=torch.float64)
        rows = torch.cat(self._parts).double()
        return rows if self._keys is None else rows[torch.tensor(self._keys).argsort()]

    def moments(self) -> FeatureMoments:
        """Give mean and covariance of the features kept."""
        return FeatureMoments(self.dim).update(self.features)

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: a tensor, as precise as the features were, and the keys."""
        rows = torch.cat(self._parts) if self._parts else torch.zeros(0, self.dim)
        return {"features": rows, "keys": None if self._keys is None else list(self._keys)}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has kept.

        Args:
            state: Result of ``state``.

        Raises:
            ValueError: If the widths differ, a sample is in both, or only one of them has keys.
        """
        rows, keys = state["features"], state["keys"]
        if rows.shape[1] != self.dim:
            raise ValueError(f"features of width {rows.shape[1]} do not merge into width {self.dim}")
        if len(rows) == 0:
            return
        if self._parts and (keys is None) != (self._keys is None):
            raise ValueError("features with keys do not mix with features without: give all samples keys, or none")
        if keys is not None:
            self._keys = (self._keys or []) + self._new(keys, len(rows))
        self._parts.append(rows if rows.dtype in (torch.float32, torch.float64) else rows.float())

    def _new(self, keys: Sequence[int], num_rows: int) -> list[int]:
        if len(keys) != num_rows:
            raise ValueError(f"{len(keys)} keys for {num_rows} samples")
        known, twice = set(self._keys or ()), []
        for key in keys:
            if key in known:
                twice.append(key)
            known.add(key)
        if twice:
            listed = ", ".join(map(str, twice[:_NAMED])) + (", ..." if len(twice) > _NAMED else "")
            raise ValueError(f"{len(twice)} samples are counted twice, of keys {listed}: every sample counts once")
        return list(keys)
