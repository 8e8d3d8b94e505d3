"""A histogram as plain numbers: edges of bins, and how many values lie in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """Counts between edges."""

    #: Ascending, one more than counts.
    edges: Sequence[float]
    #: Values in [edges[i], edges[i + 1]).
    counts: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"edges: got {len(self.edges)} for {len(self.counts)} counts, needed one more than counts")

    def trimmed(self) -> Histogram:
        """Leave out the empty bins at both ends; an empty histogram keeps its first bin."""
        filled = [number for number, count in enumerate(self.counts) if count]
        first, last = (filled[0], filled[-1]) if filled else (0, 0)
        return Histogram(list(self.edges[first : last + 2]), list(self.counts[first : last + 1]))
