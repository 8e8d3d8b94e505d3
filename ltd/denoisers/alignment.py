"""Alignment of a denoiser's tokens with the features of a frozen vision network (REPA): projector and loss.

The network that gives the features is not known here, and no module here holds it: no checkpoint and no optimizer ever
meets its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class DenoiserAlignmentConfig:
    """Which tokens of a denoiser are drawn towards features, and how strongly."""

    #: Tokens are taken behind so many blocks, counted from 1; blocks after it get no gradient of the term.
    block: int = 8
    #: Weight of the term beside the flow-matching loss; 0 builds nothing, as if there were no alignment.
    weight: float = 0.5
    #: Width of the projector's two hidden layers.
    hidden: int = 2048
    #: Which frames of a clip the network sees: of those that belong to one latent frame the middle one, or all.
    frames: Literal["middle", "all"] = "middle"

    def __post_init__(self) -> None:
        for name in ("block", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 1 or more")
        if not self.weight >= 0:
            raise ConfigError(f"weight: got {self.weight}, needed 0 or more")


class TokenProjector(nn.Module):
    """Map tokens to features: three linear layers with SiLU between; trained with the denoiser, not needed after.

    Reference: Yu et al. (2024), arXiv 2410.06940 (REPA).

    Args:
        width: Channels of a token.
        features: Channels of a feature.
        config: Block and hidden width.
    """

    def __init__(self, width: int, features: int, config: DenoiserAlignmentConfig) -> None:
        super().__init__()
        self.block = config.block
        self.input = nn.Linear(width, config.hidden)
        self.middle = nn.Linear(config.hidden, config.hidden)
        self.output = nn.Linear(config.hidden, features)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw every parameter: Xavier-uniform products, biases 0."""
        for layer in (self.input, self.middle, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(..., width)`` to ``(..., features)``."""
        out: Tensor = self.output(F.silu(self.middle(F.silu(self.input(tokens)))))
        return out


def alignment_loss(projected: Tensor, target: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Compute the mean negative cosine between projected tokens and features, of each sample.

    Args:
        projected: ``(b, n, d)``, or ``(1, n, d)`` of a pack: its samples one behind the other.
        target: Features of the same shape and token order, which get no gradient.
        lengths: Tokens of each sample of a pack; None where a row is a sample.

    Returns:
        ``(b,)`` fp32 in [-1, 1], -1 where every token points as its feature does; of a pack one per sample.

    Raises:
        ValueError: If the shapes differ, or the lengths are not of the tokens.
    """
    if projected.shape != target.shape:
        raise ValueError(
            f"features: got shape {tuple(target.shape)}, the projected tokens have {tuple(projected.shape)}"
        )
    # Clamped: rounding must not take a cosine beyond 1.
    cosine = F.cosine_similarity(projected.float(), target.detach().float(), dim=-1).clamp(-1, 1)  # b n
    if lengths is None:
        return -cosine.mean(1)
    if len(cosine) != 1 or sum(lengths) != cosine.shape[1]:
        raise ValueError(f"lengths: got {tuple(lengths)}, needed those of one row of {cosine.shape[1]} tokens")
    return -torch.stack([part.mean() for part in cosine[0].split(list(lengths))])
