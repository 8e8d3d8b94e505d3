"""Normalisation of tokens and of video features.

Every norm here looks at one token, one pixel or one frame at a time, so it never mixes frames and is safe in causal and
streamed models. Statistics are accumulated in fp32 whatever the input's dtype; the output keeps it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.nn.seams import SumStrips


class RMSNorm(nn.Module):
    """Divide the last dimension by its root mean square and scale it per channel.

    Reference: Zhang and Sennrich (2019), arXiv 1910.07467, Eq. 4.

    Args:
        dim: Size of the last dimension.
        eps: Added to the mean square, so that an all-zero vector stays zero.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(..., dim)``; shape and dtype are kept."""
        # The kernel accumulates half-precision inputs in fp32 (held by a test); the weight follows the input's dtype.
        return F.rms_norm(x, (self.dim,), self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        """Name the size and the epsilon."""
        return f"{self.dim}, eps={self.eps}"


class ChannelRMSNorm(RMSNorm):
    """RMSNorm over the channels of ``(b, c, t, h, w)``, separately at every pixel of every frame."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(b, c, t, h, w)`` over ``c``; free of copies when ``x`` is channels-last in memory."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm of each frame by itself, so that no frame sees another.

    Args:
        num_groups: Groups of channels.
        num_channels: Channels.
        eps: Added to the variance.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(num_groups, num_channels, eps)
        self.sum_strips: SumStrips | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise groups of channels over each frame of ``(b, c, t, h, w)``, or over an image ``(b, c, h, w)``."""
        if x.ndim == 4:
            return super().forward(x)
        if self.sum_strips is not None:
            return self._over_strips(x, self.sum_strips)
        b = x.shape[0]
        frames = x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)
        normed = super().forward(frames)
        return normed.permute(0, 2, 3, 1).unflatten(0, (b, -1)).permute(0, 4, 1, 2, 3)

    def _over_strips(self, x: Tensor, total: SumStrips) -> Tensor:
        """Normalise a strip of each frame by the statistics of all strips."""
        grouped = x.unflatten(1, (self.num_groups, -1))  # b g c t h w
        grouped = grouped if grouped.dtype == torch.float64 else grouped.float()
        count = total(grouped.new_tensor([float(grouped[:, 0, :, 0].numel() // x.shape[0])]))
        mean = total(grouped.sum((2, 4, 5), keepdim=True)) / count
        centred = grouped - mean
        variance = total(centred.square().sum((2, 4, 5), keepdim=True)) / count
        normed = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)
        scale, shift = (p.to(normed.dtype)[:, None, None, None] for p in (self.weight, self.bias))
        return (normed * scale + shift).to(x.dtype)
