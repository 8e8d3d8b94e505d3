"""Haar wavelets of videos, and losses on their sub-bands.

The transform keeps energy and has an exact inverse: coefficients of an error split the error itself, nothing is counted
twice. Nothing is cropped or padded away: sizes that do not halve at every level are refused. Knows nothing of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ltd.autoencoders.blocks import haar_rotation
from ltd.nn.causal_conv import Factors, depth_to_space, space_to_depth
from ltd.shapes import Compression, VideoShape


@dataclass(frozen=True)
class Subbands:
    """Haar coefficients of videos, several levels deep."""

    #: What every level has left over: ``(b, c, t', h / 2**levels, w / 2**levels)``.
    low: Tensor
    #: One ``(b, c, n, t', h', w')`` per level, the finest first. Along ``n`` stand the level's n = 3 bands over (h, w):
    #: LH (high along w), HL (high along h), HH; with time n = 7, those three low along t, then the four high along t.
    high: tuple[Tensor, ...]


def haar_forward(video: Tensor, *, levels: int = 1, time: bool = False) -> Subbands:
    """Transform videos by the orthonormal Haar wavelet; the sum of squares is kept.

    Over time the first frame stands alone, as in the autoencoders (see ``ltd.nn.causal_conv``): its coefficients high
    along time are zero, and of an image the others are those of the transform without time.

    Args:
        video: ``(b, c, t, h, w)``; dtype is kept.
        levels: How often the low band is split again, 1 or more.
        time: Whether frames are split as well: three dimensions instead of two.

    Returns:
        The coefficients.

    Raises:
        ValueError: If a size does not fit: h and w divide by ``2**levels``, with time t is ``1 + k * 2**levels``.

    Reference: Mallat (1989), "A theory for multiresolution signal decomposition"; Haar filters (1, 1) and (1, -1) over
    the square root of 2.
    """
    if levels < 1:
        raise ValueError(f"levels: got {levels}, needed 1 or more")
    if video.ndim != 5:
        raise ValueError(f"video: got shape {tuple(video.shape)}, needed (b, c, t, h, w)")
    size = 2**levels
    Compression(size if time else 1, size, size).latent(VideoShape(*video.shape[2:]))
    factors, rotation = _block(time, video)
    low, high = video, []
    for _ in range(levels):
        folded = space_to_depth(low, factors)
        bands = folded.unflatten(1, (video.shape[1], -1)).movedim(2, -1) @ rotation.T  # (b, c, t', h', w', n)
        bands = _scale_first(bands.movedim(-1, 2), 1 / math.sqrt(factors[0]))  # (b, c, n, t', h', w')
        low = bands[:, :, 0]
        high.append(bands[:, :, 1:])
    return Subbands(low, tuple(high))


def haar_inverse(subbands: Subbands) -> Tensor:
    """Rebuild the videos from their coefficients: the inverse of ``haar_forward``.

    Args:
        subbands: Coefficients.

    Returns:
        ``(b, c, t, h, w)``.
    """
    low = subbands.low
    factors, rotation = _block(subbands.high[0].shape[2] == 7, low)
    for high in reversed(subbands.high):
        bands = _scale_first(torch.cat([low[:, :, None], high], dim=2), math.sqrt(factors[0]))
        folded = (bands.movedim(2, -1) @ rotation).movedim(-1, 2)  # the inverse of a rotation is its transpose
        low = depth_to_space(folded.flatten(1, 2), factors)
    return low


def subband_losses(
    reconstruction: Tensor,
    video: Tensor,
    *,
    levels: int = 1,
    kind: Literal["l1", "l2", "charbonnier"] = "l1",
    epsilon: float = 1e-2,
    time: bool = False,
) -> dict[str, Tensor]:
    """Compare two videos in the low and in the high sub-bands, apart.

    A term sums |d|, d^2 or ``sqrt(d^2 + epsilon^2) - epsilon`` over its coefficients of the difference and divides by
    the number of the sample's *pixel* values, so that "low" + "high" of ``l2`` is the mean squared error, and a term is
    0 only for equal bands.

    Args:
        reconstruction: ``(b, c, t, h, w)``, any float dtype.
        video: ``(b, c, t, h, w)`` in [-1, 1].
        levels: How often the low band is split again.
        kind: What a coefficient d of the difference costs.
        epsilon: Rounding of the charbonnier term near zero, positive.
        time: Whether frames are split as well.

    Returns:
        ``(b,)`` fp32 values "low" and "high".

    Raises:
        ValueError: If the shapes differ, or a size does not fit (see ``haar_forward``).

    Reference: after Sadat et al., LiteVAE (2024), arXiv 2405.14477 (high-frequency losses), and the separate treatment
    of low and high bands in frequency-aware autoencoders; norms and reductions are our own.
    """
    if reconstruction.shape != video.shape:
        raise ValueError(f"reconstruction: got shape {tuple(reconstruction.shape)}, needed {tuple(video.shape)}")
    if kind == "charbonnier" and epsilon <= 0:
        raise ValueError(f"epsilon: got {epsilon}, needed more than 0")
    subbands = haar_forward(reconstruction.float() - video.float(), levels=levels, time=time)  # linear: one is enough
    values = video[0].numel()
    low = _cost(subbands.low, kind, epsilon)
    high = torch.stack([_cost(band, kind, epsilon) for band in subbands.high]).sum(0)
    return {"low": low / values, "high": high / values}


def high_frequency_loss(
    reconstruction: Tensor,
    video: Tensor,
    *,
    levels: int = 1,
    kind: Literal["l1", "l2", "charbonnier"] = "l1",
    epsilon: float = 1e-2,
    time: bool = False,
) -> Tensor:
    """Compare two videos in the high sub-bands only: the term "high" of ``subband_losses``.

    Args:
        reconstruction: ``(b, c, t, h, w)``, any float dtype.
        video: ``(b, c, t, h, w)`` in [-1, 1].
        levels: How often the low band is split again; each level adds its high bands.
        kind: What a coefficient of the difference costs.
        epsilon: Rounding of the charbonnier term near zero, positive.
        time: Whether frames are split as well.

    Returns:
        ``(b,)`` fp32.

    Raises:
        ValueError: If the shapes differ, or a size does not fit (see ``haar_forward``).
    """
    losses = subband_losses(reconstruction, video, levels=levels, kind=kind, epsilon=epsilon, time=time)
    return losses["high"]


def _block(time: bool, like: Tensor) -> tuple[Factors, Tensor]:
    """Give the block of one level and its rotation; entries are +-1/sqrt(n), exact to the dtype of ``like``."""
    factors: Factors = (2 if time else 1, 2, 2)
    return factors, haar_rotation(factors).sign().to(like) / math.sqrt(math.prod(factors))


def _scale_first(bands: Tensor, factor: float) -> Tensor:
    """Scale the first frame of ``(b, c, n, t, h, w)``: it stands twice in its block, with twice its energy."""
    if factor == 1:
        return bands
    return torch.cat([bands[:, :, :, :1] * factor, bands[:, :, :, 1:]], dim=3)


def _cost(difference: Tensor, kind: str, epsilon: float) -> Tensor:
    match kind:
        case "l1":
            values = difference.abs()
        case "l2":
            values = difference.square()
        case "charbonnier":
            values = torch.sqrt(difference.square() + epsilon**2) - epsilon
        case _:
            raise ValueError(f"kind: got {kind!r}, needed l1, l2 or charbonnier")
    return values.flatten(1).sum(1)
