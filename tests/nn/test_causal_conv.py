"""Causal convolution against an explicitly padded one; streaming and block rearrangement as inverse pairs."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.nn.bands import Frame
from ltd.nn.causal_conv import (
    START,
    CausalConv3d,
    FixedCausalConv3d,
    State,
    depth_to_space,
    run,
    space_to_depth,
)

CASES = [
    # kernel, stride
    ((3, 3, 3), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2)),
    ((4, 3, 3), (2, 1, 2)),
    ((2, 2, 2), (2, 2, 2)),
    ((1, 3, 3), (1, 1, 1)),
    ((1, 1, 1), (1, 1, 1)),
]


def _clip(frames: int = 9) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, frames, 8, 12, dtype=torch.float64)


@pytest.mark.parametrize(("kernel", "stride"), CASES)
@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_equals_explicit_padding(kernel: tuple[int, int, int], stride: tuple[int, int, int], padding: str) -> None:
    conv = CausalConv3d(3, 5, kernel, stride, padding).double()  # type: ignore[arg-type]
    x = _clip()
    total_h, total_w = kernel[1] - stride[1], kernel[2] - stride[2]
    edges = (total_w // 2, total_w - total_w // 2, total_h // 2, total_h - total_h // 2, 0, 0)
    padded = F.pad(x, edges, mode="replicate" if padding == "replicate" else "constant")
    padded = F.pad(padded, (0, 0, 0, 0, kernel[0] - 1, 0), mode="replicate")
    expected = F.conv3d(padded, conv.weight, conv.bias, stride)
    y, state = conv(x)
    assert state is None
    assert y.shape == (2, 5, 1 + 8 // stride[0], 8 // stride[1], 12 // stride[2])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), CASES)
def test_chunks_equal_the_whole(kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
    conv = CausalConv3d(3, 5, kernel, stride).double()
    x, step = _clip(), stride[0]
    whole, _ = conv(x)
    units = 8 // step
    for cut in itertools.combinations(range(1, units + 1), 2):
        bounds = [0, *(1 + (c - 1) * step for c in cut), 9]
        state: State = START
        parts = []
        for start, stop in itertools.pairwise(bounds):
            if stop > start:
                y, state = conv(x[:, :, start:stop], state)
                parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-12, atol=1e-12)


def test_later_frames_never_change_earlier_output() -> None:
    conv = CausalConv3d(3, 5)
    x = _clip().float()
    before, _ = conv(x)
    for frame in range(1, 9):
        changed = x.clone()
        changed[:, :, frame:] += 1.0
        after, _ = conv(changed)
        assert torch.equal(after[:, :, :frame], before[:, :, :frame])
        assert not torch.equal(after[:, :, frame], before[:, :, frame])


def test_carried_state_is_a_copy_of_the_last_frames() -> None:
    x = _clip()
    _, state = CausalConv3d(3, 5).double()(x, START)
    assert isinstance(state, Tensor)
    assert torch.equal(state, x[:, :, -2:])
    assert state.untyped_storage().nbytes() == state.numel() * 8


def _frames(x: Tensor) -> list[Tensor]:
    return [frame.clone(memory_format=torch.channels_last_3d) for frame in x.split(1, dim=2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("front", ["repeat", "zeros"])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (2, 5, 3)])
@torch.no_grad()
def test_bands_of_rows_equal_the_frame(kernel: tuple[int, int, int], front: str, dtype: torch.dtype) -> None:
    conv = CausalConv3d(16, 16, kernel, front=front).to(dtype)  # type: ignore[arg-type]
    x, kept = torch.randn(2, 16, 6, 8, 12).to(dtype), torch.randn(2, 16, 6, 8, 12).to(dtype)
    whole, tolerance = conv(x)[0] + kept, 5e-6 if dtype == torch.float32 else 1e-13
    for band_pixels in (1 << 20, 3 * 2 * 12, 1):  # all rows, three bands of unequal height, single rows
        conv.band_pixels = band_pixels
        state: State = START
        parts = []
        for start, stop in ((0, 1), (1, 2), (2, 6)):
            part = kept[:, :, start:stop].clone(memory_format=torch.channels_last_3d)
            y, state = conv.convolve_frames(_frames(x[:, :, start:stop]), state, part)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=tolerance, atol=tolerance)
        assert isinstance(state, tuple) and len(state) == kernel[0] - 1


def _in_bands(frame: Tensor, heights: tuple[int, ...]) -> Frame:
    return tuple(band.clone(memory_format=torch.channels_last_3d) for band in frame.split(heights, dim=3))


@pytest.mark.parametrize("front", ["repeat", "zeros"])
@torch.no_grad()
def test_frames_may_come_stay_and_go_in_bands(front: str) -> None:
    conv = CausalConv3d(16, 20, (3, 5, 3), front=front).double()  # type: ignore[arg-type]
    x = torch.randn(2, 16, 5, 12, 6, dtype=torch.float64)
    whole = conv(x)[0]
    conv.band_pixels = 4 * 6 * 2  # three bands of four rows, of which two more are read on either side
    state: State = START
    parts = []
    for index, frame in enumerate(_frames(x)):
        # whole, in the convolution's own bands and in others
        came = [frame, _in_bands(frame, (4, 4, 4)), _in_bands(frame, (1, 10, 1))][index % 3]
        y, state = conv.convolve_in_bands(came, state)
        assert isinstance(y, tuple) and [part.shape[3] for part in y] == [4, 4, 4]
        parts.append(torch.cat(y, 3))
        assert isinstance(state, tuple) and state[-1] is came
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-12, atol=1e-12)
    # and whoever takes whole frames goes on from them
    _, state = conv.convolve_in_bands(_in_bands(x[:, :, :1], (4, 4, 4)), START)
    torch.testing.assert_close(conv(x[:, :, 1:], state)[0], whole[:, :, 1:], rtol=1e-12, atol=1e-12)
    later = [_in_bands(frame, (4, 4, 4)) for frame in _frames(x[:, :, 1:])]
    kept = torch.randn_like(whole[:, :, 1:])
    y, _ = conv.convolve_frames(later, state, kept)
    torch.testing.assert_close(y, whole[:, :, 1:] + kept, rtol=1e-12, atol=1e-12)
    for frame in (_in_bands(x[:, :, :1, 2:], (5, 5)), torch.zeros(2, 16, 1, 14, 6, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"state: got frames \(b, h, w\) of \(2, 12, 6\), needed \(2, 1[04], 6\)"):
            conv.convolve_frames([frame], state)


@torch.no_grad()
def test_bands_that_were_read_are_let_go_of_while_the_output_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = CausalConv3d(16, 20).double()
    conv.band_pixels = 4 * 6
    first, second, third = (_in_bands(torch.randn(1, 16, 1, 16, 6).double(), (4,) * 4) for _ in range(3))
    watched = [weakref.ref(band) for frame in (first, second) for band in frame]
    state: State = (first, second)
    held = [state]
    del first, second, state
    alive: list[list[bool]] = []
    volume = F.conv3d

    def counted(*args: Any) -> Tensor:
        alive.append([band() is not None for band in watched])
        return volume(*args)

    monkeypatch.setattr(F, "conv3d", counted)
    y, after = conv.convolve_frames([third], held.pop())
    # A band is let go of once the next one has been gathered, whose first row reads its last one.
    assert [sum(row[:4]) for row in alive] == [4, 3, 2, 1]
    assert all(all(row[4:]) for row in alive)  # the frame before is carried
    assert isinstance(after, tuple) and after[1] is third and y.shape == (1, 20, 1, 16, 6)


@pytest.mark.parametrize("kernel", [(3, 2, 3), (3, 4, 3), (1, 3, 3)])
@pytest.mark.parametrize("out_channels", [4, 16])
@torch.no_grad()
def test_kernels_without_short_cuts_in_half_precision(kernel: tuple[int, int, int], out_channels: int) -> None:
    conv = CausalConv3d(16, out_channels, kernel, front="zeros").bfloat16()
    x = torch.randn(1, 16, 3, 6, 5).bfloat16()
    whole, state = conv(x)[0], START
    for index, frame in enumerate(_frames(x)):
        y, state = conv.convolve_frames([frame], state)
        torch.testing.assert_close(y, whole[:, :, index : index + 1], rtol=2**-6, atol=2**-6)


@torch.no_grad()
def test_carried_frames_are_those_that_came_and_keep_nothing_else() -> None:
    conv, x = CausalConv3d(3, 5).double(), _clip(5)
    frames = _frames(x[:, :, :3])
    _, state = conv.convolve_frames(frames, START)
    assert isinstance(state, tuple)
    assert [part is frame for part, frame in zip(state, frames[1:], strict=True)] == [True, True]
    _, after = conv.convolve_frames(frames[:1], state)
    assert isinstance(after, tuple) and after[0] is state[1] and after[1] is frames[0]
    # and a call with the whole chunk goes on from them
    torch.testing.assert_close(conv(x[:, :, 3:], state)[0], conv(x)[0][:, :, 3:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("front", ["repeat", "zeros"])
@pytest.mark.parametrize("taps", [2, 3, 4])
@torch.no_grad()
def test_few_channels_are_convolved_tap_by_tap(taps: int, front: str) -> None:
    conv = CausalConv3d(6, 3, (taps, 3, 3), front=front).double()  # type: ignore[arg-type]
    x = torch.randn(2, 6, 7, 4, 5, dtype=torch.float64)
    whole = conv(x)[0]
    torch.testing.assert_close(conv._convolve_taps(_frames(x), START)[0], whole, rtol=1e-12, atol=1e-12)
    state: State = START
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 7)):
        y, state = conv._convolve_taps(_frames(x[:, :, start:stop]), state)
        torch.testing.assert_close(y, whole[:, :, start:stop], rtol=1e-12, atol=1e-12)
        assert isinstance(state, tuple)
        # what is carried has the channels of the output
        assert [part.shape for part in state if isinstance(part, Tensor)] == [(2, 3, 4, 5)] * (taps - 1)
        assert all(p.untyped_storage().nbytes() == p.numel() * 8 for p in state if isinstance(p, Tensor))
    with pytest.raises(TypeError, match="with gradients returned"):
        conv(x, state)
    with pytest.raises(TypeError, match="without gradients returned"):
        conv._convolve_taps(_frames(x), conv(x, START)[1])


@torch.no_grad()
def test_sums_of_taps_are_kept_in_fp32() -> None:
    conv = CausalConv3d(96, 3, front="zeros").bfloat16()
    x = torch.randn(1, 96, 6, 8, 8).bfloat16()
    exact = conv.double()(x.double())[0]
    y, state = conv.bfloat16().convolve_frames(_frames(x), START)
    assert y.dtype == torch.bfloat16
    assert isinstance(state, tuple) and [p.dtype for p in state if isinstance(p, Tensor)] == [torch.float32] * 2
    # three rounded parts instead of one: within the rounding of one (2^-9) of the output's size, a few times
    assert float((y.double() - exact).square().mean().sqrt() / exact.std()) < 2**-8
    kept = torch.ones_like(y)
    assert torch.equal(conv.convolve_frames(_frames(x), None, kept.clone())[0], y + kept)


def test_wrong_chunk_length_is_refused() -> None:
    conv = CausalConv3d(3, 5, (3, 3, 3), (2, 2, 2)).double()
    with pytest.raises(ValueError, match=r"a first chunk needs 1 \+ k \* 2 frames, got 4"):
        conv(_clip(4))
    _, state = conv(_clip(3), START)
    with pytest.raises(ValueError, match=r"a later chunk needs k \* 2 frames, got 3"):
        conv(_clip(3), state)
    with pytest.raises(ValueError, match="smaller than stride"):
        CausalConv3d(3, 5, (1, 3, 3), (2, 1, 1))


def test_fixed_convolution_is_zero_and_has_no_parameters() -> None:
    conv = FixedCausalConv3d(3, 5, (1, 1, 1)).double()
    assert not list(conv.parameters())
    assert set(conv.state_dict()) == {"weight", "bias"}
    assert conv(_clip())[0].abs().max() == 0


@pytest.mark.parametrize("factors", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (4, 4, 4), (4, 8, 4)])
def test_fold_and_unfold_are_inverse(factors: tuple[int, int, int]) -> None:
    x = _clip()
    folded = space_to_depth(x, factors)
    assert folded.shape[2] == 1 + 8 // factors[0]
    assert torch.equal(depth_to_space(folded, factors), x)
    rest = space_to_depth(x[:, :, 1:], factors, first=False)
    assert torch.equal(rest, folded[:, :, 1:])
    assert torch.equal(depth_to_space(rest, factors, first=False), x[:, :, 1:])


def test_fold_is_channel_major() -> None:
    x = torch.arange(2 * 2 * 2, dtype=torch.float64).reshape(1, 2, 1, 2, 2)
    assert space_to_depth(x, (1, 2, 2)).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_channels_last_is_kept(padding: str) -> None:
    conv = CausalConv3d(3, 5, padding=padding)  # type: ignore[arg-type]
    x = _clip(5).float().contiguous(memory_format=torch.channels_last_3d)
    first, state = conv(x, START)
    later, _ = conv(x, state)
    assert first.is_contiguous(memory_format=torch.channels_last_3d)
    assert later.is_contiguous(memory_format=torch.channels_last_3d)


def test_gradient_reaches_input_through_every_frame() -> None:
    conv = CausalConv3d(3, 5).double()
    x = _clip(5).requires_grad_()
    y, _ = conv(x)
    (grad,) = torch.autograd.grad(y[:, :, 3].sum(), x)
    assert grad[:, :, 4].abs().max() == 0
    assert all(grad[:, :, frame].abs().max() > 0 for frame in (1, 2, 3))


def test_run_carries_one_state_per_module() -> None:
    modules = nn.ModuleList([CausalConv3d(3, 4), CausalConv3d(4, 4, (2, 2, 2), (2, 2, 2)), CausalConv3d(4, 5)]).double()
    x = _clip()
    whole, none = run(modules, x)
    assert none is None
    first, state = run(modules, x[:, :, :3], START)
    assert isinstance(state, tuple) and len(state) == 3
    second, _ = run(modules, x[:, :, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="states of 2 modules"):
        run(modules[:2], x, state)
