"""Activation checkpointing applied from outside: chosen blocks are recomputed in the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ltd.config import ConfigError
from ltd.parallel.config import ParallelConfig


def checkpoint_blocks(model: nn.Module, config: ParallelConfig) -> int:
    """Recompute every k-th block of ``model.blocks`` as the configuration says.

    Args:
        model: Model with an iterable ``blocks`` of modules; changed in place, its state dict stays as it is.
        config: ``activation_checkpointing`` and ``activation_checkpointing_every`` are read.

    Returns:
        Number of blocks that are recomputed.

    Raises:
        ConfigError: If it is asked for and the model has no ``blocks``.
    """
    if config.activation_checkpointing == "none":
        return 0
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise ConfigError(f"parallel.activation_checkpointing: {type(model).__name__} has no blocks; set it to none")
    chosen = list(blocks)[:: config.activation_checkpointing_every]
    for block in chosen:
        block.forward = functools.partial(_recomputed, model, block.forward)
    return len(chosen)


def _recomputed(model: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # The recomputation may run after another forward pass: what sequence parallelism knows of this one goes with it.
    pin = getattr(getattr(model, "shard_tokens", None), "pin", None)
    return checkpoint(pin(forward) if pin else forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
