"""Training loss of an autoencoder: reconstruction, what the bottleneck costs, perceptual and high-frequency terms.

Every term is one fp32 number per sample; weighting samples and averaging over the global batch is the caller's. The
perceptual network arrives as a callable; this module knows none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ltd.autoencoders.bottleneck import QuantizedPosterior
from ltd.autoencoders.latents import Posterior
from ltd.autoencoders.wavelet import high_frequency_loss
from ltd.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    """Terms of the autoencoder's loss and their weights; a weight of 0 leaves a term out."""

    #: Pixel term, averaged over a sample's values: |d|, d^2, or sqrt(d^2 + epsilon^2) of the difference d.
    reconstruction: Literal["l1", "l2", "charbonnier"] = "l1"
    #: Rounding of the charbonnier term near zero, in [-1, 1] units; positive.
    epsilon: float = 1e-2
    #: Weight of the divergence, which is summed over a sample's latents and divided by the number of its pixel values.
    kl_weight: float = 1e-6
    #: Weight of the perceptual distance; needs a perceptual network.
    perceptual_weight: float = 0.0
    #: Weight of the L1 distance of the high-frequency wavelet bands.
    high_frequency_weight: float = 0.0
    #: How often frames are halved for them; 2^levels divides height and width.
    high_frequency_levels: int = 1
    #: Weight of a quantiser's commitment loss, beside its own ``bottleneck.commitment``.
    commitment_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise ConfigError(f"epsilon: got {self.epsilon}, needed more than 0")
        if self.high_frequency_levels < 1:
            raise ConfigError(f"high_frequency_levels: got {self.high_frequency_levels}, needed 1 or more")
        for name in ("kl_weight", "perceptual_weight", "high_frequency_weight", "commitment_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 0 or more")


class AutoencoderLoss:
    """Loss of a reconstruction, per sample and in fp32.

    Args:
        config: Terms and weights.
        perceptual: Maps two videos ``(b, c, t, h, w)`` in [-1, 1] to a distance per sample ``(b,)``.

    Raises:
        ConfigError: If a perceptual weight is set and no network is given.
    """

    def __init__(self, config: AutoencoderLossConfig, perceptual: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        if config.perceptual_weight and perceptual is None:
            raise ConfigError(
                f"perceptual_weight: got {config.perceptual_weight} and no perceptual network, needed one, or weight 0"
            )
        self.config = config
        self.perceptual = perceptual

    def __call__(self, reconstruction: Tensor, video: Tensor, posterior: Posterior) -> dict[str, Tensor]:
        """Compute the terms and their weighted sum.

        Args:
            reconstruction: ``(b, c, t, h, w)``, any float dtype.
            video: ``(b, c, t, h, w)`` in [-1, 1].
            posterior: Posterior the reconstruction was decoded from.

        Returns:
            ``(b,)`` fp32 values: the reconstruction term under its name, "kl" or "commitment", "perceptual" and
            "high_frequency" where they have a weight; weighted sums of the terms that compare pixels, "pixels", and of
            all, "total".

        Reference: Rombach et al. (2021), arXiv 2112.10752, App. G (KL-regularised autoencoder).
        """
        config = self.config
        reconstruction, video = reconstruction.float(), video.float()
        pixel = self._pixel(reconstruction - video).flatten(1).mean(1)
        terms: dict[str, Tensor] = {config.reconstruction: pixel}
        compared = pixel
        if config.perceptual_weight and self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, video).float()
            compared = compared + config.perceptual_weight * terms["perceptual"]
        if config.high_frequency_weight:
            levels = config.high_frequency_levels
            terms["high_frequency"] = high_frequency_loss(reconstruction, video, levels=levels, kind="l1")
            compared = compared + config.high_frequency_weight * terms["high_frequency"]
        if isinstance(posterior, QuantizedPosterior):
            terms["commitment"] = posterior.losses.float()
            total = compared + config.commitment_weight * terms["commitment"]
        else:
            terms["kl"] = posterior.kl().float() / video[0].numel()
            total = compared + config.kl_weight * terms["kl"]
        return {**terms, "pixels": compared, "total": total}

    def _pixel(self, difference: Tensor) -> Tensor:
        match self.config.reconstruction:
            case "l1":
                return difference.abs()
            case "l2":
                return difference.square()
            case "charbonnier":
                return torch.sqrt(difference.square() + self.config.epsilon**2)
