import pytest
import torch

from ltd.nn.rope import apply_rope, check_rope_split, default_rope_split, rope_tables


def scores(q, k, positions, split=(4, 6, 6)):
    cos, sin = rope_tables(positions, split, dtype=torch.float64)
    return torch.einsum("bnhd,bmhd->bhnm", apply_rope(q, cos, sin), apply_rope(k, cos, sin))


@pytest.fixture
def qk():
    torch.manual_seed(0)
    return torch.randn(2, 5, 3, 16, dtype=torch.float64), torch.randn(2, 5, 3, 16, dtype=torch.float64)


def test_scores_depend_on_differences_of_positions_only(qk):
    positions = torch.randint(0, 20, (2, 5, 3)).double()
    shifted = positions + torch.tensor([3.5, -7.0, 100.0])
    assert torch.allclose(scores(*qk, positions), scores(*qk, shifted), atol=1e-10)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_matters(qk, axis):
    positions = torch.zeros(1, 5, 3)
    moved = positions.clone()
    moved[:, 2, axis] = 1
    assert (scores(*qk, positions) - scores(*qk, moved)).abs().max() > 1e-3


def test_equals_rotation_written_as_complex_numbers(qk):
    split, theta = (4, 6, 6), 100.0
    positions = torch.rand(2, 5, 3) * 9
    q = qk[0]
    frequencies = [theta ** (-2 * i / part) for part in split for i in range(part // 2)]
    axes = [axis for axis, part in enumerate(split) for _ in range(part // 2)]
    angles = torch.stack([positions[..., a].double() * f for a, f in zip(axes, frequencies, strict=True)], -1)
    rotated = torch.complex(q[..., :8], q[..., 8:]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    ours = apply_rope(q, *rope_tables(positions, split, theta=theta, dtype=torch.float64))
    assert torch.allclose(ours, torch.cat((rotated.real, rotated.imag), -1), atol=1e-12)


def test_position_zero_is_the_identity_and_dtype_is_kept(qk):
    tables = rope_tables(torch.zeros(1, 5, 3), (4, 6, 6))
    assert torch.equal(apply_rope(qk[0].bfloat16(), *tables), qk[0].bfloat16())


def test_tables_are_exact_at_large_positions():
    cos, _ = rope_tables(torch.tensor([[[0.0, 0.0, 1e6]]]), (4, 6, 6))
    assert cos[0, 0, 0, 5].item() == pytest.approx(torch.tensor(1e6, dtype=torch.float64).cos().item(), abs=1e-7)


@pytest.mark.parametrize("head_dim", [6, 8, 16, 32, 64, 72, 128])
def test_default_split_is_valid(head_dim):
    split = default_rope_split(head_dim)
    check_rope_split(split, head_dim)
    assert split[1] == split[2] > 0 and split[0] > 0


@pytest.mark.parametrize("split", [(3, 5, 8), (4, 4, 4), (-2, 10, 8)])
def test_bad_splits_are_refused(split):
    with pytest.raises(ValueError, match="three even parts that add up to head_dim = 16"):
        check_rope_split(split, 16)


def test_odd_or_tiny_heads_are_refused():
    with pytest.raises(ValueError, match="width / num_heads"):
        default_rope_split(7)
    with pytest.raises(ValueError, match="6 or more"):
        default_rope_split(4)
