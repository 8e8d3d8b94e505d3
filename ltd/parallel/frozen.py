"""Exact values of frozen parameters beside the rounded ones of a bf16 run: what its checkpoints hold.

A stage that freezes weights, and one that trains them again, then change nothing of them. Each process keeps its part
of every such parameter, in host memory. Knows no engine.
"""

from __future__ import annotations

from torch import Tensor, nn

from ltd.parallel.config import ParallelConfig
from ltd.parallel.interface import flat, full_shape
from ltd.storage import Fill, Slice

#: Group of a checkpoint that frozen parameters are in.
GROUP = "buffer"


class FrozenWeights:
    """This process's part of the fp32 values of a module's frozen parameters; none in fp32, where they are exact.

    Args:
        module: Module with fp32 parameters, before any is rounded.
        config: Precision is read.
        global_rank: This process.
        world_size: Processes that share the values.
    """

    def __init__(self, module: nn.Module, config: ParallelConfig, global_rank: int = 0, world_size: int = 1) -> None:
        #: Parameters whose values are kept here, by one process or another.
        self.names: frozenset[str] = frozenset()
        self._parts: list[tuple[str, tuple[int, ...], int, Tensor]] = []
        if config.precision != "bf16":
            return
        frozen = {name: value for name, value in module.named_parameters() if not value.requires_grad}
        self.names = frozenset(frozen)
        for name, value in frozen.items():
            start, stop = (value.numel() * rank // world_size for rank in (global_rank, global_rank + 1))
            if start < stop:
                part = flat(value)[start:stop].to("cpu", copy=True)
                self._parts.append((name, full_shape(value), start, part))

    def slices(self) -> list[Slice]:
        """List what this process writes into a checkpoint, as views."""
        return [Slice(GROUP, name, shape, start, part) for name, shape, start, part in self._parts]

    def fills(self) -> list[Fill]:
        """List what this process reads from a checkpoint of any layout, in place."""
        return [Fill(GROUP, name, start, part) for name, _, start, part in self._parts]
