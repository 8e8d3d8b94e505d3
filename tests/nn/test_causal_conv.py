"""Causal convolution against an explicitly padded one; streaming and block rearrangement as inverse pairs."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
