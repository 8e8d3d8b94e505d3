"""Causal 3D convolution and block rearrangement over ``(b, c, t, h, w)``, with explicit state for streaming.

No output frame depends on a later input frame. A clip may be given whole or in chunks; both give the same numbers.
State is never held by a module: a call takes it and returns it, so that one module can serve any number of streams and
training never meets a stale cache.

- ``state=None``: the clip is whole; the returned state is ``None``.
- ``state=START``: the first chunk of a stream; the returned state is what the next chunk needs.

The first frame stands alone: a module that divides time by ``f`` takes ``1 + k * f`` frames first and multiples of
``f`` afterwards, so an image is a clip of one frame. Knows nothing of models, devices or processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ltd.nn.seams import ExtendRows

# None: a whole clip. (): the start of a stream. Otherwise what a module carries to the next chunk.
State: TypeAlias = "Tensor | tuple[State, ...] | None"
START: State = ()
Padding: TypeAlias = Literal["zeros", "replicate"]
#: What lies before a clip: its first frame again, or zeros.
Front: TypeAlias = Literal["repeat", "zeros"]
Factors: TypeAlias = tuple[int, int, int]


def is_first(state: State) -> bool:
    """Tell whether the chunk that comes with this state holds the clip's first frame."""
    return state is None or (isinstance(state, tuple) and not state)


def pad_front(x: Tensor, count: int, front: Front = "repeat") -> Tensor:
    """Put ``count`` frames in front of the clip ``(b, c, t, h, w)``: its first one again, or zeros."""
    if not count:
        return x
    before = x[:, :, :1] if front == "repeat" else torch.zeros_like(x[:, :, :1])
    return torch.cat([before] * count + [x], dim=2)


class CausalConv3d(nn.Conv3d):
    """3D convolution whose output frame ``i`` sees input frames up to ``i * stride_t`` only.

    In space the output has ``size / stride`` pixels.

    Reference: Lin et al., Open-Sora Plan (2024), arXiv 2412.00131, Sec. 2.1 (causal padding by the first frame).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Kernel size along (t, h, w), each at least the stride.
        stride: Stride along (t, h, w).
        padding: What lies outside a frame: zeros, or the frame's edge repeated.
        front: What lies before the clip: its first frame repeated, or zeros.

    Raises:
        ValueError: If a kernel is smaller than its stride, so that input would be skipped.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Factors = (3, 3, 3),
        stride: Factors = (1, 1, 1),
        padding: Padding = "zeros",
        front: Front = "repeat",
    ) -> None:
        if any(k < s for k, s in zip(kernel, stride, strict=True)):
            raise ValueError(f"kernel {kernel} is smaller than stride {stride}: some input would never be read")
        super().__init__(in_channels, out_channels, kernel, stride)
        (_, h, w), (_, stride_h, stride_w) = kernel, stride
        # (left, right, top, bottom): the extra pixel of an even total goes to the far side.
        self.edges = ((w - stride_w) // 2, (w - stride_w + 1) // 2, (h - stride_h) // 2, (h - stride_h + 1) // 2)
        self.edge_mode: Padding = padding
        self.front: Front = front
        self.extend_rows: ExtendRows | None = None

    def forward(  # type: ignore[override]  # the state travels with the tensor
        self, x: Tensor, state: State = None
    ) -> tuple[Tensor, State]:
        """Convolve a clip or one chunk of it.

        Args:
            x: ``(b, in_channels, t, h, w)``; memory format is kept.
            state: ``None``, ``START`` or what the previous chunk returned.

        Returns:
            ``(b, out_channels, t', h', w')`` and the state for the next chunk: the last ``kernel_t - stride_t`` frames.

        Raises:
            ValueError: If the number of frames does not fit the temporal stride.
        """
        kernel_t, stride_t = self.kernel_size[0], self.stride[0]
        first = is_first(state)
        if (x.shape[2] - first) % stride_t or not x.shape[2]:
            rule = f"1 + k * {stride_t}" if first else f"k * {stride_t}"
            raise ValueError(f"a {'first' if first else 'later'} chunk needs {rule} frames, got {x.shape[2]}")
        x = pad_front(x, kernel_t - 1, self.front) if first else torch.cat([_tensor(state), x], dim=2)
        carried: State = None if state is None else _last_frames(x, kernel_t - stride_t)
        return self._convolve(x), carried

    def convolve_behind_front(self, buffer: Tensor, state: State) -> tuple[Tensor, State]:
        """Convolve a chunk that already lies in a buffer behind room for what comes before it; stride 1 in time.

        Args:
            buffer: ``(b, in_channels, kernel_t - 1 + t, h, w)``; its first ``kernel_t - 1`` frames are overwritten.
            state: ``None``, ``START`` or what the previous chunk returned.

        Returns:
            As for a call with the chunk alone.
        """
        count = self.kernel_size[0] - 1
        room = buffer[:, :, :count]
        if not is_first(state):
            room.copy_(_tensor(state))
        elif self.front == "zeros":
            room.zero_()
        else:
            room.copy_(buffer[:, :, count : count + 1].expand_as(room))
        carried: State = None if state is None else _last_frames(buffer, count)
        return self._convolve(buffer), carried

    def _convolve(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.edges
        if self.extend_rows is not None and (top or bottom):
            x, top, bottom = self.extend_rows(x, top, bottom, self.edge_mode), 0, 0
        if self.edge_mode == "replicate" and any((left, right, top, bottom)):
            x = F.pad(x, (left, right, top, bottom, 0, 0), mode="replicate")
        elif left != right or top != bottom:
            x = F.pad(x, (left, right, top, bottom, 0, 0))
        else:  # padding inside the kernel saves a copy of the input
            return F.conv3d(x, self.weight, self.bias, self.stride, (0, top, left))
        return F.conv3d(x, self.weight, self.bias, self.stride)


class FixedCausalConv3d(CausalConv3d):
    """Causal convolution whose weight and bias are buffers: zero until something sets them, and never trained.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Kernel size along (t, h, w).
        padding: What lies outside a frame.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Factors, padding: Padding = "replicate") -> None:
        super().__init__(in_channels, out_channels, kernel, padding=padding)
        for name in ("weight", "bias"):
            value = torch.zeros_like(getattr(self, name).detach())
            delattr(self, name)
            self.register_buffer(name, value)

    def _convolve(self, x: Tensor) -> Tensor:
        # Engines cast parameters and leave buffers alone: the fixed map stays as precise as it was computed.
        return super()._convolve(x.to(self.weight.dtype))


def _tensor(state: State) -> Tensor:
    if not isinstance(state, Tensor):
        raise TypeError(f"expected the tensor that the previous chunk returned, got {type(state).__name__}")
    return state


def _last_frames(x: Tensor, count: int) -> Tensor:
    # A copy: a view would keep the whole chunk alive between calls.
    return x[:, :, x.shape[2] - count :].clone()


def space_to_depth(x: Tensor, factors: Factors, *, first: bool = True, front: Front = "repeat") -> Tensor:
    """Fold blocks of frames and pixels into channels.

    Args:
        x: ``(b, c, t, h, w)``.
        factors: Block size ``(ft, fh, fw)``.
        first: Whether ``x`` holds the clip's first frame; ``ft - 1`` frames are then put in front.
        front: What they are: the first frame again, or zeros.

    Returns:
        ``(b, c * ft * fh * fw, t', h / fh, w / fw)``, channel-major: the block index varies fastest. ``t'`` is
        ``1 + (t - 1) / ft`` if ``first``, else ``t / ft``.
    """
    ft, fh, fw = factors
    if factors == (1, 1, 1):
        return x
    if first:
        x = pad_front(x, ft - 1, front)
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // ft, ft, h // fh, fh, w // fw, fw)
    # (b, t', h', w', c ft fh fw) in memory: the result is channels-last.
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t // ft, h // fh, w // fw, c * ft * fh * fw)
    return x.permute(0, 4, 1, 2, 3)


def depth_to_space(x: Tensor, factors: Factors, *, first: bool = True) -> Tensor:
    """Unfold channels into blocks of frames and pixels: the inverse of ``space_to_depth``.

    Args:
        x: ``(b, c * ft * fh * fw, t, h, w)``.
        factors: Block size ``(ft, fh, fw)``.
        first: Whether ``x`` holds the clip's first frame; of its block only the last frame is kept.

    Returns:
        ``(b, c, t', h * fh, w * fw)``; ``t'`` is ``1 + (t - 1) * ft`` if ``first``, else ``t * ft``.
    """
    ft, fh, fw = factors
    if factors == (1, 1, 1):
        return x
    x = rearrange(x, "b (c ft fh fw) t h w -> b (t ft) (h fh) (w fw) c", ft=ft, fh=fh, fw=fw)
    x = x.permute(0, 4, 1, 2, 3)
    return x[:, :, ft - 1 :] if first else x


def run(modules: Iterable[nn.Module], x: Tensor, state: State = None) -> tuple[Tensor, State]:
    """Apply causal modules one after another, each with its own part of the state.

    Args:
        modules: Modules called as ``module(x, state) -> (x, state)``.
        x: ``(b, c, t, h, w)``.
        state: ``None``, ``START``, or the tuple that the previous chunk returned.

    Returns:
        Output of the last module, and a tuple of their states (``None`` for a whole clip).
    """
    modules = list(modules)
    if state is None:
        for module in modules:
            x, _ = module(x, None)
        return x, None
    before = (START,) * len(modules) if is_first(state) else state
    if not isinstance(before, tuple) or len(before) != len(modules):
        raise TypeError(f"expected the states of {len(modules)} modules, got {type(state).__name__}")
    after: list[State] = []
    for module, own in zip(modules, before, strict=True):
        x, own = module(x, own)
        after.append(own)
    return x, tuple(after)
