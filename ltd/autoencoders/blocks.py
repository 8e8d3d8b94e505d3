"""Building blocks of the convolutional autoencoders: residual blocks, resampling with shortcuts, and the front.

Every module is called as ``module(x, state) -> (x, state)`` on ``(b, c, t, h, w)`` (see ``ltd.nn.causal_conv``) and
sees no later frame than the one it writes. Knows nothing of bottlenecks, losses or training.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.nn.causal_conv import CausalConv3d, Factors, Padding, State, depth_to_space, is_first, run, space_to_depth
from ltd.nn.norm import ChannelRMSNorm


class NormActivation(nn.Module):
    """RMSNorm over channels at every pixel, then SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Normalise and activate ``(b, c, t, h, w)``; carries nothing from chunk to chunk."""
        return F.silu(self.norm(x)), state


class ResidualBlock(nn.Module):
    """Add two convolutions, each after norm and SiLU, to the input; the identity at initialisation.

    Args:
        channels: Channels of input and output.
        hidden: Channels between the two convolutions.
        kernels: Kernel sizes of the two convolutions along (t, h, w).
        padding: What lies outside a frame.
    """

    def __init__(self, channels: int, hidden: int, kernels: tuple[Factors, Factors], padding: Padding) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            [
                NormActivation(channels),
                CausalConv3d(channels, hidden, kernels[0], padding=padding),
                NormActivation(hidden),
                CausalConv3d(hidden, channels, kernels[1], padding=padding),
            ]
        )
        zero_init(self.body[-1])

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Refine ``(b, channels, t, h, w)``; shape is kept."""
        update, state = run(self.body, x, state)
        return x + update, state


class Downsample(nn.Module):
    """Divide the grid by ``factors`` with a strided convolution, beside an average of channel groups.

    Reference: Ma et al., Step-Video-T2V (2025), arXiv 2502.10248, Sec. 4.1 (dual-path resampling).

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output; divides ``channels * prod(factors)`` if ``shortcut``.
        factors: Reduction along (t, h, w).
        shortcut: Whether the parameter-free path is added.
    """

    def __init__(self, channels: int, out_channels: int, factors: Factors, *, shortcut: bool) -> None:
        super().__init__()
        self.factors = factors
        self.group = channels * math.prod(factors) // out_channels if shortcut else 0
        self.conv = CausalConv3d(channels, out_channels, kernel=factors, stride=factors)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Map ``(b, channels, t, h, w)`` to ``(b, out_channels, t', h / fh, w / fw)``."""
        y, after = self.conv(x, state)
        if self.group:
            folded = space_to_depth(x, self.factors, first=is_first(state))
            y = y + folded.movedim(1, -1).unflatten(-1, (-1, self.group)).mean(-1).movedim(-1, 1)
        return y, after


class Upsample(nn.Module):
    """Multiply the grid by ``factors``: a pointwise convolution unfolded to space, beside repeated channels.

    Reference: Ma et al., Step-Video-T2V (2025), arXiv 2502.10248, Sec. 4.1 (dual-path resampling).

    Args:
        channels: Channels of the input; divides ``out_channels * prod(factors)`` if ``shortcut``.
        out_channels: Channels of the output.
        factors: Enlargement along (t, h, w).
        shortcut: Whether the parameter-free path is added.
    """

    def __init__(self, channels: int, out_channels: int, factors: Factors, *, shortcut: bool) -> None:
        super().__init__()
        self.factors = factors
        wide = out_channels * math.prod(factors)
        self.repeats = wide // channels if shortcut else 0
        self.conv = CausalConv3d(channels, wide, kernel=(1, 1, 1))

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Map ``(b, channels, t, h, w)`` to ``(b, out_channels, t', h * fh, w * fw)``."""
        y, after = self.conv(x, state)
        if self.repeats:
            y = y + x.repeat_interleave(self.repeats, dim=1)
        return depth_to_space(y, self.factors, first=is_first(state)), _started(state, after)


class Fold(nn.Module):
    """Fold pixels into channels, in front of the encoder; optionally rotated by ``rotation``."""

    def __init__(self, factors: Factors, rotation: Tensor | None = None) -> None:
        super().__init__()
        self.factors = factors
        self.register_buffer("rotation", rotation, persistent=False)
        self.rotation: Tensor | None

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Map ``(b, c, t, h, w)`` to ``(b, c * prod(factors), t', h / fh, w / fw)``."""
        folded = space_to_depth(x, self.factors, first=is_first(state))
        return _rotate(folded, self.rotation), _started(state, state)


class Unfold(nn.Module):
    """Unfold channels into pixels, behind the decoder: the inverse of ``Fold``."""

    def __init__(self, factors: Factors, rotation: Tensor | None = None) -> None:
        super().__init__()
        self.factors = factors
        self.register_buffer("rotation", None if rotation is None else rotation.T.contiguous(), persistent=False)
        self.rotation: Tensor | None

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Map ``(b, c * prod(factors), t, h, w)`` to ``(b, c, t', h * fh, w * fw)``."""
        rotated = _rotate(x, self.rotation)
        return depth_to_space(rotated, self.factors, first=is_first(state)), _started(state, state)


def haar_rotation(factors: Factors) -> Tensor:
    """Build the orthonormal Haar transform of one block of pixels.

    Args:
        factors: Block size along (t, h, w), each a power of two.

    Returns:
        ``(n, n)`` float32 with ``n = prod(factors)``; row 0 is the block's mean times ``sqrt(n)``.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for size in factors:
        matrix = torch.kron(matrix, _haar(size))
    return matrix.float()


def zero_init(conv: nn.Module) -> None:
    """Set a convolution's weight and bias to zero."""
    assert isinstance(conv, nn.Conv3d)
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _haar(size: int) -> Tensor:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = _haar(size // 2)
    coarse = torch.kron(half, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    fine = torch.kron(torch.eye(size // 2, dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    return torch.cat([coarse, fine]) / math.sqrt(2)


def _rotate(x: Tensor, rotation: Tensor | None) -> Tensor:
    if rotation is None:
        return x
    blocks = x.movedim(1, -1).unflatten(-1, (-1, rotation.shape[0]))
    return (blocks @ rotation.T.to(x.dtype)).flatten(-2).movedim(-1, 1)


def _started(state: State, after: State) -> State:
    # A module without frames of its own still has to tell later chunks that the first frame has passed.
    return after if state is None or not is_first(after) else (None,)
