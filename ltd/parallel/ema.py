"""Exponential moving average of the weights, beside the optimizer's shards: fp32, element-wise, never gathered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ltd.config import ConfigError
from ltd.parallel.interface import Engine, assign, flat
from ltd.storage import Reader, Slice

GROUP = "ema"
"""Group of the averaged weights in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How fast the average forgets."""

    #: Share of the old average kept at each step, in [0, 1).
    decay: float = 0.999
    #: Keep less while young: at step t at most (1 + t) / (10 + t).
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"ema.decay: got {self.decay}, needs a number in [0, 1)")

    def decay_at(self, step: int) -> float:
        """Compute the decay of one step.

        Args:
            step: Steps averaged before this one, from 0.

        Returns:
            Share of the old average to keep.
        """
        return min(self.decay, (1.0 + step) / (10.0 + step)) if self.warmup else self.decay


class Ema:
    """Average of an engine's fp32 master weights; each process keeps the part it has masters of.

    Starts as a copy of the masters. Its only state is the average: the decay is a function of the step.

    Args:
        engine: Engine whose masters are averaged.
        config: Decay and warm-up.
    """

    def __init__(self, engine: Engine, config: EmaConfig) -> None:
        self.config = config
        self._engine = engine
        self._shards = engine.master_shards()
        self._masters = [shard.data for shard in self._shards]
        self._averages = [shard.data.clone(memory_format=torch.preserve_format) for shard in self._shards]

    def update(self, step: int) -> None:
        """Average in the masters after an optimizer step.

        Args:
            step: Steps averaged before this one, from 0.
        """
        if self._averages:
            torch._foreach_lerp_(self._averages, self._masters, 1.0 - self.config.decay_at(step))

    def slices(self) -> list[Slice]:
        """List the slices that this process writes into a checkpoint."""
        pairs = zip(self._shards, self._averages, strict=True)
        return [Slice(GROUP, s.name, s.shape, s.start, flat(average)) for s, average in pairs if s.owner]

    def load(self, reader: Reader) -> None:
        """Restore the average from a checkpoint of any layout."""
        for shard, average in zip(self._shards, self._averages, strict=True):
            stop = shard.start + average.numel()
            assign(average, reader.read(GROUP, shard.name, shard.start, stop))

    def restart(self) -> None:
        """Begin again from the masters as they are."""
        if self._averages:
            torch._foreach_copy_(self._averages, self._masters)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Run the engine's module with the averaged weights inside a ``with`` block; called by all processes.

        No training step may be taken inside. The masters come back bit for bit.

        Yields:
            Nothing.
        """
        kept = [master.clone(memory_format=torch.preserve_format) for master in self._masters]
        try:
            torch._foreach_copy_(self._masters, self._averages)
            self._engine.refresh_weights()
            yield
        finally:
            torch._foreach_copy_(self._masters, kept)
            self._engine.refresh_weights()
