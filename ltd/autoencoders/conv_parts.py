"""Parts of the convolutional VAE family: norms of one frame, residual blocks, per-frame attention, resampling.

Every part is called as ``part(x, state, guide) -> (x, state)`` on channels-last ``(b, c, t, h, w)`` and sees no later
frame than the one it writes; ``guide`` is the latent that a spatially conditional norm reads, already repeated to x's
frames. Without gradients, a norm writes frames that the next convolution reads and carries as they are, and resampling
into its output: the same numbers with fewer copies, in bf16 to its rounding. Knows nothing of bottlenecks, files
or training.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ltd.autoencoders.descent import split_state
from ltd.nn.bands import Frame, even_cuts, pixels_at_once
from ltd.nn.causal_conv import (
    CausalConv3d,
    Factors,
    Front,
    State,
    depth_to_space,
    is_first,
    space_to_depth,
)
from ltd.nn.norm import ChannelRMSNorm, FrameGroupNorm
from ltd.nn.seams import ExtendRows, gather_pixels

NormKind: TypeAlias = Literal["rms", "group"]
#: ``torch.nn.functional.normalize`` divides by max(|x|, 1e-12); under the root of a mean that is far below this.
_RMS_EPS = 1e-24
_GROUP_EPS = 1e-6
#: Pixels, over the batch, that a norm over single pixels takes at once on a CPU, without gradients.
NORM_PIXELS = 1 << 12


def build_norm(kind: NormKind, channels: int, num_groups: int) -> nn.Module:
    """Build a norm whose statistics never leave a frame.

    Args:
        kind: "rms" over the channels of a pixel, or "group" over groups of channels of a whole frame.
        channels: Channels.
        num_groups: Groups of "group".

    Returns:
        The norm, a map of ``(b, c, t, h, w)``.
    """
    match kind:
        case "rms":
            return ChannelRMSNorm(channels, eps=_RMS_EPS)
        case "group":
            return FrameGroupNorm(num_groups, channels, eps=_GROUP_EPS)


class ConditionalNorm(nn.Module):
    """Scale and shift a norm's output, pixel by pixel, by what pointwise convolutions make of the latent.

    Equal to the plain norm at initialisation.

    Reference: Zheng et al. (2022), arXiv 2209.09002 (MoVQ), Eq. 3 (spatially conditional normalisation).

    Args:
        norm: Norm of ``channels`` channels.
        channels: Channels that are normalised.
        guide_channels: Channels of the latent.
    """

    def __init__(self, norm: nn.Module, channels: int, guide_channels: int) -> None:
        super().__init__()
        self.norm = norm
        self.modulation = nn.Conv3d(guide_channels, 2 * channels, 1)
        with torch.no_grad():
            self.modulation.weight.zero_()
            assert self.modulation.bias is not None
            self.modulation.bias.zero_()
            self.modulation.bias[:channels] = 1.0

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """Normalise ``(b, c, t, h, w)``; ``guide`` is ``(b, g, t, h', w')`` with h' and w' no larger than h and w."""
        size = (x.shape[2], *x.shape[3:])
        # Pointwise maps and nearest-neighbour enlargement commute: the small map is convolved.
        scale, shift = F.interpolate(self.modulation(guide), size=size, mode="nearest").chunk(2, dim=1)
        return self.norm(x) * scale + shift


class NormConv(nn.Module):
    """A norm, SiLU and a causal convolution.

    Args:
        norm: A map of ``(b, c, t, h, w)``, or a ``ConditionalNorm``.
        conv: What follows.
    """

    def __init__(self, norm: nn.Module, conv: CausalConv3d) -> None:
        super().__init__()
        self.norm = norm
        self.conv = conv

    def forward(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        """Map ``(b, c, t, h, w)`` to ``(b, c', t, h, w)``."""
        if torch.is_grad_enabled() or self.conv.kernel_size[0] == 1:
            return self.conv(F.silu(self._normalize(x, guide), inplace=not torch.is_grad_enabled()), state)
        return self.convolve([x], [state], guide)

    def convolve(
        self, held: list[Frame], states: list[State], guide: Tensor | None, kept: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Map a chunk without gradients, letting go of it and of its state as soon as they are read.

        Args:
            held: The chunk ``(b, c, t, h, w)``, or the bands of its only frame, as its last element; it is taken off.
            states: The state as its last element, which is taken off.
            guide: What a conditional norm reads.
            kept: Is added to the output.

        Returns:
            As ``forward``.
        """
        return self.conv.convolve_frames(self._frames(held, guide), states.pop(), kept)

    def convolve_in_bands(self, held: list[Frame], states: list[State], guide: Tensor | None) -> tuple[Frame, State]:
        """Map a chunk of one frame as ``convolve``, but leave what comes of a large one in bands of rows."""
        (frame,) = self._frames(held, guide)
        return self.conv.convolve_in_bands(frame, states.pop())

    @property
    def takes_rows(self) -> bool:
        """Whether the norm sees single pixels, so that rows can be taken one band after another."""
        return isinstance(self.norm, ChannelRMSNorm)

    def _frames(self, held: list[Frame], guide: Tensor | None) -> list[Frame]:
        """Normalise and activate the chunk's frames, each into storages of its own."""
        x = held.pop()
        if isinstance(x, tuple):
            bands = list(x)
            del x
            return [tuple(self._enter(bands.pop(0), None) for _ in range(len(bands)))]
        b, _, t, h, w = x.shape
        cuts = self.conv.cuts(b, h, w) if self.takes_rows else [(0, h)]
        frames: list[Frame] = []
        for index in range(t):
            own = None if guide is None else guide[:, :, index : index + 1]
            made = [self._enter(x[:, :, index : index + 1, start:stop], own) for start, stop in cuts]
            frames.append(tuple(made) if len(made) > 1 else made[0])
        return frames

    def _enter(self, x: Tensor, guide: Tensor | None) -> Tensor:
        """Normalise and activate rows of one frame, into a storage of its own."""
        b, c, _, h, w = x.shape
        out = x.new_empty(b, 1, h, w, c).permute(0, 4, 1, 2, 3)
        # A norm over single pixels may take rows one band after another: what lies in between stays small.
        pixels = pixels_at_once(NORM_PIXELS, x.device)
        for start, stop in even_cuts(h, b * w, pixels) if self.takes_rows else [(0, h)]:
            torch.ops.aten.silu.out(self._normalize(x[:, :, :, start:stop], guide), out=out[:, :, :, start:stop])
        return out

    def _normalize(self, x: Tensor, guide: Tensor | None) -> Tensor:
        normed: Tensor = self.norm(x, guide) if isinstance(self.norm, ConditionalNorm) else self.norm(x)
        return normed


class ConvBlock(nn.Module):
    """A residual block of two convolutions, each behind a norm and SiLU.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output; a pointwise convolution matches the input to them where they differ.
        settings: What all blocks of a model share.
        guide_channels: Channels of the latent that conditional norms read; 0 for plain norms.
    """

    def __init__(self, channels: int, out_channels: int, settings: PartSettings, guide_channels: int = 0) -> None:
        super().__init__()
        self.first = NormConv(settings.norm(channels, guide_channels), settings.conv(channels, out_channels))
        self.second = NormConv(settings.norm(out_channels, guide_channels), settings.conv(out_channels, out_channels))
        self.shortcut = settings.pointwise(channels, out_channels) if channels != out_channels else None

    def forward(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        """Map ``(b, channels, t, h, w)`` to ``(b, out_channels, t, h, w)``."""
        kept = x if self.shortcut is None else self.shortcut(x)[0]
        states = split_state(state, 2)
        if torch.is_grad_enabled() or self.first.conv.kernel_size[0] == 1:
            y, first = self.first(x, states[0], guide)
            y, second = self.second(y, states[1], guide)
            y = y + kept if torch.is_grad_enabled() else y.add_(kept)
        else:
            in_bands = self.second.takes_rows and x.shape[2] == 1
            begin = self.first.convolve_in_bands if in_bands else self.first.convolve
            y, first = begin([x], [states.pop(0)], guide)
            held = [y]
            del y
            y, second = self.second.convolve(held, states, guide, kept)
        return y, None if state is None else (first, second)


class FrameAttention(nn.Module):
    """Self-attention with one head among the pixels of each frame, added to the input.

    Args:
        channels: Channels.
        norm: A map of ``(b, c, t, h, w)``.
    """

    def __init__(self, channels: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.gather_pixels = gather_pixels

    def forward(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        """Refine ``(b, c, t, h, w)``; carries nothing from chunk to chunk."""
        b, _, t, h, w = x.shape
        pixels = rearrange(self.norm(x), "b c t h w -> (b t) (h w) c")
        q, kv = self.qkv(pixels).split((pixels.shape[-1], 2 * pixels.shape[-1]), dim=-1)  # (b t) (h w) c
        k, v = self.gather_pixels(kv).unsqueeze(1).chunk(2, dim=-1)  # (b t) 1 (h w) c
        mixed = F.scaled_dot_product_attention(q.unsqueeze(1), k, v).squeeze(1)
        mixed = rearrange(self.out(mixed), "(b t) (h w) c -> b c t h w", b=b, t=t, h=h, w=w)
        return x + mixed, state


class SpatialDown(nn.Module):
    """Halve height and width by a convolution of stride 2, with one row and column of zeros on the far sides.

    Args:
        channels: Channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.extend_rows: ExtendRows | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, t, h, w)`` to ``(b, c, t, floor(h / 2), floor(w / 2))``."""
        if self.extend_rows is not None:
            x = self.extend_rows(x, 0, 1, "zeros")
            return _unfold_frames(self.conv(F.pad(_fold_frames(x), (0, 1))), x.shape[0])
        return _unfold_frames(self.conv(F.pad(_fold_frames(x), (0, 1, 0, 1))), x.shape[0])


class SpatialUp(nn.Module):
    """Double height and width: nearest neighbours, then a 3x3 convolution, done as one on the small grid.

    An output pixel of a given parity sees two rows and two columns of the small grid only, so its 3x3 kernel folds
    into a 2x2 one: four of them take 4/9 of the multiplications.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.extend_rows: ExtendRows | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, channels, t, h, w)`` to ``(b, out_channels, t, 2 h, 2 w)``."""
        weight = self._folded()
        b, _, t, h, w = x.shape
        c = self.conv.out_channels
        bias = None if self.conv.bias is None else self.conv.bias.repeat(4)
        if self.extend_rows is None:
            y = F.conv2d(_fold_frames(x), weight, bias, padding=1)  # (b t) 4c (h + 1) (w + 1)
        else:
            y = F.conv2d(_fold_frames(self.extend_rows(x, 1, 1, "zeros")), weight, bias, padding=(0, 1))
        y = y.permute(0, 2, 3, 1).unflatten(-1, (2, 2, c))
        # Phase (p, q) of the small grid starts p rows and q columns into the padded result.
        phases = [[y[:, p : p + h, q : q + w, p, q] for q in (0, 1)] for p in (0, 1)]
        if torch.is_grad_enabled():
            out = torch.stack([torch.stack(row, dim=3) for row in phases], dim=2)
        else:
            out = y.new_empty(b * t, h, 2, w, 2, c)
            for p in (0, 1):
                for q in (0, 1):
                    out[:, :, p, :, q] = phases[p][q]
        return out.view(b, t, 2 * h, 2 * w, c).permute(0, 4, 1, 2, 3)

    def _folded(self) -> Tensor:
        """Fold the kernel: ``(4 * out, in, 2, 2)``, the phases (even, odd row) x (even, odd column) outermost."""
        weight = self.conv.weight
        wide = weight if weight.dtype == torch.float64 else weight.float()
        rows = torch.stack([_fold_taps(wide, 2, phase) for phase in (0, 1)])  # 2 o i 2 3
        both = torch.stack([_fold_taps(rows, 4, phase) for phase in (0, 1)], dim=1)  # 2 2 o i 2 2
        return both.flatten(0, 2).to(weight.dtype).contiguous(memory_format=torch.channels_last)


class TemporalDown(nn.Module):
    """Halve the frames behind the first by a convolution over three frames; the first stays as it is.

    Args:
        channels: Channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Map ``1 + 2k`` frames of a first chunk to ``1 + k``, and ``2k`` later ones to ``k``."""
        carried = None if state is None else x[:, :, -1:].clone()
        if not is_first(state):
            assert isinstance(state, Tensor)
            return self.conv(torch.cat([state, x], dim=2)), carried
        if x.shape[2] == 1:
            return x, carried
        return torch.cat([x[:, :, :1], self.conv(x)], dim=2), carried


class TemporalUp(nn.Module):
    """Double the frames behind the first by a convolution over three of them; the first stays as it is, and unseen.

    Args:
        channels: Channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), front="zeros")

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Map ``1 + k`` frames of a first chunk to ``1 + 2k``, and ``k`` later ones to ``2k``."""
        if not is_first(state):
            y, carried = self.conv(x, state)
            return _interleave(y), carried
        head, tail = x[:, :, :1], x[:, :, 1:]
        if not tail.shape[2]:
            return x, None if state is None else torch.zeros_like(x).expand(-1, -1, 2, -1, -1)
        y, carried = self.conv(tail, state)
        return torch.cat([head, _interleave(y)], dim=2), carried


class AverageDown(nn.Module):
    """Fold blocks of frames and pixels into channels and average groups of them: a shortcut without parameters.

    Reference: Chen et al. (2024), arXiv 2410.10733 (DC-AE), Sec. 3.2.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output; divides ``channels * prod(factors)``.
        factors: Reduction along (t, h, w).
    """

    def __init__(self, channels: int, out_channels: int, factors: Factors) -> None:
        super().__init__()
        self.factors = factors
        self.group = channels * factors[0] * factors[1] * factors[2] // out_channels

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        """Map ``(b, channels, t, h, w)`` to ``(b, out_channels, t', h / fh, w / fw)``; zeros lie before the clip."""
        folded = space_to_depth(x, self.factors, first=first, front="zeros").movedim(1, -1)
        return (
            folded.unflatten(-1, (-1, self.group)).mean(-1).movedim(-1, 1) if self.group > 1 else folded.movedim(-1, 1)
        )


class RepeatUp(nn.Module):
    """Repeat channels and unfold them to frames and pixels: a shortcut without parameters.

    Reference: Chen et al. (2024), arXiv 2410.10733 (DC-AE), Sec. 3.2.

    Args:
        channels: Channels of the input; divides ``out_channels * prod(factors)``.
        out_channels: Channels of the output.
        factors: Enlargement along (t, h, w).
    """

    def __init__(self, channels: int, out_channels: int, factors: Factors) -> None:
        super().__init__()
        self.factors = factors
        self.repeats = out_channels * factors[0] * factors[1] * factors[2] // channels

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        """Map ``(b, channels, t, h, w)`` to ``(b, out_channels, t', h * fh, w * fw)``."""
        repeated = x.movedim(1, -1).repeat_interleave(self.repeats, dim=-1).movedim(-1, 1)
        return depth_to_space(repeated, self.factors, first=first)


class PartSettings:
    """What all parts of one model share: kernels in time, what lies before a clip, and the norm.

    Args:
        norm: Kind of norm.
        num_groups: Groups of a group norm.
        temporal_kernel: Frames that a block's convolution sees.
        front: What a convolution sees before the clip.
    """

    def __init__(self, norm: NormKind, num_groups: int, temporal_kernel: int, front: Front) -> None:
        self._norm, self._num_groups = norm, num_groups
        self._temporal_kernel, self._front = temporal_kernel, front

    def norm(self, channels: int, guide_channels: int = 0) -> nn.Module:
        """Build a norm; conditional where there are guide channels."""
        norm = build_norm(self._norm, channels, self._num_groups)
        return ConditionalNorm(norm, channels, guide_channels) if guide_channels else norm

    def conv(self, channels: int, out_channels: int) -> CausalConv3d:
        """Build a convolution of 3x3 pixels."""
        return CausalConv3d(channels, out_channels, (self._temporal_kernel, 3, 3), front=self._front)

    def pointwise(self, channels: int, out_channels: int) -> CausalConv3d:
        """Build a convolution of single pixels."""
        return CausalConv3d(channels, out_channels, (1, 1, 1), front=self._front)


def _fold_frames(x: Tensor) -> Tensor:
    """View ``(b, c, t, h, w)`` as ``(b t, c, h, w)``, channels-last."""
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def _unfold_frames(x: Tensor, b: int) -> Tensor:
    """View ``(b t, c, h, w)`` as ``(b, c, t, h, w)``."""
    return x.permute(0, 2, 3, 1).unflatten(0, (b, -1)).permute(0, 4, 1, 2, 3)


def _fold_taps(weight: Tensor, axis: int, phase: int) -> Tensor:
    """Fold three taps along an axis into the two that a pixel of one parity has on the small grid."""
    a, b, c = weight.unbind(axis)
    return torch.stack([a, b + c] if phase == 0 else [a + b, c], dim=axis)


def _interleave(y: Tensor) -> Tensor:
    """Lay the two halves of the channels of a frame out as two frames."""
    return rearrange(y, "b (two c) t h w -> b (t two) h w c", two=2).permute(0, 4, 1, 2, 3)
