"""Which kind of step comes when: by weight, or so that every kind passes its epochs at the same rate.

Functions of the seed alone; any step can be asked for without the ones before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from ltd.data.order import raw, uniform

_BLOCK = 4096


class Schedule(Protocol):
    """Kinds of steps, step by step, without an end."""

    def before(self, step: int) -> tuple[int, np.ndarray]:
        """Return the kind of a step, and how many earlier steps were of each kind, int64 ``(k,)``."""


class WeightedSteps:
    """Draw the kind of each step independently.

    Args:
        weights: Share of each kind, any positive scale; 0 is never.
        first: Kinds that the run begins with.
        seed: Seed of the run.
    """

    def __init__(self, weights: Sequence[float], first: Sequence[int], *, seed: int) -> None:
        self._edges = np.cumsum(weights) / np.sum(weights)
        self._first, self._seed, self._num_kinds = list(first), seed, len(weights)
        self._counts: list[np.ndarray] = [np.zeros(len(weights), dtype=np.int64)]
        self._block = lru_cache(maxsize=4)(self._draw)

    def _draw(self, block: int) -> np.ndarray:
        drawn = uniform(_BLOCK, self._seed, "view", block)
        kinds = np.minimum(np.searchsorted(self._edges, drawn, side="right"), self._num_kinds - 1)
        if block == 0:
            kinds[: len(self._first)] = self._first
        return kinds

    def before(self, step: int) -> tuple[int, np.ndarray]:
        """Tell the kind of a step.

        Args:
            step: Step, from 0.

        Returns:
            The kind; how many earlier steps were of each kind.
        """
        block, offset = divmod(step, _BLOCK)
        while len(self._counts) <= block:
            drawn = np.bincount(self._block(len(self._counts) - 1), minlength=self._num_kinds)
            self._counts.append(self._counts[-1] + drawn)
        kinds = self._block(block)
        return int(kinds[offset]), self._counts[block] + np.bincount(kinds[:offset], minlength=self._num_kinds)


class EpochSteps:
    """Shuffle the steps of each epoch: every kind takes as many as its samples make, remainders carried over.

    After ``e`` epochs a kind has had ``floor(e * rate)`` steps: no kind ever runs ahead of another by a batch.

    Args:
        rates: Steps of each kind that make one epoch, not all 0.
        first: Kinds that the run begins with.
        seed: Seed of the run.
    """

    def __init__(self, rates: Sequence[float], first: Sequence[int], *, seed: int) -> None:
        self._rates, self._seed, self._first = np.asarray(rates, dtype=np.float64), seed, list(first)
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def _done(self, epochs: int) -> np.ndarray:
        # A hair is added: what should come out whole must not be rounded down.
        return np.floor(epochs * self._rates * (1 + 1e-12) + 1e-9).astype(np.int64)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the kinds of an epoch's steps, and the counts of each kind before every block of them."""
        kinds = np.repeat(np.arange(len(self._rates)), self._done(epoch + 1) - self._done(epoch))
        kinds = kinds[np.argsort(raw(len(kinds), self._seed, "kinds", epoch), kind="stable")]
        if epoch == 0:
            for place, kind in enumerate(self._first):
                found = place + np.flatnonzero(kinds[place:] == kind)
                if len(found):
                    kinds[[place, found[0]]] = kinds[[found[0], place]]
        blocks = [np.bincount(kinds[n : n + _BLOCK], minlength=len(self._rates)) for n in range(0, len(kinds), _BLOCK)]
        return kinds, np.cumsum([np.zeros(len(self._rates), dtype=np.int64), *blocks], axis=0)

    def before(self, step: int) -> tuple[int, np.ndarray]:
        """Tell the kind of a step.

        Args:
            step: Step, from 0.

        Returns:
            The kind; how many earlier steps were of each kind.
        """
        epoch = int(step / self._rates.sum())
        while self._done(epoch).sum() > step:
            epoch -= 1
        while self._done(epoch + 1).sum() <= step:
            epoch += 1
        done = self._done(epoch)
        kinds, counts = self._epoch(epoch)
        offset = step - int(done.sum())
        block = offset // _BLOCK
        inside = np.bincount(kinds[block * _BLOCK : offset], minlength=len(self._rates))
        return int(kinds[offset]), done + counts[block] + inside
