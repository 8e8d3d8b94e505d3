"""Nearest neighbours in a feature space: caption retrieval, and how near samples come to training clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def pairwise_distances(queries: Tensor, gallery: Tensor) -> Tensor:
    """Compute Euclidean distances in float64.

    Args:
        queries: ``(n, dim)``.
        gallery: ``(m, dim)``.

    Returns:
        ``(n, m)`` float64.

    Raises:
        ValueError: If the widths differ, the gallery is empty or a value is not finite.
    """
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1] or len(gallery) == 0:
        raise ValueError(f"needed (n, dim) and (m, dim) with m > 0, got {tuple(queries.shape)}, {tuple(gallery.shape)}")
    if not (torch.isfinite(queries).all() and torch.isfinite(gallery).all()):
        raise ValueError("features hold NaN or infinity")
    return torch.cdist(queries.double(), gallery.double(), compute_mode="donot_use_mm_for_euclid_dist")


class Retrieval:
    """Top-1 retrieval: the share of queries whose nearest gallery item carries their own label.

    Args:
        gallery: ``(m, dim)``.
        labels: Label of each item; a label may have several items.

    Raises:
        ValueError: If the numbers differ or there are fewer than 2 labels.
    """

    def __init__(self, gallery: Tensor, labels: Sequence[str]) -> None:
        if len(gallery) != len(labels) or len(set(labels)) < 2:
            raise ValueError(f"a gallery needs 2 labels or more, got {len(gallery)} items, {len(set(labels))} labels")
        self.gallery, self.labels = gallery, tuple(labels)
        self.num_queries = 0
        self._num_correct = 0

    @property
    def chance(self) -> float:
        """Accuracy of a blind guess."""
        return 1 / len(set(self.labels))

    @property
    def accuracy(self) -> float:
        """Share of right answers, in 0..1."""
        if self.num_queries == 0:
            raise ValueError("nothing was counted yet: update or merge first")
        return self._num_correct / self.num_queries

    def update(self, queries: Tensor, labels: Sequence[str]) -> None:
        """Count queries.

        Args:
            queries: ``(n, dim)``.
            labels: Right label of each.

        Raises:
            ValueError: If a label is not in the gallery.
        """
        unknown = sorted(set(labels) - set(self.labels))
        if unknown:
            raise ValueError(f"label {unknown[0]!r} is not in the gallery")
        nearest = pairwise_distances(queries, self.gallery).argmin(dim=1).tolist()
        answers = [self.labels[index] for index in nearest]
        self._num_correct += sum(answer == label for answer, label in zip(answers, labels, strict=True))
        self.num_queries += len(answers)

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: plain numbers."""
        return {"num_queries": self.num_queries, "num_correct": self._num_correct}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator over the same gallery has counted."""
        self.num_queries += state["num_queries"]
        self._num_correct += state["num_correct"]


class NearestDistances:
    """Distances from queries to the nearest gallery item that does not share their group.

    Args:
        gallery: ``(m, dim)``.
        groups: Group of each item, as the clip a window was cut from.

    Raises:
        ValueError: If the numbers differ.
    """

    def __init__(self, gallery: Tensor, groups: Sequence[str]) -> None:
        if len(gallery) != len(groups):
            raise ValueError(f"got {len(gallery)} gallery items and {len(groups)} groups")
        self.gallery, self.groups = gallery, tuple(groups)
        self.values: list[float] = []

    @property
    def median(self) -> float:
        """Median distance."""
        if not self.values:
            raise ValueError("nothing was counted yet: update or merge first")
        return float(torch.tensor(self.values, dtype=torch.float64).quantile(0.5))

    def update(self, queries: Tensor, groups: Sequence[str] | None = None) -> None:
        """Count queries.

        Args:
            queries: ``(n, dim)``.
            groups: Group of each query, whose items are skipped; None skips none.

        Raises:
            ValueError: If a query's group is the whole gallery.
        """
        distances = pairwise_distances(queries, self.gallery)
        if groups is not None:
            same = torch.tensor([[own == other for other in self.groups] for own in groups])
            if same.all(dim=1).any():
                raise ValueError("a query's own group is the whole gallery")
            distances = distances.masked_fill(same, torch.inf)
        self.values += distances.min(dim=1).values.tolist()

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: the distances."""
        return {"values": list(self.values)}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator over the same gallery has counted."""
        self.values += state["values"]
