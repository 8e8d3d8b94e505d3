"""What lies between encoder and decoder: a Gaussian posterior, or codes. Knows no architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ltd.autoencoders.latents import LOGVAR_RANGE, Posterior
from ltd.autoencoders.quantizers import Fsq, FsqConfig, Quantized, Vq, VqConfig
from ltd.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class KlConfig:
    """A diagonal Gaussian, held near the standard normal by the loss's ``kl_weight``."""

    kind: Literal["kl"] = "kl"


BottleneckConfig: TypeAlias = KlConfig | FsqConfig | VqConfig


@dataclass(frozen=True)
class QuantizedPosterior(Posterior):
    """Codes as latents: nothing to draw, no divergence, and a commitment loss in its place."""

    indices: Tensor
    """Code of every cell, int64 ``(b, t, h, w)``."""
    losses: Tensor
    """Commitment loss per sample, ``(b,)`` fp32."""

    def sample(self, noise: Tensor) -> Tensor:
        """Give the codes: they have no spread."""
        return self.mean

    def kl(self) -> Tensor:
        """Give zeros ``(b,)``: codes have no density."""
        return torch.zeros_like(self.losses)


def build_bottleneck(config: BottleneckConfig, latent_channels: int) -> Fsq | Vq | None:
    """Build the quantiser that a configuration names; None for a Gaussian, which has no module.

    Args:
        config: The bottleneck.
        latent_channels: Channels of one latent cell.

    Returns:
        The quantiser, or None.

    Raises:
        ConfigError: If FSQ has not one level per channel.
    """
    match config:
        case KlConfig():
            return None
        case FsqConfig():
            if len(config.levels) != latent_channels:
                raise ConfigError(
                    f"bottleneck.levels: got {len(config.levels)}, needed one per channel; latent_channels is "
                    f"{latent_channels}"
                )
            return Fsq(config)
        case VqConfig():
            return Vq(config, latent_channels)


def num_moments(config: BottleneckConfig, latent_channels: int) -> int:
    """Count the channels that an encoder must give: mean and log-variance, or the latent alone."""
    return 2 * latent_channels if isinstance(config, KlConfig) else latent_channels


def quantize(module: Fsq | Vq, z: Tensor, draws: Tensor | None, weight: Tensor | None) -> QuantizedPosterior:
    """Quantise what an encoder gave.

    Args:
        module: The quantiser.
        z: ``(b, c, t, h, w)``.
        draws: Global sample numbers ``(b,)``; given in training, where a codebook collects what it learns from.
        weight: Weight of each sample ``(b,)``; those of weight 0 teach nothing.

    Returns:
        Codes, with the gradient passed on to ``z``.
    """
    found: Quantized = module(z, draws, weight=weight) if isinstance(module, Vq) else module(z)
    logvar = torch.full_like(found.latents, LOGVAR_RANGE[0])
    return QuantizedPosterior(found.latents, logvar, found.indices, found.losses)
