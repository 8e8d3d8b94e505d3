"""Models of diffusers with every weight redrawn, so that no part of them is at its start."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def redrawn(
    kind: str, settings: Mapping[str, Any], seed: int, scale: Callable[[str, Tensor], tuple[float, float]]
) -> nn.Module:
    """Build a model of theirs with every weight redrawn, zero-initialised ones too.

    Args:
        kind: Class of diffusers.
        settings: Of its constructor.
        seed: Of the weights.
        scale: Says of a parameter, by its name and value, which mean and deviation it is drawn with.

    Returns:
        The model, in evaluation mode.
    """
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = getattr(diffusers, kind)(**settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            mean, std = scale(name, value)
            value.copy_(mean + std * torch.randn(value.shape, generator=generator))
    return model.eval()
