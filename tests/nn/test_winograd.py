"""Convolution by fewer products equals the direct one, and is used where it may be."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.nn import winograd
from ltd.nn.bands import Rows
from ltd.nn.causal_conv import START, CausalConv3d, State


def _frames(x: Tensor) -> list[Tensor]:
    return [frame.clone(memory_format=torch.channels_last_3d) for frame in x.split(1, dim=2)]


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt() / exact.std())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tile_elements", [1, 3 * 2 * 2 * 5 * 4, 1 << 20])  # single rows, uneven bands, all rows
@torch.no_grad()
def test_pairs_of_frames_equal_the_direct_convolution(tile_elements: int, biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, 10, 5, dtype=torch.float64), torch.randn(4, 3, 3, 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64) if biased else None
    whole = torch.full((2, 7, 10, 5, 4), 9.0, dtype=torch.float64).permute(0, 4, 1, 2, 3)
    frames = _frames(x)
    exact = F.conv3d(x, weight, bias, padding=(0, 1, 1))
    in_bands = [Rows(tuple(band.clone() for band in frame.split((3, 1, 6), dim=3))) for frame in frames]
    for given in ([Rows(frame) for frame in frames], in_bands):
        winograd.convolve_pairs(given, weight, bias, whole[:, :, 1:], tile_elements=tile_elements)
        torch.testing.assert_close(whole[:, :, 1:], exact, rtol=1e-12, atol=1e-12)
        assert bool((whole[:, :, 0] == 9).all())  # the frame that was not asked for
    assert torch.equal(torch.cat(frames, 2), x)


@torch.no_grad()
def test_kernels_are_summed_for_all_output_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 4, 4, 5, dtype=torch.float64), torch.randn(7, 3, 3, 3, 3, dtype=torch.float64)
    monkeypatch.setattr(winograd, "_KERNEL_BLOCK", 3)  # the last block is a smaller one
    out = torch.empty(1, 2, 4, 5, 7, dtype=torch.float64).permute(0, 4, 1, 2, 3)
    winograd.convolve_pairs([Rows(frame) for frame in _frames(x)], weight, None, out)
    torch.testing.assert_close(out, F.conv3d(x, weight, padding=(0, 1, 1)), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_rows_that_were_read_are_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 2, 3, 3, 3)
    frames = [tuple(torch.randn(1, 2, 1, 2, 4) for _ in range(4)) for _ in range(4)]
    watched = [weakref.ref(band) for band in frames[0]]
    rows = [Rows(frame) for frame in frames]
    del frames
    alive: list[int] = []
    products = winograd._products

    def counted(*args: Any) -> Tensor:
        alive.append(sum(band() is not None for band in watched))
        return products(*args)

    monkeypatch.setattr(winograd, "_products", counted)
    winograd.convolve_pairs(rows, weight, None, torch.empty(1, 2, 8, 4, 3).permute(0, 4, 1, 2, 3), tile_elements=1)
    # Two rows at a time; of those above the next two the last is still to be read.
    assert alive == [4, 4, 3, 2]


@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_no_frame_sees_a_later_one_even_where_that_is_not_finite(biased: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 2, 3, 3, 3), torch.randn(3) if biased else None
    x, out = torch.randn(1, 2, 6, 4, 4), torch.empty(1, 4, 4, 4, 3).permute(0, 4, 1, 2, 3)
    for spoilt, value in ((3, torch.nan), (5, torch.inf)):
        frames = _frames(x)
        frames[spoilt][0, 0, 0, 1, 2] = value
        winograd.convolve_pairs([Rows(frame) for frame in frames], weight, bias, out)
        sound = [bool(out[:, :, frame].isfinite().all()) for frame in range(4)]
        assert sound == [frame + 2 < spoilt for frame in range(4)]


def test_it_is_used_in_bf16_on_a_cpu_for_wide_kernels_and_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "HAS_MATRIX_UNITS", False)
    weight = torch.zeros(64, 64, 3, 3, 3, dtype=torch.bfloat16)
    size = (1, 2, 16, 32)
    assert winograd.pays(weight, size) and winograd.pays(weight, (1, 3, 16, 32))
    others = [weight.float(), weight.half(), weight[:32], weight[:, :32], weight[:, :, :1], weight.to("meta")]
    assert not any(winograd.pays(other, size) for other in others)
    assert not any(winograd.pays(weight, other) for other in [(1, 1, 64, 64), (1, 2, 17, 32), (1, 2, 16, 31)])
    monkeypatch.setattr(winograd, "HAS_MATRIX_UNITS", True)
    assert not winograd.pays(weight, size)


def test_matrix_units_are_found_where_the_system_lists_them() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("needs /proc/cpuinfo")
    assert ("amx_tile" in cpuinfo.read_text()) == winograd.HAS_MATRIX_UNITS


@pytest.mark.parametrize("front", ["repeat", "zeros"])
@torch.no_grad()
def test_chunks_of_any_length_are_the_clip_to_the_rounding_of_bf16(front: str, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(64, 64, front=front).bfloat16()  # type: ignore[arg-type]
    x, kept = F.silu(torch.randn(1, 64, 9, 32, 16)).bfloat16(), torch.randn(1, 64, 9, 32, 16).bfloat16()
    exact = conv.double()(x.double())[0]
    conv.bfloat16()
    calls: list[int] = []
    pairs = winograd.convolve_pairs

    def counted(frames: list[Rows], *rest: Any, **more: Any) -> None:
        calls.append(len(frames))
        pairs(frames, *rest, **more)

    monkeypatch.setattr(winograd, "HAS_MATRIX_UNITS", False)
    monkeypatch.setattr(winograd, "convolve_pairs", counted)
    for cuts in ((9,), (1, 4, 4), (1, 1, 3, 4), (2, 5, 2)):
        state: State = START
        parts = []
        for chunk, more in zip(x.split(cuts, 2), kept.split(cuts, 2), strict=True):
            y, state = conv.convolve_frames(_frames(chunk), state, more.clone())
            parts.append(y)
        # Direct: 0.0017 by rounding the output. A wrong tap, sign or row is far above this.
        assert _error(torch.cat(parts, 2), exact + kept.double()) < 0.008
    assert calls == [10, 6, 6, 4, 6, 4, 6, 4]  # of an odd number the first goes alone
    calls.clear()
    conv.fewer_products = False
    before = torch.zeros_like(x[:, :, :1]) if front == "zeros" else x[:, :, :1]
    for length in (9, 1):  # pairs, and a first frame alone
        frames = _frames(x[:, :, :length])
        padded = torch.cat([before, before, *frames], 2).contiguous(memory_format=torch.channels_last_3d)
        direct = F.conv3d(padded, conv.weight, conv.bias, padding=(0, 1, 1))
        assert torch.equal(conv.convolve_frames(frames, None)[0], direct)
    assert not calls


@torch.no_grad()
def test_the_first_frame_after_zeros_takes_one_tap(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(8, 16, front="zeros").bfloat16()
    x, kept = torch.randn(2, 8, 1, 6, 5).bfloat16(), torch.randn(2, 16, 1, 6, 5).bfloat16()
    exact = conv.double()(x.double())[0]
    conv.bfloat16()
    volumes: list[int] = []
    volume = F.conv3d
    monkeypatch.setattr(F, "conv3d", lambda *args: volumes.append(1) or volume(*args))  # type: ignore[func-returns-value]
    y, state = conv.convolve_frames(_frames(x), START, kept.clone())
    assert _error(y, exact + kept.double()) < 2**-8 and not volumes
    # a later frame has others before it
    later, _ = conv.convolve_frames(_frames(x), state, kept.clone())
    assert volumes and _error(later, conv.double()(torch.cat([x, x], 2).double())[0][:, :, 1:] + kept.double()) < 2**-8
