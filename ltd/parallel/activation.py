"""Activation checkpointing applied from outside: chosen blocks are recomputed in the backward pass.

``selective`` keeps what attention gave: of a block's operations, the one whose cost grows with the square of the tokens
while its output grows with their number.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ltd.config import ConfigError
from ltd.parallel.config import ParallelConfig

logger = logging.getLogger(__name__)

#: Operations that give an attention output, by dispatcher name: flash-attn registers its own when it is imported.
#: Not here: torch's fallback for odd inputs (a softmax between two products), flash-attn 4 (no operation at all).
ATTENTION_OPERATIONS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
    }
)


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
    options = {"context_fn": _attention_contexts} if config.activation_checkpointing == "selective" else {}
    for block in chosen:
        block.forward = functools.partial(_recomputed, model, block.forward, options)
    return len(chosen)


def _recomputed(
    model: nn.Module, forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # The recomputation may run after another forward pass: what sequence parallelism knows of this one goes with it.
    pin = getattr(getattr(model, "shard_tokens", None), "pin", None)
    if pin:
        forward = pin(forward)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options, **kwargs)


def _attention_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Make the contexts of one forward pass and its recomputation; they share what attention gave."""
    if torch.compiler.is_compiling():  # there a block is traced once, and marks in its graph say what is kept
        contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
        contexts = create_selective_checkpoint_contexts(_policy)
        return contexts
    kept: deque[Any] = deque()
    return _Keep(kept), _GiveBack(kept)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation.name() in ATTENTION_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# torch's own pair of modes demands that a recomputation repeats every operation of its forward pass. ZeRO-3 gathers
# weights inside the blocks, and not the same ones at the same place twice: these two look at attention alone.


class _Keep(TorchDispatchMode):
    """Keep the outputs of attention in a forward pass."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self.kept and error[0] is None:
            _warn_nothing_kept()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.name() in ATTENTION_OPERATIONS:
            # Detached: what is returned becomes part of the graph, which must not be kept alive by what it keeps.
            self.kept.append(tree_map_only(Tensor, Tensor.detach, outputs))
        return outputs


class _GiveBack(TorchDispatchMode):
    """Give the kept outputs in the recomputation, in their order; a second one (``retain_graph``) attends again."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.kept and func.name() in ATTENTION_OPERATIONS:
            return self.kept.popleft()
        return func(*args, **(kwargs or {}))


@functools.cache
def _warn_nothing_kept() -> None:
    logger.warning(
        "parallel.activation_checkpointing=selective found no attention output that it can keep (flash-attn 4 and "
        "torch's fallback for odd inputs are no single operation): blocks are recomputed whole, right but slower; "
        "full costs less"
    )
