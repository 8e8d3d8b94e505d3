"""What the training loop may ask of an engine, whichever one runs: the contract both implementations are tested for.

Gradients are the plain SUM over processes and over the backward calls of one step; the caller divides its loss by the
global weight. No engine scales anything in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.storage import Fill, Reader, Slice

if TYPE_CHECKING:
    from ltd.parallel.frozen import FrozenWeights


class DiscardedStepError(RuntimeError):
    """The summed gradient is not finite or above the limit; raised on every process before any weight changed.

    Args:
        norm: Global gradient norm before clipping.
        limit: Largest norm that was allowed.
    """

    def __init__(self, norm: float, limit: float) -> None:
        super().__init__(
            f"the summed gradient's norm is {norm:g}, allowed is {limit:g}; the step was discarded on all processes"
        )
        self.norm = norm


class ProcessLostError(RuntimeError):
    """Another process of the run died or no longer answers; says which, and what it was doing."""


@dataclass(frozen=True)
class MasterShard:
    """This process's part of one trainable tensor: fp32 master weights and optimizer state, as views, never copies.

    ``data`` and every tensor of ``state`` hold elements ``[start, start + data.numel())`` of the flattened tensor
    ``name``. They are flat, or the whole tensor in its own memory format.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor
    state: dict[str, Tensor]
    #: Whether this process is the one that writes it; False for replicas.
    owner: bool

    def slices(self) -> list[Slice]:
        """List the slices that a checkpoint stores of this shard: ``master`` and one group per state tensor."""
        groups = {"master": self.data, **self.state}
        return [Slice(key, self.name, self.shape, self.start, flat(value)) for key, value in groups.items()]


class Engine(Protocol):
    """A module that is trained, on one process or on many."""

    #: The module; its parameters may be sharded, in bf16, or both.
    module: nn.Module
    #: Optimizer steps that were applied so far.
    applied_steps: int
    #: Exact values of its frozen parameters, where the module holds rounded ones.
    frozen: FrozenWeights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss; called ``num_backwards`` times per step."""

    def step(self, lr: float, *, limit: float = math.inf) -> float:
        """Clip, update the weights with this learning rate, clear the gradients.

        A norm that is not finite or above the limit raises ``DiscardedStepError`` on all processes, with the weights
        unchanged and the gradients cleared.

        Args:
            lr: Learning rate of this step, for every parameter.
            limit: Largest norm before clipping.

        Returns:
            Global L2 norm of the summed gradient before clipping, the same on all processes.
        """

    def discard(self) -> None:
        """Clear the gradients of the step without an update; called by all processes in place of ``step``."""

    def master_shards(self) -> list[MasterShard]:
        """List this process's shards, in the same order at every call; their tensors stay valid for the run."""

    def refresh_weights(self) -> None:
        """Make the forward weights what the fp32 masters say; called by all processes after masters were written."""

    def load_shards(self, reader: Reader, step: int) -> None:
        """Restore masters, optimizer state and counters.

        Args:
            reader: Checkpoint of any layout.
            step: Optimizer steps that were applied when it was written.
        """

    def gradients(self) -> dict[str, Tensor]:
        """Gather the full summed fp32 gradients between the last backward and ``step``; for tests and replay."""

    def copy_weights(self, target: nn.Module) -> None:
        """Copy the whole forward weights into a plain module of the same parameters; called by all processes."""

    def resolved_config(self) -> dict[str, Any]:
        """Describe the engine as plain values, with everything that was derived; saved as ``deepspeed.json``."""


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy every parameter into the one of the same name in another module."""
    given = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(given[name])


def flat(tensor: Tensor) -> Tensor:
    """View a tensor as flat in logical order; copies only where its memory format forbids a view."""
    return tensor.detach().reshape(-1)


def decay_groups(module: nn.Module) -> dict[str, list[str]]:
    """Split the trainable parameters by weight decay.

    Args:
        module: Asked first for its own ``decay_groups()``; otherwise tensors of two or more axes decay.

    Returns:
        ``{"decay": names, "no_decay": names}``, in the module's order.

    Raises:
        ConfigError: If the module's own groups miss a trainable parameter or name one twice.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    own = getattr(module, "decay_groups", None)
    if own is None:
        decay = [name for name, parameter in trainable.items() if len(full_shape(parameter)) >= 2]
        return {"decay": decay, "no_decay": [name for name in trainable if name not in set(decay)]}
    named: dict[str, list[str]] = own()
    groups = {key: [name for name in named[key] if name in trainable] for key in ("decay", "no_decay")}
    listed = groups["decay"] + groups["no_decay"]
    wrong = sorted(set(trainable) - set(listed)) or sorted({name for name in listed if listed.count(name) > 1})
    if wrong:
        raise ConfigError(f"{type(module).__name__}.decay_groups(): {wrong[0]!r} must be in exactly one group")
    return groups


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Look up the shape of a parameter, also where ZeRO-3 took its data away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def restore_shards(shards: Iterable[MasterShard], reader: Reader) -> None:
    """Read masters and optimizer state of a checkpoint into shards.

    Args:
        shards: Shards whose state tensors exist already.
        reader: Checkpoint; state that it lacks (another kind of optimizer wrote it) is an error.

    Raises:
        ConfigError: If the checkpoint was written with another kind of optimizer.
    """
    stored = reader.groups()
    fills: list[Fill] = []
    for shard in shards:
        for key, tensor in {"master": shard.data, **shard.state}.items():
            if key not in stored:
                held = ", ".join(sorted(stored))
                raise ConfigError(
                    f"optim.kind: the checkpoint {reader.directory} has no {key!r} state; it holds {held}"
                )
            fills.append(Fill(key, shard.name, shard.start, tensor))
    reader.fill(fills)
