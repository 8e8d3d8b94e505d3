"""Causal 3D convolution and block rearrangement over ``(b, c, t, h, w)``, with explicit state for streaming.

No output frame depends on a later input frame. A clip may be given whole or in chunks; both give the same numbers, in
bf16 on a CPU without gradients to its rounding (``CausalConv3d.fewer_products``).
State is never held by a module: a call takes it and returns it, so that one module can serve any number of streams and
training never meets a stale cache.

- ``state=None``: the clip is whole; the returned state is ``None``.
- ``state=START``: the first chunk of a stream; the returned state is what the next chunk needs.

The first frame stands alone: a module that divides time by ``f`` takes ``1 + k * f`` frames first and multiples of
``f`` afterwards, so an image is a clip of one frame. Knows nothing of models, devices or processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ltd.nn import winograd
from ltd.nn.bands import Frame, Rows, bands_of, even_cuts, frame_size, join_bands, pixels_at_once, whole
from ltd.nn.seams import ExtendRows

# None: a whole clip. (): the start of a stream. Otherwise what a module carries to the next chunk; a list is handed
# over, and may be emptied, so that what is in it can be let go.
State: TypeAlias = "Tensor | tuple[State, ...] | list[State] | None"
START: State = ()
Padding: TypeAlias = Literal["zeros", "replicate"]
#: What lies before a clip: its first frame again, or zeros.
Front: TypeAlias = Literal["repeat", "zeros"]
Factors: TypeAlias = tuple[int, int, int]
#: Pixels of a frame, over the batch, whose rows a convolution gathers at once on a CPU, without gradients.
BAND_PIXELS = 1 << 13
#: Output channels that a vector unit works on at once; fewer leave part of it idle.
_LANES = 16


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

    #: Whether frames that come one by one, without gradients, may be convolved by fewer products: the first after zeros
    #: by one tap, in half precision; pairs as ``ltd.nn.winograd`` does where that pays, in bf16 on a CPU. Set it to
    #: False on a module, or here, for the direct convolution's bits.
    fewer_products = True
    #: Pixels of a frame, over the batch, whose rows are gathered at once without gradients; None goes by the device.
    band_pixels: int | None = None

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
        x = (
            pad_front(x, kernel_t - 1, self.front)
            if first
            else torch.cat([*map(whole, self._frames_before(x, state)), x], dim=2)
        )
        carried: State = None if state is None else _last_frames(x, kernel_t - stride_t)
        return self._convolve(x), carried

    def convolve_frames(
        self, frames: Sequence[Frame], state: State, kept: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Convolve a chunk that comes frame by frame, large frames in bands of rows; stride 1 in time, no gradients.

        What is carried is the last frames themselves: none is copied. In half precision a convolution to few channels
        carries what these frames add to the outputs to come instead. Bands of a frame that nobody else holds are let go
        of as soon as they are read, while the output grows.

        Args:
            frames: ``(b, in_channels, 1, h, w)`` each, or its bands; they are only read.
            state: ``None``, ``START`` or what the previous chunk returned.
            kept: Is added to the output, ``(b, out_channels, t, h, w)``.

        Returns:
            As for a call with the chunk alone, plus ``kept``; the state is a tuple of frames.

        Raises:
            ValueError: If the frames are of another size than those of the state.
        """
        like, (b, h, w), t = bands_of(frames[0])[0], frame_size(frames[0]), len(frames)
        states = [state]
        del state
        made, state = self._convolve_frames(frames, states)
        if isinstance(made, Tensor):
            return (made if kept is None else made.add_(kept)), state
        return join_bands(made, self._room(like, b, t, h, w), kept), state

    def convolve_in_bands(self, frame: Frame, state: State) -> tuple[Frame, State]:
        """Convolve a chunk of one frame as ``convolve_frames``; the output of a large one stays in bands of rows.

        Args:
            frame: The frame.
            state: ``None``, ``START`` or what the previous chunk returned.

        Returns:
            The output, whole or in the bands that ``cuts`` gives, and the state.
        """
        states = [state]
        del state
        made, state = self._convolve_frames([frame], states)
        return (made if isinstance(made, Tensor) else tuple(made)), state

    def cuts(self, b: int, h: int, w: int) -> list[tuple[int, int]]:
        """Cut a frame into the bands of rows ``(start, stop)`` that are convolved at once.

        Args:
            b: Batch.
            h: Rows.
            w: Columns.

        Returns:
            Bands from top to bottom; one where a frame is read whole.
        """
        read_whole = self._adds_taps() or not self._takes_bands()
        if read_whole:
            return [(0, h)]
        pixels = self.band_pixels
        return even_cuts(h, b * w, pixels_at_once(BAND_PIXELS, self.weight.device) if pixels is None else pixels)

    def _convolve_frames(self, frames: Sequence[Frame], states: list[State]) -> tuple[Tensor | Iterator[Tensor], State]:
        """Give the output, or its bands one by one as ``cuts`` has them, and the state for the next chunk.

        Takes the state out of its list: nobody here holds what it carries any longer than it is read.
        """
        state = states.pop()
        if self._adds_taps():
            y, sums = self._convolve_taps([whole(frame) for frame in frames], state)
            return y, None if state is None else sums
        count, t, (b, h, w) = self.kernel_size[0] - 1, len(frames), frame_size(frames[0])
        after_nothing = count > 0 and is_first(state) and self.front == "zeros"
        frames = [*self._frames_before(frames[0], state), *frames]
        carried: State = None if state is None else tuple(frames[len(frames) - count :])
        del state
        if self.fewer_products and self._is_half() and self._takes_bands():
            if after_nothing and t == 1:
                return self._convolve_last_tap(whole(frames[-1])), carried
            if winograd.pays(self.weight, (b, t, h, w)):
                return self._convolve_pairs(frames, after_nothing=after_nothing), carried
        return self._convolve_direct(frames), carried

    def _convolve_direct(self, frames: list[Frame]) -> Tensor | Iterator[Tensor]:
        cuts = self.cuts(*frame_size(frames[0]))
        if len(cuts) > 1:
            return self._convolve_bands(frames, cuts)
        return self._convolve(torch.cat([whole(frame) for frame in frames], dim=2))

    def _convolve_bands(self, frames: list[Frame], cuts: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Give bands of the output one by one; takes the frames out of their list, and lets go of what it has read."""
        _, _, top, bottom = self.edges
        b, _, w = frame_size(frames[0])
        like, rows = bands_of(frames[0])[0], [Rows(frame) for frame in frames]
        frames.clear()
        most = max(stop - start for start, stop in cuts) + top + bottom
        room = like.new_empty(b * len(rows) * most * w * self.in_channels)
        del like
        for start, stop in cuts:
            shape = (b, len(rows), stop - start + top + bottom, w, self.in_channels)
            band = room[: math.prod(shape)].view(shape).permute(0, 4, 1, 2, 3)
            for index, frame in enumerate(rows):
                frame.gather(start - top, stop + bottom, band[:, :, index])
                frame.drop_above(stop - top)
            yield F.conv3d(band, self.weight, self.bias, self.stride, (0, 0, self.edges[0]))

    def _convolve_pairs(self, frames: list[Frame], *, after_nothing: bool) -> Tensor:
        """Convolve pairs of output frames by fewer products, and before them the first of an odd number alone.

        Takes the frames out of their list, and lets go of what it has read.
        """
        (b, h, w), t = frame_size(frames[0]), len(frames) - 2
        alone = t % 2
        out = self._room(bands_of(frames[0])[0], b, t, h, w)
        if after_nothing and alone:
            out[:, :, :1] = self._convolve_last_tap(whole(frames[2]))
        elif alone:
            first = self._convolve_direct(frames[:3])
            join_bands([first] if isinstance(first, Tensor) else first, out[:, :, :1])
        rows = [Rows(frame) for frame in frames[alone:]]
        frames.clear()
        winograd.convolve_pairs(rows, self.weight, self.bias, out[:, :, alone:])
        return out

    def _room(self, like: Tensor, b: int, t: int, h: int, w: int) -> Tensor:
        """Make room for an output ``(b, out_channels, t, h, w)``, channels-last."""
        return like.new_empty(b, t, h, w, self.out_channels).permute(0, 4, 1, 2, 3)

    def _convolve_last_tap(self, frame: Tensor) -> Tensor:
        """Convolve a clip's first frame, before which there are zeros: other taps have nothing to add."""
        return F.conv2d(
            frame.squeeze(2), self.weight[:, :, -1], self.bias, padding=(self.edges[2], self.edges[0])
        ).unsqueeze(2)

    def _is_half(self) -> bool:
        # fp32 and fp64 keep to the plain convolution's bits.
        return self.weight.dtype in (torch.bfloat16, torch.float16)

    def _adds_taps(self) -> bool:
        few = self.out_channels < _LANES and 2 * self.out_channels <= self.in_channels and self.kernel_size[0] > 1
        return few and self._is_half() and self._takes_bands()

    def _convolve_taps(self, frames: list[Tensor], state: State) -> tuple[Tensor, State]:
        """Convolve each frame by all taps at once, as channels of one kernel, and add what belongs to one output."""
        taps, (b, _, _, h, w) = self.kernel_size[0], frames[0].shape
        kernel = self.weight.movedim(2, 0).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        out = frames[0].new_empty(b, len(frames), h, w, self.out_channels).permute(0, 4, 1, 2, 3)
        sums: list[Tensor] = []
        for index, frame in enumerate(frames):
            parts = F.conv2d(frame.squeeze(2), kernel, padding=(self.edges[2], self.edges[0])).unflatten(1, (taps, -1))
            parts = parts if parts.dtype == torch.float64 else parts.float()
            if not index:
                sums = self._sums_before(parts, state)
            y = sums[0] + parts[:, -1]
            out[:, :, index] = y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]
            # Tap k of a frame belongs to the output taps - 1 - k frames later.
            sums = [*(sums[ahead] + parts[:, -1 - ahead] for ahead in range(1, taps - 1)), parts[:, 0].clone()]
        return out, tuple(sums)

    def _sums_before(self, parts: Tensor, state: State) -> list[Tensor]:
        """List what the frames before a chunk add to its first output, to its second, and so on."""
        if not is_first(state):
            if not isinstance(state, tuple | list):
                raise TypeError("expected what a chunk without gradients returned: a stream ends as it began")
            return [_tensor(part) for part in state]
        taps = parts.shape[1]
        if self.front == "zeros":
            return [torch.zeros_like(parts[:, 0])] * (taps - 1)
        return [parts[:, : taps - 1 - ahead].sum(1) for ahead in range(taps - 1)]

    def _takes_bands(self) -> bool:
        """Tell whether a band of rows convolves as it does within its frame."""
        left, right, top, bottom = self.edges
        even = left == right and top == bottom
        return self.extend_rows is None and self.edge_mode == "zeros" and even and self.stride == (1, 1, 1)

    def _frames_before(self, first: Frame, state: State) -> list[Frame]:
        """List the frames that a chunk's first one sees before itself."""
        count = self.kernel_size[0] - 1
        if not count:
            return []
        if is_first(state):
            if self.front == "repeat":
                return [first] * count
            zeros = tuple(torch.zeros_like(band) for band in bands_of(first))
            return [zeros if isinstance(first, tuple) else zeros[0]] * count
        frames = list(state.split(1, dim=2)) if isinstance(state, Tensor) else [_frame(frame) for frame in state or ()]
        if any(bands_of(frame)[0].shape[1] != self.in_channels for frame in frames):
            raise TypeError("expected what a chunk with gradients returned: a stream ends as it began")
        for size in map(frame_size, frames):
            if size != frame_size(first):
                raise ValueError(f"state: got frames (b, h, w) of {size}, needed {frame_size(first)}, as now")
        return frames

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


def _frame(state: State) -> Frame:
    return tuple(_tensor(part) for part in state) if isinstance(state, tuple) else _tensor(state)


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
