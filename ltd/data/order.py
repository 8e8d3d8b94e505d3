"""The endless order in which the samples of one data set are drawn: a pure function of the seed and the data.

An epoch takes the shards in a new order and the samples of each shard shuffled. That sequence is cut into ``lanes``
equal parts which are read side by side, one sample of each in turn: a batch mixes as many places of the data set as
there are lanes, while every shard is read in one go, by one lane. Knows nothing of ranks, workers, files or history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from ltd.rng import derive_seed


def raw(count: int, seed: int, *parts: int | str) -> np.ndarray:
    """Draw ``count`` uint64 numbers of a named stream.

    The raw stream of a bit generator is fixed for all numpy versions, which the methods of Generator are not.
    """
    return np.random.Philox(key=derive_seed(seed, *parts)).random_raw(count)


def uniform(count: int, seed: int, *parts: int | str) -> np.ndarray:
    """Draw ``count`` numbers uniform in [0, 1) of a named stream."""
    return (raw(count, seed, *parts) >> np.uint64(11)) * 2.0**-53


def unit(seed: int, *parts: int | str) -> float:
    """Hash a seed and labels into a number uniform in [0, 1)."""
    return (derive_seed(seed, *parts) >> 10) * 2.0**-53


@dataclass(frozen=True)
class Drawn:
    """Consecutive units of an order; a unit is one sample, or the samples of one pack."""

    ids: np.ndarray  #: int64 (n,), samples, unit after unit.
    ends: np.ndarray  #: int64 (u,), place after the last sample of each unit.
    lanes: np.ndarray  #: int64 (u,), lane each unit came from.
    epochs: np.ndarray  #: int64 (n,), epoch each sample belongs to.

    @classmethod
    def join(cls, parts: Sequence[Drawn]) -> Drawn:
        """Put units one after the other."""
        starts = np.cumsum([0] + [len(part.ids) for part in parts])
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.ends + start for part, start in zip(parts, starts, strict=False)]),
            np.concatenate([part.lanes for part in parts]),
            np.concatenate([part.epochs for part in parts]),
        )

    def pick(self, units: np.ndarray) -> Drawn:
        """Take units in the order given."""
        counts = np.diff(self.ends, prepend=0)[units]
        ends = np.cumsum(counts)
        places = np.repeat(self.ends[units] - ends, counts) + np.arange(int(counts.sum()))
        return Drawn(self.ids[places], ends, self.lanes[units], self.epochs[places])


class Order(Protocol):
    """Units to be drawn one after the other, without an end."""

    num_samples: int  #: Samples of one epoch.
    num_units: int  #: Units of one epoch.
    max_unit: int  #: Most samples in a unit.

    def take(self, first: int, count: int) -> Drawn:
        """Draw the units ``first`` to ``first + count``."""


@dataclass(frozen=True)
class Strand:
    """Samples of one data set, and how they are drawn."""

    ids: np.ndarray  #: int64 (n,), samples in the order of the index.
    shards: np.ndarray  #: int32 (n,), shard of each.
    seed: int  #: Seed of the run.
    name: tuple[int | str, ...]  #: Tells the streams of data sets apart.
    lanes: int  #: Shards read side by side, >= 1.
    replacement: bool  #: Whether each epoch's samples are drawn with replacement.

    def shuffled(self, epoch: int, *, part: int, classes: np.ndarray | None = None) -> np.ndarray:
        """Order the samples of an epoch: shards shuffled, samples of a shard shuffled.

        Args:
            epoch: Epoch.
            part: Tells strands of one data set apart; they take the shards in the same order.
            classes: int64 (n,), class of each sample; the result then holds class after class.

        Returns:
            int64 (n,), ids; with replacement some occur more than once.
        """
        count = len(self.ids)
        chosen = np.arange(count)
        if self.replacement:
            picks = raw(count, self.seed, *self.name, "replacement", part, epoch)
            if classes is None:
                chosen = (picks % np.uint64(count)).astype(np.int64)
            else:  # a sample stands in for one of its own class only
                by_class = np.argsort(classes, kind="stable")
                starts = np.searchsorted(classes[by_class], classes)
                sizes = np.searchsorted(classes[by_class], classes, side="right") - starts
                chosen = by_class[starts + (picks % sizes.astype(np.uint64)).astype(np.int64)]
        shards = self.shards[chosen]
        ranks = raw(int(self.shards.max()) + 1, self.seed, *self.name, "shards", epoch)[shards]
        keys = [raw(count, self.seed, *self.name, "samples", part, epoch), ranks]
        if classes is not None:
            keys.append(classes[chosen])
        return self.ids[chosen[np.lexsort(keys)]]


def deal(shuffled: np.ndarray, lanes: int) -> np.ndarray:
    """Cut a sequence into equal lanes and take one of each in turn.

    Args:
        shuffled: ``(n,)``.
        lanes: How many, >= 1.

    Returns:
        ``(n,)``; every ``lanes``-th element continues one lane.
    """
    dealt, begin = np.empty_like(shuffled), 0
    for lane in range(min(lanes, len(shuffled))):
        length = len(dealt[lane::lanes])
        dealt[lane::lanes] = shuffled[begin : begin + length]
        begin += length
    return dealt


class SampleOrder:
    """Draw single samples.

    Args:
        strand: The samples.
        part: Tells strands of one data set apart.
    """

    max_unit = 1

    def __init__(self, strand: Strand, *, part: int) -> None:
        self.strand, self.part = strand, part
        self.num_samples = self.num_units = len(strand.ids)
        self.lanes = min(strand.lanes, len(strand.ids))
        self._epoch = lru_cache(maxsize=2)(self._deal)

    def _deal(self, epoch: int) -> np.ndarray:
        return deal(self.strand.shuffled(epoch, part=self.part), self.lanes)

    def take(self, first: int, count: int) -> Drawn:
        """Draw samples.

        Args:
            first: Number of the first, from 0.
            count: How many.

        Returns:
            The samples; every unit is one.
        """
        epochs, places = np.divmod(np.arange(first, first + count), self.num_units)
        ids = np.concatenate([self._epoch(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])
        return Drawn(ids, np.arange(1, count + 1), places % self.lanes, epochs)


class PackOrder:
    """Draw packs of samples of several classes (sizes) that fill a token budget together.

    The packs' make-up by class is fixed; each epoch shuffles the packs, and the samples within each class.

    Args:
        strand: The samples.
        classes: int64 (n,), class of each sample.
        packs: int64 (n,), classes of the samples, pack after pack; each class as often as in ``classes``.
        ends: int64 (k,), place after the last sample of each pack.
    """

    def __init__(self, strand: Strand, classes: np.ndarray, packs: np.ndarray, ends: np.ndarray) -> None:
        self.strand, self.classes = strand, classes
        self._packs = Drawn(packs, ends, np.zeros(len(ends), dtype=np.int64), np.zeros(len(packs), dtype=np.int64))
        self.num_samples, self.num_units = len(packs), len(ends)
        self.max_unit = int(np.diff(ends, prepend=0).max())
        self._epoch = lru_cache(maxsize=2)(self._fill)

    def _fill(self, epoch: int) -> Drawn:
        strand = self.strand
        shuffle = np.argsort(raw(self.num_units, strand.seed, *strand.name, "packs", epoch), kind="stable")
        packs = self._packs.pick(shuffle)
        ids = np.empty(self.num_samples, dtype=np.int64)
        shuffled = strand.shuffled(epoch, part=0, classes=self.classes)
        ends = np.cumsum(np.bincount(self.classes))
        dealt = [deal(part, strand.lanes) for part in np.split(shuffled, ends[:-1])]
        # Both sides list class after class: the k-th place of a class gets the k-th of its dealt samples.
        ids[np.argsort(packs.ids, kind="stable")] = np.concatenate(dealt)
        return Drawn(ids, packs.ends, packs.lanes, np.full(len(ids), epoch))

    def take(self, first: int, count: int) -> Drawn:
        """Draw packs.

        Args:
            first: Number of the first, from 0.
            count: How many.

        Returns:
            The samples; every unit is a pack.
        """
        epochs, places = np.divmod(np.arange(first, first + count), self.num_units)
        parts = [self._epoch(int(epoch)).pick(places[epochs == epoch]) for epoch in np.unique(epochs)]
        return Drawn.join(parts)
