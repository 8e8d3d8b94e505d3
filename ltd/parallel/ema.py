"""Exponential moving averages of the weights, beside the optimizer's shards: fp32, element-wise, never gathered."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.parallel.interface import Engine, flat
from ltd.storage import Fill, Reader, Slice

logger = logging.getLogger(__name__)


def group_of(decay: float) -> str:
    """Name the group that holds an average in a checkpoint, such as ``ema_0.999``."""
    return f"ema_{float(decay)!r}"


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Which averages of the weights are kept, and how fast each forgets."""

    #: Share of the old average kept at each step, in [0, 1); one average each. The first is what ``weights=ema`` means.
    decays: tuple[float, ...] = (0.999,)
    #: Keep less while young: at step t at most (1 + t) / (10 + t).
    warmup: bool = True

    def __post_init__(self) -> None:
        if not self.decays:
            raise ConfigError("ema.decays: got none, needs at least one number in [0, 1), such as [0.999]")
        for decay in self.decays:
            if not 0.0 <= decay < 1.0:
                raise ConfigError(f"ema.decays: got {decay}, needs numbers in [0, 1)")
        if len(set(self.decays)) != len(self.decays):
            raise ConfigError(f"ema.decays: got {list(self.decays)}, needs distinct numbers; list each once")

    def decay_at(self, step: int, decay: float) -> float:
        """Compute the decay of one step.

        Args:
            step: Steps averaged before this one, from 0.
            decay: One of ``decays``.

        Returns:
            Share of the old average to keep.
        """
        return min(decay, (1.0 + step) / (10.0 + step)) if self.warmup else decay


class Ema:
    """Averages of an engine's fp32 master weights; each process keeps the part it has masters of.

    They start as copies of the masters. Their only state is the averages: the decay is a function of the step.

    Args:
        engine: Engine whose masters are averaged.
        config: Decays and warm-up.
    """

    def __init__(self, engine: Engine, config: EmaConfig) -> None:
        self.config = config
        self._engine = engine
        self._shards = engine.master_shards()
        self._masters = [shard.data for shard in self._shards]
        self._averages = {
            decay: [master.clone(memory_format=torch.preserve_format) for master in self._masters]
            for decay in config.decays
        }

    @property
    def groups(self) -> list[str]:
        """Names of the averages in a checkpoint, in the configuration's order."""
        return [group_of(decay) for decay in self.config.decays]

    def update(self, step: int) -> None:
        """Average in the masters after an optimizer step.

        Args:
            step: Steps averaged before this one, from 0.
        """
        for decay, averages in self._averages.items():
            if averages:
                torch._foreach_lerp_(averages, self._masters, 1.0 - self.config.decay_at(step, decay))

    def slices(self, decay: float | None = None) -> list[Slice]:
        """List the slices that this process writes into a checkpoint.

        Args:
            decay: Of one average only; all by default.

        Returns:
            Slices, as views where memory formats allow.
        """
        return [
            Slice(group_of(one), shard.name, shard.shape, shard.start, flat(average))
            for one, averages in self._averages.items()
            if decay is None or one == decay
            for shard, average in zip(self._shards, averages, strict=True)
            if shard.owner
        ]

    def load(self, reader: Reader) -> None:
        """Restore the averages from a checkpoint of any layout.

        Averages that it lacks start from the masters, which must be loaded already; those it has and the configuration
        does not name are left behind. Both are said in a warning.

        Args:
            reader: The checkpoint.
        """
        stored = reader.groups()
        fills: list[Fill] = []
        missing: list[str] = []
        for decay, averages in self._averages.items():
            group = group_of(decay)
            if group in stored:
                pairs = zip(self._shards, averages, strict=True)
                fills += [Fill(group, shard.name, shard.start, average) for shard, average in pairs]
            else:
                missing.append(group)
                _copy(averages, self._masters)
        unwanted = [group for group in reader.averages() if group not in self.groups]
        if missing:
            logger.warning(
                "ema.decays: %s holds no %s; it starts from the loaded weights", reader.directory, ", ".join(missing)
            )
        if unwanted:
            logger.warning("ema.decays: %s of %s is not listed and is dropped", ", ".join(unwanted), reader.directory)
        reader.fill(fills)

    @contextlib.contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """Run the engine's module with averaged weights inside a ``with`` block; called by all processes.

        No training step may be taken inside. The masters come back bit for bit.

        Args:
            decay: Which average; the first that the configuration lists by default.

        Yields:
            Nothing.

        Raises:
            ConfigError: If there is no average of that decay.
        """
        chosen = self.config.decays[0] if decay is None else decay
        if chosen not in self._averages:
            raise ConfigError(f"ema.decays: no average of decay {decay}; kept are {list(self._averages)}")
        kept = [master.clone(memory_format=torch.preserve_format) for master in self._masters]
        try:
            _copy(self._masters, self._averages[chosen])
            self._engine.refresh_weights()
            yield
        finally:
            _copy(self._masters, kept)
            self._engine.refresh_weights()


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
