"""3x3x3 convolution by fewer products: Winograd's F(2, 3) along time and along rows takes 4/9 of the multiplications.

Two output frames by two output rows come of four frames by four rows: sums and differences of those, sixteen
convolutions of rows with sums and differences of the kernel, and sums and differences of what comes out. In exact
arithmetic that is the convolution itself; in bf16 each of the three steps rounds, so its error is about three times
that of the direct convolution, whose only rounding is the output's. It pays where products are what takes the time,
as on a CPU without matrix units, and the kernel's sums are made anew at each call, so it also takes enough pixels.
Knows nothing of time's direction, models or processes.

Reference: Lavin and Gray (2016), arXiv 1509.09308, Sec. 4.1; Winograd (1980), Arithmetic Complexity of Computations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.nn.bands import Rows

#: Output pixels, over frames and batch, from which making the kernel's sums is worth it.
_PIXELS = 1024
#: Fewest channels on either side: with fewer, the sums cost more than the products that they save.
_CHANNELS = 64
#: Elements of one of the sixteen products that are worked on at once: enough for the library, few enough for caches.
TILE_ELEMENTS = 3 << 16
#: Output channels whose kernels are summed at once.
_KERNEL_BLOCK = 96
#: What each of the four products of F(2, 3) adds to the first and to the second of two outputs.
_OUTPUTS = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))
#: Products that the first of two frames is made of, and the second.
_OF_FRAMES = slice(0, 12), slice(4, 16)


def pays(weight: Tensor, size: Sequence[int]) -> bool:
    """Tell whether pairs of frames are convolved faster by fewer products.

    Args:
        weight: Kernel ``(out, in, 3, 3, 3)``, or of another size.
        size: Batch, output frames, rows and columns.

    Returns:
        Whether ``convolve_pairs`` takes them and is worth it: bf16 on a CPU without matrix units, wide enough, an even
        number of rows.
    """
    b, t, h, w = size
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and tuple(weight.shape[2:]) == (3, 3, 3)
        and min(weight.shape[:2]) >= _CHANNELS
        and t > 1
        and h % 2 == 0
        and b * t * h * w >= _PIXELS
        and not HAS_MATRIX_UNITS
    )


def _find_matrix_units() -> bool:
    found = getattr(torch.cpu, "_is_amx_tile_supported", None)  # since torch 2.6
    return found is not None and bool(found())


#: Whether the processor multiplies tiles of bf16 (AMX): there products are no longer what takes the time.
HAS_MATRIX_UNITS = _find_matrix_units()


def convolve_pairs(
    frames: Sequence[Rows],
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    tile_elements: int = TILE_ELEMENTS,
) -> None:
    """Convolve an even number of output frames with zeros around each frame; no gradients.

    Args:
        frames: ``2 + 2k`` frames ``(b, in, 1, h, w)``, channels-last; h is even. Rows that were read are let go of.
        weight: ``(out, in, 3, 3, 3)``.
        bias: ``(out,)``, or None.
        out: Channels-last ``(b, out, 2k, h, w)``, is written; its frames may be part of a longer clip.
        tile_elements: Elements of one product that are worked on at once, in bands of rows.
    """
    kernels, mixes = _kernels(weight), _mixes(bias, weight)
    b, _, _, h, w = out.shape
    channels, pairs = weight.shape[1], len(frames) // 2 - 1
    most = max(1, tile_elements // (b * pairs * w * max(channels, len(weight))))
    count = -(-(h // 2) // most)
    written = out.permute(0, 2, 3, 4, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # b pairs 2 h/2 2 w out
    for band in range(count):
        start, stop = h // 2 * band // count, h // 2 * (band + 1) // count
        products = _products(_over_time(frames, 2 * start - 1, 2 * stop + 1), kernels, bias)
        for frame in frames:
            frame.drop_above(2 * stop - 1)
        mixed = products.new_empty(4, products.shape[1])
        # The first frame takes no product of the later one: 0 times what is not finite there would not be 0.
        first, second = (products[used] for used in _used(bias))
        torch.mm(mixes[0], first, out=mixed[:2])
        torch.mm(mixes[1], second, out=mixed[2:])
        parts = mixed.view(2, 2, b, pairs, stop - start, w, -1)
        written[:, :, :, start:stop] = parts.permute(2, 3, 0, 4, 1, 5, 6)
        del products, first, second, mixed, parts  # not beside the next band's


def _over_time(frames: Sequence[Rows], start: int, stop: int) -> Tensor:
    """Give the sums and differences over time ``(4, b, pairs, stop - start, w, c)``; rows beyond a frame are zeros."""
    top, bottom = max(-start, 0), max(stop - frames[0].height, 0)
    rows = [frame.take(start + top, stop - bottom).permute(0, 2, 3, 1) for frame in frames]
    b, _, w, c = rows[0].shape
    made = rows[0].new_empty(4, b, len(rows) // 2 - 1, stop - start, w, c)
    made[:, :, :, :top].zero_()
    made[:, :, :, stop - start - bottom :].zero_()
    inside = made[:, :, :, top : stop - start - bottom]
    for pair in range(made.shape[2]):
        _differences(rows[2 * pair : 2 * pair + 4], inside[:, :, pair])
    return made


def _products(over_time: Tensor, kernels: list[list[Tensor]], bias: Tensor | None) -> Tensor:
    """Give the sixteen products, ``(16, -1)``, and before and behind them the bias for each place if there is one."""
    _, b, pairs, rows, w, c = over_time.shape
    tiles, width = rows // 2 - 1, len(kernels[0][0])
    biased = int(bias is not None)
    room = over_time.new_empty(16 + 2 * biased, b * pairs * tiles, w, width)
    entered = over_time.new_empty(4, b, pairs, tiles, w, c)
    for index, part in enumerate(over_time):
        # Tile i has rows 2i to 2i + 3.
        _differences([part[:, :, first : first + 2 * tiles - 1 : 2] for first in range(4)], entered)
        for place, kernel in enumerate(kernels[index]):
            image = entered[place].view(1, -1, w, c).permute(0, 3, 1, 2)
            room[biased + 4 * index + place] = F.conv2d(image, kernel, padding=(0, 1)).squeeze(0).permute(1, 2, 0)
    if bias is not None:
        room[0], room[17] = bias, bias
    return room.view(len(room), -1)


def _differences(parts: Sequence[Tensor], out: Tensor) -> None:
    """Write what the four products of F(2, 3) read: x0 - x2, x1 + x2, x2 - x1, x1 - x3."""
    x0, x1, x2, x3 = parts
    torch.sub(x0, x2, out=out[0])
    torch.add(x1, x2, out=out[1])
    torch.sub(x2, x1, out=out[2])
    torch.sub(x1, x3, out=out[3])


def _kernels(weight: Tensor) -> list[list[Tensor]]:
    """Give the kernels ``(out, in, 1, 3)`` of the sixteen products, by their place in time and in rows."""
    wide = weight.permute(0, 2, 3, 4, 1)  # out 3 3 3 in
    made = weight.new_empty(4, 4, len(wide), 3, weight.shape[1])
    # A few output channels at a time, so that what is summed in fp32 stays in caches.
    for part, out in zip(wide.split(_KERNEL_BLOCK), made.split(_KERNEL_BLOCK, dim=2), strict=True):
        for rows, over_rows in zip(_halves(part.unbind(1)), out, strict=True):
            for taps, kernel in zip(_halves(rows.unbind(1)), over_rows, strict=True):
                kernel.copy_(taps)
    return [[kernel.unsqueeze(1).permute(0, 3, 1, 2) for kernel in rows] for rows in made]


def _halves(taps: Sequence[Tensor]) -> Iterator[Tensor]:
    """Give F(2, 3)'s four kernels of three taps, wide, one by one: a, (a + b + c) / 2, (a - b + c) / 2, c."""
    a, b, c = map(_widen, taps)
    yield a
    outer = (a + c).mul_(0.5)
    del a
    yield torch.add(outer, b, alpha=0.5)
    yield outer.sub_(b, alpha=0.5)
    yield c


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _used(bias: Tensor | None) -> tuple[slice, slice]:
    """Say which rows of ``_products`` either frame is made of."""
    return _OF_FRAMES if bias is None else (slice(0, 13), slice(5, 18))


def _mixes(bias: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Give what each used product adds to the two rows of either frame, ``(2, 12)``, and 1 for a bias."""
    once = like.new_tensor(_OUTPUTS)
    both = torch.kron(once, once)
    first, second = (both[2 * frame : 2 * frame + 2, used] for frame, used in enumerate(_OF_FRAMES))
    if bias is None:
        return first.contiguous(), second.contiguous()
    ones = first.new_ones(2, 1)
    return torch.cat([ones, first], dim=1), torch.cat([second, ones], dim=1)
