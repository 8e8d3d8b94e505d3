"""Compilation of a model's blocks with torch.compile: which are compiled, and how many graphs that took so far."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ltd.config import ConfigError
from ltd.parallel.config import ParallelConfig

logger = logging.getLogger(__name__)

#: Graphs of one block, whose copies share them, after which torch compiles no more and runs new shapes as they are.
MAX_GRAPHS = 16


class Compiled:
    """The compiled modules of a model, and the count of their graphs.

    Args:
        modules: Names of the compiled modules; none when nothing is compiled.
    """

    def __init__(self, modules: tuple[str, ...] = ()) -> None:
        self.modules = modules
        self._num_graphs = 0

    def num_graphs(self) -> int:
        """Count the graphs that were compiled so far; blocks of one kind share theirs."""
        return self._num_graphs

    def compile_graph(self, graph: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
        """Compile a graph with inductor and count it: the backend given to ``torch.compile``.

        Args:
            graph: Graph module that was traced.
            inputs: Example inputs.
            options: What torch.compile passes on.

        Returns:
            The compiled function.
        """
        self._num_graphs += 1
        if self._num_graphs == MAX_GRAPHS:
            logger.warning(
                "parallel.compile: %d graphs were compiled by now, for as many kinds of input; further ones are not "
                "compiled. Use fewer sizes (data.batching: buckets, no packs), or set parallel.compile to none",
                MAX_GRAPHS,
            )
        compiled: Callable[..., Any] = _dynamo().lookup_backend("inductor")(graph, inputs, **options)
        return compiled


def compile_blocks(model: nn.Module, config: ParallelConfig) -> Compiled:
    """Compile the forward pass of every block of ``model.blocks``, each at its first call.

    Call it last of what changes a model: activation checkpointing, sequence sharding, compilation, engine.

    Args:
        model: Model with an iterable ``blocks`` of modules; changed in place, its state dict stays as it is.
        config: ``compile`` and ``zero`` are read.

    Returns:
        What is compiled; empty when nothing is.

    Raises:
        ConfigError: If it is asked for and the model has no ``blocks``, or at ZeRO stage 3.
    """
    if config.compile == "none":
        return Compiled()
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise ConfigError(f"parallel.compile: {type(model).__name__} has no blocks; set it to none")
    if config.engine == "deepspeed" and config.zero == 3:
        # Right, but in 32 pieces per block, or not compiled at all where blocks are recomputed.
        raise ConfigError(
            "parallel.compile: blocks needs parallel.zero of 0, 1 or 2, got 3: DeepSpeed gathers weights inside the "
            "blocks there, which leaves next to nothing to compile; set parallel.compile to none or lower parallel.zero"
        )
    settings = _dynamo().config
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"
    setattr(settings, limit, max(MAX_GRAPHS, getattr(settings, limit)))
    names = {id(module): name for name, module in model.named_modules()}
    compiled = Compiled(tuple(names[id(block)] for block in blocks))
    for block in blocks:
        # The forward pass alone, not the module: hooks that an engine puts on the block stay outside of the graph.
        block.forward = torch.compile(block.forward, backend=compiled.compile_graph)
    return compiled


def _dynamo() -> Any:
    return importlib.import_module("torch._dynamo")  # takes seconds: for those who compile
