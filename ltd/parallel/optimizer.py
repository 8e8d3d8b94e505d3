"""Torch optimizers as the engines use them: two groups (decayed or not), and state that can be made before a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ltd.parallel.config import OptimizerSettings


def build_optimizer(
    parameters: Mapping[str, Tensor], groups: Mapping[str, list[str]], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Make the optimizer over named tensors; empty groups are left out.

    Args:
        parameters: Tensors to optimize by name, all of one device.
        groups: ``{"decay": names, "no_decay": names}``.
        settings: Kind and constants.

    Returns:
        A torch optimizer with learning rate 0, to be set before every step.
    """
    decays = {"decay": settings.weight_decay, "no_decay": 0.0}
    param_groups: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in groups[key]], "weight_decay": decay}
        for key, decay in decays.items()
        if groups[key]
    ]
    match settings.kind:
        case "adamw":
            return torch.optim.AdamW(param_groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)
        case "sgd":
            return torch.optim.SGD(param_groups, lr=0.0, fused=True)


def ensure_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """Make the state of one optimized tensor as its first step would, without taking that step.

    Args:
        optimizer: AdamW or SGD from ``build_optimizer``.
        tensor: One of the tensors it steps over.

    Returns:
        The state tensors that have the tensor's shape, by name; empty for SGD.
    """
    state = optimizer.state[tensor]
    if isinstance(optimizer, torch.optim.AdamW) and not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == tensor.shape}


def set_step(optimizer: torch.optim.Optimizer, tensor: Tensor, step: int) -> None:
    """Set the step counter that AdamW's bias correction reads; SGD has none."""
    if "step" in optimizer.state[tensor]:
        optimizer.state[tensor]["step"].fill_(float(step))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(tensors: Iterable[Tensor], clip: float | None) -> float:
    """Scale whole gradients down to a global norm, in place; a norm that is not finite leaves them as they are.

    Args:
        tensors: Tensors with ``grad``; those without are left out.
        clip: Largest norm; None never clips.

    Returns:
        Global L2 norm before clipping.
    """
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
    if clip is not None and clip < norm < float("inf"):
        torch._foreach_mul_(gradients, clip / (norm + 1e-6))
    return norm


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters that take gradients, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
