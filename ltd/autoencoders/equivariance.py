"""Equivariance of latents under scaling and quarter turns: a transform of the latents, and the same of the pixels.

Trained so, an autoencoder decodes ``T E(x)`` to ``T x``. One step of training draws two transforms (at most one is not
the identity), and goes::

    video = transform_video(video, draw.input, compression)
    latents = transform_latents(encode(video), draw.latents)
    target = transform_video(video, draw.latents, compression)
    loss(decode(latents), target)

Of latents that are quantised, those in front of the quantiser are transformed. Knows nothing of models or losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ltd.config import ConfigError
from ltd.rng import generator
from ltd.shapes import Compression, VideoShape


@dataclass(frozen=True, kw_only=True)
class EquivarianceConfig:
    """How often and how latents are transformed in training."""

    #: Share of steps whose latents are transformed; 0 leaves every step plain but for ``downscale_share``.
    probability: float = 0.5
    #: Smallest and largest scale, in parts of ``scale_unit``; one of the whole numbers from the one to the other is
    #: drawn.
    scales: tuple[int, int] = (8, 31)
    #: Denominator of the scales.
    scale_unit: int = 32
    #: Whether transformed latents are also turned, by 90, 180 or 270 degrees.
    rotate: bool = True
    #: Whether height and width have scales of their own.
    anisotropic: bool = False
    #: Share of the other steps, whose latents are left alone, in which the *input* is scaled down.
    downscale_share: float = 0.25

    def __post_init__(self) -> None:
        for name in ("probability", "downscale_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed within [0, 1]")
        low, high = self.scales
        if not 1 <= low <= high <= self.scale_unit:
            raise ConfigError(f"scales: got {self.scales}, needed 1 <= low <= high <= scale_unit = {self.scale_unit}")


@dataclass(frozen=True)
class Transform:
    """Scale frames by bilinear interpolation, then turn them; the default is the identity."""

    #: Factors on height and width, in (0, 1].
    scale: tuple[float, float] = (1.0, 1.0)
    #: Turns by 90 degrees, from the axis of height towards that of width (``torch.rot90`` over (h, w)).
    quarter_turns: int = 0

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.scale == (1.0, 1.0) and self.quarter_turns % 4 == 0


@dataclass(frozen=True)
class EquivarianceDraw:
    """What one step does: at most one of the two is not the identity."""

    #: Applied to the latents, and to the video that is their target.
    latents: Transform = field(default_factory=Transform)
    #: Applied to the video before it is encoded.
    input: Transform = field(default_factory=Transform)


def draw_transforms(config: EquivarianceConfig, seed: int, step: int) -> EquivarianceDraw:
    """Draw the transforms of one step: the same on every process and in every micro-batch.

    Args:
        config: How often and how.
        seed: Seed of the run.
        step: Index of the optimizer step.

    Returns:
        The step's transforms. Transformed latents are always scaled and, if configured, always turned as well.

    Reference: Kouzelis et al. (2025), arXiv 2502.09509 (EQ-VAE).
    """
    random = generator(seed, step, "equivariance")
    # All numbers are drawn whatever comes of them: settings do not shift each other's draws.
    choice, downscale = torch.rand(2, generator=random, dtype=torch.float64).tolist()
    low, high = config.scales
    parts = torch.randint(low, high + 1, (2,), generator=random).tolist()
    turns = int(torch.randint(1, 4, (), generator=random))
    scale = (parts[0] / config.scale_unit, parts[1 if config.anisotropic else 0] / config.scale_unit)
    if choice < config.probability:
        return EquivarianceDraw(latents=Transform(scale, turns if config.rotate else 0))
    if downscale < config.downscale_share:
        return EquivarianceDraw(input=Transform(scale))
    return EquivarianceDraw()


def transform_latents(latents: Tensor, transform: Transform) -> Tensor:
    """Transform latents, all frames alike.

    Args:
        latents: ``(b, c, t, h, w)``; dtype is kept.
        transform: What to do; the identity gives the latents themselves.

    Returns:
        ``(b, c, t, h', w')``: sides times their scale, rounded half up and at least 1, swapped by an odd turn.
    """
    return _apply(latents, _scaled(latents.shape[3:], transform), transform)


def transform_video(video: Tensor, transform: Transform, compression: Compression) -> Tensor:
    """Transform a video as its latents are, all frames alike.

    Args:
        video: ``(b, c, t, h, w)``; h and w divide by the compression; dtype is kept.
        transform: What to do; the identity gives the video itself.
        compression: Pixels per latent cell.

    Returns:
        ``(b, c, t, h', w')``, exactly the transformed latents' size times the compression.

    Raises:
        ValueError: If a size does not divide, or an odd turn meets cells that are not square.
    """
    if transform.is_identity:
        return video
    if transform.quarter_turns % 2 and compression.h != compression.w:
        raise ValueError(
            f"quarter_turns: got {transform.quarter_turns} with a compression of {compression.h} x {compression.w}, "
            "needed square cells, or turns by 180 degrees"
        )
    height, width = video.shape[3:]
    cells = Compression(1, compression.h, compression.w).latent(VideoShape(1, height, width))
    rows, columns = _scaled((cells.height, cells.width), transform)
    return _apply(video, (rows * compression.h, columns * compression.w), transform)


@torch.no_grad()
def equivariance_error(
    encode: Callable[[Tensor], Tensor], video: Tensor, compression: Compression, transform: Transform
) -> Tensor:
    """Measure how far encoding and transforming are from commuting.

    Args:
        encode: Maps a video ``(b, c, t, h, w)`` to latents, without noise.
        video: ``(b, c, t, h, w)`` in [-1, 1].
        compression: Pixels per latent cell of ``encode``.
        transform: The transform T.

    Returns:
        ``(b,)`` fp32: ``||E(Tx) - T E(x)|| / ||E(x)||``, the norms over a sample's latents; 0 is equivariant.

    Raises:
        ValueError: If a size does not fit (see ``transform_video``), or the latents' size is not what the compression
            says.
    """
    latents = encode(video).float()
    moved = encode(transform_video(video, transform, compression)).float()
    expected = transform_latents(latents, transform)
    if moved.shape != expected.shape:
        raise ValueError(
            f"encode: gave {tuple(moved.shape)} for a transformed video, needed {tuple(expected.shape)} "
            f"by {compression}"
        )
    scale = latents.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return (moved - expected).flatten(1).norm(dim=1) / scale


def _scaled(size: tuple[int, ...] | torch.Size, transform: Transform) -> tuple[int, int]:
    """Scale a height and width in latent cells."""
    height, width = (max(1, int(side * scale + 0.5)) for side, scale in zip(size, transform.scale, strict=True))
    return height, width


def _apply(x: Tensor, size: tuple[int, int], transform: Transform) -> Tensor:
    if size != tuple(x.shape[3:]):
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
        x = rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])
    return torch.rot90(x, transform.quarter_turns, (3, 4)) if transform.quarter_turns % 4 else x
