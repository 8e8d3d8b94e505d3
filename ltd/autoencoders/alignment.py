"""Alignment of an autoencoder's latents with the features of a frozen vision network.

The network is a callable from videos to feature maps; this module knows none. Nothing of it is held by a module here,
so no checkpoint and no optimizer ever meets its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.rng import DrawRandom
from ltd.shapes import Compression

#: Maps frames ``(b, c, t, h, w)`` in [-1, 1] to feature maps ``(b, d, t, h', w')``, each frame by itself.
Teacher: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Weight and margins of the alignment of latents with a vision network's features."""

    #: Weight of both terms together.
    weight: float = 0.1
    #: How far cosines between two tokens may differ in latents and features before that costs; 2 or more is never.
    distance_margin: float = 0.25
    #: How far a token's cosine with its feature may stay below 1 before that costs; 2 or more is never.
    cosine_margin: float = 0.5
    #: Largest number of tokens of a sample that are compared, each with every other; a sample with more has as many
    #: drawn at random.
    max_tokens: int = 1024
    #: Which frames of a clip the network sees: of those that belong to one latent frame the middle one, or all.
    frames: Literal["middle", "all"] = "middle"
    #: Whether the weight is multiplied by the balance of gradients at the latents (``ltd.autoencoders.adversarial``).
    adaptive: bool = True

    def __post_init__(self) -> None:
        for name in ("weight", "distance_margin", "cosine_margin"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 0 or more")
        if self.max_tokens < 2:
            raise ConfigError(f"max_tokens: got {self.max_tokens}, needed 2 or more")


class LatentAlignment(nn.Module):
    """Compare projected latents with features, token by token and pair by pair.

    With z a token's projected latent and f its feature, the terms are the means over the sample's tokens and pairs:

    - "align_cosine": ``relu(1 - cosine_margin - cos(z_i, f_i))``,
    - "align_distance": ``relu(|cos(z_i, z_j) - cos(f_i, f_j)| - distance_margin)``.

    The projection is a linear map of each latent cell without bias, trained with the autoencoder and not needed after.
    Pairs lie within a sample, over all frames of a clip.

    Reference: Yao et al. (2025), arXiv 2501.01423 (VA-VAE, vision foundation model loss).

    Args:
        latent_channels: Channels of the latents.
        feature_channels: Channels of the features.
        config: Margins and the number of tokens; its weight is the caller's to apply.
    """

    def __init__(self, latent_channels: int, feature_channels: int, config: AlignmentConfig | None = None) -> None:
        super().__init__()
        self.config = config or AlignmentConfig()
        self.projection = nn.Linear(latent_channels, feature_channels, bias=False)

    def forward(
        self, latents: Tensor, features: Tensor, *, draws: Tensor | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Compute both terms.

        Args:
            latents: ``(b, latent_channels, t, h, w)``.
            features: ``(b, feature_channels, t', h', w')``, which get no gradient; brought to the latents' h and w by
                interpolation, and averaged over the frames of each latent frame (see ``features_per_latent``).
            draws: Global draw index of each sample, ``(b,)``; a sample's tokens are drawn from it. Only needed where a
                sample has more than ``config.max_tokens``.
            seed: Seed of the run.

        Returns:
            ``(b,)`` fp32 "align_cosine" and "align_distance", neither weighted.

        Raises:
            ValueError: If shapes do not fit each other, or draws are needed and missing.
        """
        self._check(latents, features)
        with torch.no_grad():
            features = features_per_latent(features.float(), latents.shape[2:])  # (b, d, t, h, w)
            target = rearrange(features, "b d t h w -> b (t h w) d")
        tokens = rearrange(latents, "b c t h w -> b (t h w) c")
        kept = self._choose(tokens, draws, seed)
        if kept is not None:
            tokens, target = (torch.take_along_dim(x, kept[:, :, None], dim=1) for x in (tokens, target))
        z = F.normalize(self.projection(tokens.to(self.projection.weight.dtype)).float(), dim=-1)  # (b, n, d)
        f = F.normalize(target, dim=-1)
        # Clamped, so that rounding takes no cosine beyond 1 and a margin of 2 is never passed.
        cosine = torch.relu(1 - self.config.cosine_margin - (z * f).sum(-1).clamp(-1, 1))  # (b, n)
        apart = ((z @ z.mT).clamp(-1, 1) - (f @ f.mT).clamp(-1, 1)).abs()  # (b, n, n)
        distance = torch.relu(apart - self.config.distance_margin)
        return {"align_cosine": cosine.mean(1), "align_distance": distance.mean((1, 2))}

    def _choose(self, tokens: Tensor, draws: Tensor | None, seed: int) -> Tensor | None:
        """Draw the tokens to compare, ``(b, max_tokens)`` indices; None takes all."""
        count = tokens.shape[1]
        if count <= self.config.max_tokens:
            return None
        if draws is None or len(draws) != tokens.shape[0]:
            got = "none" if draws is None else len(draws)
            raise ValueError(
                f"draws: got {got}, needed one per sample ({tokens.shape[0]}): {count} tokens are more than max_tokens "
                f"{self.config.max_tokens}, so that some are drawn"
            )
        priority = DrawRandom(seed, draws.tolist()).uniform((count,), "alignment")
        return priority.topk(self.config.max_tokens, dim=1).indices.sort(dim=1).values.to(tokens.device)

    def _check(self, latents: Tensor, features: Tensor) -> None:
        for name, x, channels in (
            ("latents", latents, self.projection.in_features),
            ("features", features, self.projection.out_features),
        ):
            if x.ndim != 5 or x.shape[1] != channels or x.shape[0] != latents.shape[0]:
                raise ValueError(
                    f"{name}: got shape {tuple(x.shape)}, needed ({latents.shape[0]}, {channels}, t, h, w)"
                )


def features_per_latent(features: Tensor, size: torch.Size | tuple[int, int, int]) -> Tensor:
    """Bring feature maps to the grid of latents.

    In time, latent frame 0 belongs to video frame 0 and latent frame j > 0 to the f frames ``1 + (j - 1) * f`` to
    ``j * f`` of a clip of ``1 + (t - 1) * f``, whose features are averaged; features that already come one per latent
    frame stay as they are. In space they are interpolated bilinearly, with antialiasing where they shrink.

    Args:
        features: ``(b, d, t', h', w')``, float.
        size: ``(t, h, w)`` of the latents.

    Returns:
        ``(b, d, t, h, w)``.

    Raises:
        ValueError: If ``t'`` is not ``1 + (t - 1) * f`` for any f.
    """
    frames, height, width = size
    b, d, got = features.shape[:3]
    factor, rest = divmod(got - 1, frames - 1) if frames > 1 else (1, got - 1)
    if rest or not factor:
        raise ValueError(f"features: got {got} frames, needed 1 + {frames - 1} * f for {frames} latent frames")
    if features.shape[3:] != (height, width):
        flat = rearrange(features, "b d t h w -> (b t) d h w")
        flat = F.interpolate(flat, (height, width), mode="bilinear", align_corners=False, antialias=True)
        features = rearrange(flat, "(b t) d h w -> b d t h w", b=b)
    if factor == 1:
        return features
    later = features[:, :, 1:].reshape(b, d, frames - 1, factor, height, width).mean(3)
    return torch.cat([features[:, :, :1], later], dim=2)


@torch.no_grad()
def teacher_features(
    teacher: Teacher, video: Tensor, time_compression: int, frames: Literal["middle", "all"] = "middle"
) -> Tensor:
    """Ask a frozen network for the features that belong to a clip's latents.

    Args:
        teacher: The network.
        video: ``(b, c, t, h, w)`` in [-1, 1], ``t = 1 + k * time_compression``.
        time_compression: Frames per latent frame, f.
        frames: "all", or "middle": frame 0, and of the f frames of each later latent frame the one at ``(f - 1) // 2``.

    Returns:
        ``(b, d, t', h', w')`` without gradient; ``t'`` is ``1 + k`` for "middle" and ``t`` for "all".

    Raises:
        ValueError: If the number of frames is off the rule, or the network does not give one map per frame.
    """
    Compression(time_compression, 1, 1).latent_frames(video.shape[2])  # refuses lengths off the rule
    if frames == "middle":
        later = video[:, :, 1 + (time_compression - 1) // 2 :: time_compression]
        video = torch.cat([video[:, :, :1], later], dim=2)
    features = teacher(video)
    if features.ndim != 5 or (features.shape[0], features.shape[2]) != (video.shape[0], video.shape[2]):
        raise ValueError(
            f"teacher: gave shape {tuple(features.shape)}, needed ({video.shape[0]}, d, {video.shape[2]}, h, w)"
        )
    return features
