"""What a source of samples is: it knows its samples and how to load them, nothing of steps, ranks or order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ltd.config import ConfigError
from ltd.data.batch import BadSample, Batch, Sample
from ltd.data.entries import Entries
from ltd.data.plan import Placement, ViewConfig


@dataclass(frozen=True)
class Items:
    """Samples that are asked for."""

    entries: np.ndarray  #: int64 (n,), ids: places in ``Source.entries``.
    keys: Sequence[str]  #: Key of each.
    draws: Sequence[int]  #: Slot of each in the global sequence.
    captions: np.ndarray | None = (
        None  #: float64 (n,) in [0, 1), chooses among weighted captions; None takes the first.
    )
    placements: Sequence[Placement] = ()  #: Where each is cut; not looked at by a cache.

    def __len__(self) -> int:
        return len(self.entries)

    def pick(self, places: Sequence[int]) -> Items:
        """Take some of them, in the order given."""
        return Items(
            self.entries[list(places)],
            [self.keys[place] for place in places],
            [self.draws[place] for place in places],
            None if self.captions is None else self.captions[list(places)],
            [self.placements[place] for place in places] if self.placements else (),
        )


class Source(Protocol):
    """Samples that can be planned and loaded."""

    entries: Entries  #: The samples, in a fixed order.
    bad: list[BadSample]  #: Samples that are left out of every view, with the cause.
    random_cuts: bool  #: Whether window, crop and flip are chosen per draw (False: baked in, and loaded by the batch).

    @property
    def digest(self) -> str:
        """Hash of what the samples are, independent of their place."""

    def fits(self, view: ViewConfig) -> tuple[np.ndarray, Counter[str]]:
        """Tell which samples can serve a view, bool ``(n,)``, and count the reasons why others cannot."""

    def load(self, entry: int, view: ViewConfig, placement: Placement, caption: float) -> Sample:
        """Load one sample of a source with random cuts; raises on any damage."""

    def load_batch(self, items: Items, view: ViewConfig) -> Batch:
        """Load samples of one size from a source without random cuts."""

    def num_bytes(self, items: Items, view: ViewConfig) -> int:
        """Tell the bytes that samples take while they are loaded and wait."""

    def blank(self, entry: int, view: ViewConfig) -> Sample:
        """Make the sample of zeros that stands in for a failed one."""

    def shard_of(self, entry: int) -> str:
        """Name the file or directory a sample lies in."""


def choose_caption(captions: Sequence[tuple[str, float]], uniform: float) -> str:
    """Pick one of several captions by weight.

    Args:
        captions: Texts and positive weights; none gives "".
        uniform: Number in [0, 1).

    Returns:
        The text.
    """
    return captions[choose_column(captions, uniform)][0] if captions else ""


def choose_column(captions: Sequence[tuple[str, float]], uniform: float) -> int:
    """Pick the number of one of several captions by weight, as ``choose_caption`` does; 0 where there is none."""
    if len(captions) < 2:
        return 0
    edges = np.cumsum([weight for _, weight in captions])
    return min(int(np.searchsorted(edges, uniform * edges[-1], side="right")), len(captions) - 1)


def require_captions(entries: Entries, bad: list[BadSample], shard_of: Sequence[str]) -> Entries:
    """Leave out the samples without a caption and record them.

    Args:
        entries: The samples.
        bad: Gets a record of each that is left out.
        shard_of: Path of each shard; one for all samples, or one per shard number.

    Returns:
        The samples with a caption.

    Raises:
        ConfigError: If there is none.
    """
    captioned = entries.captioned
    if captioned.all():
        return entries
    message = "no caption (data.caption_required is true)"
    for place in np.flatnonzero(~captioned).tolist():
        shard = shard_of[int(entries.columns["shard"][place]) if len(shard_of) > 1 else 0]
        bad.append(BadSample(key=entries.keys[place], shard=shard, cause="no_caption", message=message))
    if not captioned.any():
        raise ConfigError(
            f"data.caption_required: true, but none of the {len(entries)} samples of data.shards has a "
            "caption; add .txt members or set data.caption_required=false"
        )
    return entries.take(np.flatnonzero(captioned))
