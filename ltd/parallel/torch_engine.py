"""The single-process engine: plain torch, no process group, no DeepSpeed. Same contract as the other one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ltd.parallel.config import OptimizerSettings, ParallelConfig
from ltd.parallel.frozen import FrozenWeights
from ltd.parallel.interface import DiscardedStepError, MasterShard, copy_parameters, decay_groups, restore_shards
from ltd.parallel.optimizer import (
    build_optimizer,
    clip_gradients,
    ensure_state,
    set_lr,
    set_step,
    trainable_parameters,
)
from ltd.storage import Reader


class TorchEngine:
    """Train a module on one device.

    In bf16 the module's parameters become bf16 in place and fp32 master weights are kept beside them; gradients of each
    backward call are added up in fp32. Buffers keep their dtype, and every tensor its memory format.

    Args:
        module: Module with fp32 parameters, already on its device.
        config: Precision is read.
        optim: Optimizer settings.
    """

    def __init__(self, module: nn.Module, *, config: ParallelConfig, optim: OptimizerSettings) -> None:
        self.module = module
        self.applied_steps = 0
        self._config = config
        self._optim = optim
        self._parameters = trainable_parameters(module)
        self._mixed = config.precision == "bf16"
        self.frozen = FrozenWeights(module, config)
        self._masters: dict[str, Tensor] = dict(self._parameters)
        if self._mixed:
            self._masters = {name: value.detach().float().clone() for name, value in self._parameters.items()}
            for parameter in module.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        self._optimizer = build_optimizer(self._masters, decay_groups(module), optim)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss."""
        loss.backward()
        if self._mixed:
            self._collect_gradients()

    def step(self, lr: float, *, limit: float = math.inf) -> float:
        """Clip, update the weights and clear the gradients.

        Args:
            lr: Learning rate of this step.
            limit: Largest norm before clipping.

        Returns:
            Global gradient norm before clipping.

        Raises:
            DiscardedStepError: If it is not finite or above the limit; the weights are unchanged.
        """
        self._filled_gradients()
        norm = clip_gradients(self._masters.values(), self._optim.grad_clip)
        try:
            if not math.isfinite(norm) or norm > limit:
                raise DiscardedStepError(norm, limit)
            set_lr(self._optimizer, lr)
            self._optimizer.step()
            self.applied_steps += 1
            if self._mixed:
                self.refresh_weights()
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        return norm

    def discard(self) -> None:
        """Clear the gradients of the step without an update."""
        self._optimizer.zero_grad(set_to_none=True)

    def master_shards(self) -> list[MasterShard]:
        """List every trainable tensor, whole."""
        return [
            MasterShard(name, tuple(value.shape), 0, value.detach(), ensure_state(self._optimizer, value), True)
            for name, value in self._masters.items()
        ]

    def refresh_weights(self) -> None:
        """Round the masters into the bf16 weights; nothing to do in fp32, where they are the same tensors."""
        if self._mixed:
            with torch.no_grad():
                targets = [parameter.data for parameter in self._parameters.values()]
                torch._foreach_copy_(targets, list(self._masters.values()))

    def load_shards(self, reader: Reader, step: int) -> None:
        """Restore masters, moments and step counters from a checkpoint of any layout.

        Args:
            reader: The checkpoint.
            step: Optimizer steps that were applied when it was written.
        """
        restore_shards(self.master_shards(), reader)
        for value in self._masters.values():
            set_step(self._optimizer, value, step)
        self.applied_steps = step
        self.refresh_weights()

    def gradients(self) -> dict[str, Tensor]:
        """Copy the summed fp32 gradients."""
        names_and_gradients = zip(self._masters, self._filled_gradients(), strict=True)
        return {name: gradient.clone() for name, gradient in names_and_gradients}

    def copy_weights(self, target: nn.Module) -> None:
        """Copy the forward weights into a plain module of the same parameters."""
        copy_parameters(self.module, target)

    def resolved_config(self) -> dict[str, Any]:
        """Describe the engine as plain values."""
        optim = dataclasses.asdict(self._optim)
        return {"engine": "torch", "precision": self._config.precision, "optimizer": {**optim, "fused": True}}

    def _collect_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            master = self._masters[name]
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def _filled_gradients(self) -> list[Tensor]:
        """List a gradient per master; a parameter that took no part in the loss has gradient zero, not none."""
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self._masters.values() if master.grad is not None]
