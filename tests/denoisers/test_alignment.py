"""Alignment of tokens with features: closed forms, which blocks learn from it, packs, what never leaves training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ltd import denoisers
from ltd.config import ConfigError
from ltd.denoisers import Dit, DitConfig
from ltd.denoisers.alignment import DenoiserAlignmentConfig, TokenProjector, alignment_loss

FEATURES = 5


@pytest.fixture
def aligned(build: Callable[..., Dit]) -> Callable[..., Dit]:
    """Build a small redrawn float64 model with a projector behind a block."""

    def make(block: int, **options: Any) -> Dit:
        model = build(**options)
        torch.manual_seed(1)
        config = DenoiserAlignmentConfig(block=block, hidden=8)
        model.alignment = TokenProjector(model.config.width, FEATURES, config).double()
        return model

    return make


def tapped(model: Dit, *inputs: Any) -> tuple[Any, Tensor]:
    found: list[Tensor] = []
    out = model(*inputs, tap=found.append)
    assert len(found) == 1
    return out, found[0]


def target(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gradients(model: Dit, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def test_the_term_is_the_mean_negative_cosine() -> None:
    x = torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [5.0, 0.0]]])
    assert alignment_loss(x, 7 * x).tolist() == pytest.approx([-1, -1])
    assert alignment_loss(x, -x).tolist() == pytest.approx([1, 1])
    assert alignment_loss(x, x.flip(1)).tolist() == pytest.approx([0, -(0.5**0.5)])
    noise, other = target(64, 3, 2).float(), target(64, 3, 2).flip(0).float()
    assert -1 <= float(alignment_loss(noise, other).min()) < float(alignment_loss(noise, other).max()) <= 1
    assert float(alignment_loss(noise, noise).min()) == -1  # rounding takes it no further
    assert alignment_loss(x.bfloat16(), x).dtype == torch.float32
    assert torch.isfinite(alignment_loss(torch.zeros(1, 2, 2), x[:1])).all()


def test_features_get_no_gradient_and_shapes_are_checked() -> None:
    x, features = target(2, 3, 4).requires_grad_(), target(2, 3, 4).flip(0).requires_grad_()
    alignment_loss(x, features).sum().backward()
    assert x.grad is not None and x.grad.any() and features.grad is None
    with pytest.raises(ValueError, match=r"features: got shape \(2, 4, 4\), the projected tokens have \(2, 3, 4\)"):
        alignment_loss(x, target(2, 4, 4))
    with pytest.raises(ValueError, match=r"lengths: got \(1, 1\), needed those of one row of 3 tokens"):
        alignment_loss(x[:1], features[:1], [1, 1])


@pytest.mark.parametrize("checked", [1, 2])
def test_blocks_after_the_tapped_one_learn_nothing_from_the_term(
    checked: int, aligned: Callable[..., Dit], inputs: Any
) -> None:
    model = aligned(checked, text_dim=5, depth=3)
    _, projected = tapped(model, *inputs)
    found = gradients(model, alignment_loss(projected, target(*projected.shape)).sum())
    after = [name for name in found if name.startswith(("final.", *(f"blocks.{i}." for i in range(checked, 3))))]
    assert after and not any(found[name].any() for name in after)
    before = [name for name in found if name not in after and name.endswith(".weight")]
    assert all(found[name].any() for name in before), [name for name in before if not found[name].any()]


def test_the_tap_sees_the_tokens_behind_its_block(aligned: Callable[..., Dit], inputs: Any) -> None:
    seen: list[Tensor] = []
    for block in (1, 2):
        model = aligned(block, text_dim=5)
        hook = model.blocks[block - 1].register_forward_hook(lambda module, given, out: seen.append(out))
        _, projected = tapped(model, *inputs)
        hook.remove()
        assert model.alignment is not None
        assert torch.equal(projected, model.alignment(seen.pop()))


def test_a_tap_changes_no_bit_of_prediction_and_coefficient_0_none_of_the_gradients(
    aligned: Callable[..., Dit], build: Callable[..., Dit], inputs: Any
) -> None:
    plain, model = build(text_dim=5), aligned(1, text_dim=5)
    expected = plain(*inputs)
    out, projected = tapped(model, *inputs)
    assert torch.equal(out, expected) and torch.equal(model(*inputs), expected)
    before = gradients(plain, expected.square().sum())
    term = alignment_loss(projected, target(*projected.shape)).sum()
    after = gradients(model, out.square().sum() + 0.0 * term)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    out, projected = tapped(model, *inputs)
    term = alignment_loss(projected, target(*projected.shape)).sum()
    moved = gradients(model, out.square().sum() + 0.5 * term)
    assert any(not torch.equal(moved[name], value) for name, value in before.items())


def test_samples_of_a_pack_are_compared_as_alone(aligned: Callable[..., Dit], inputs: Any) -> None:
    x_t, t, cond = inputs
    model = aligned(1, text_dim=5, patch=(1, 1, 1))
    samples = [x_t[0], x_t[1, :, :1, :2]]
    _, packed = tapped(model, samples, t, cond)
    lengths = [48, 12]
    assert packed.shape == (1, 60, FEATURES)
    features = target(60, FEATURES)
    found = alignment_loss(packed, features[None], lengths)
    rows = zip(samples, features.split(lengths), strict=True)
    for i, (sample, own) in enumerate(rows):
        row = slice(i, i + 1)
        _, alone = tapped(model, sample[None], t[row], cond.select(row))
        torch.testing.assert_close(found[row], alignment_loss(alone, own[None]), rtol=1e-6, atol=1e-7)


def test_the_projector_is_neither_saved_nor_loaded(tmp_path: Any, aligned: Callable[..., Dit], inputs: Any) -> None:
    model = aligned(1, text_dim=5)
    denoisers.save(model, tmp_path / "model")
    loaded = denoisers.load(tmp_path / "model")
    assert isinstance(loaded, Dit) and loaded.alignment is None
    assert not any(name.startswith("alignment.") for name in loaded.state_dict())
    assert torch.equal(loaded(*inputs), model(*inputs))


def test_weights_of_the_projector_decay_and_its_biases_do_not(aligned: Callable[..., Dit]) -> None:
    groups = aligned(1).decay_groups()
    assert "alignment.middle.weight" in groups["decay"] and "alignment.middle.bias" in groups["no_decay"]


def test_refuses(build: Callable[..., Dit], inputs: Any) -> None:
    with pytest.raises(ValueError, match="tap: the model projects no tokens"):
        build(text_dim=5)(*inputs, tap=lambda tokens: None)
    for name in ("block", "hidden"):
        with pytest.raises(ConfigError, match=f"{name}: got 0, needed 1 or more"):
            DenoiserAlignmentConfig(**{name: 0})
    with pytest.raises(ConfigError, match=r"weight: got -0\.5, needed 0 or more"):
        DenoiserAlignmentConfig(weight=-0.5)


def test_the_projector_has_three_linear_layers() -> None:
    config = DenoiserAlignmentConfig()
    with torch.device("meta"):
        projector = TokenProjector(DitConfig().width, 768, config)
    count = sum(parameter.numel() for parameter in projector.parameters())
    assert count == 385 * 2048 + 2049 * 2048 + 2049 * 768
