"""Alignment of latents with features: closed forms, invariances, tokens by draws, frames of a clip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ltd.autoencoders.alignment import AlignmentConfig, LatentAlignment, features_per_latent, teacher_features
from ltd.config import ConfigError

OFF = 2.0


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _identity(channels: int, **options: float) -> LatentAlignment:
    """Build an alignment whose projection changes nothing."""
    settings = {"cosine_margin": 0.0, "distance_margin": 0.0, **options}
    model = LatentAlignment(channels, channels, AlignmentConfig(**settings))  # type: ignore[arg-type]
    with torch.no_grad():
        model.projection.weight.copy_(torch.eye(channels))
    return model


def _rotation(channels: int) -> Tensor:
    return torch.linalg.qr(_draw(channels, channels, seed=9)).Q


def test_both_terms_vanish_for_equal_latents_and_features() -> None:
    latents = _draw(2, 6, 2, 3, 4)
    for value in _identity(6)(latents, latents).values():
        assert value.shape == (2,) and value.abs().max() < 1e-6


def test_terms_by_hand() -> None:
    # Two tokens: latents at a right angle; features along the first latent, and against it.
    latents = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).reshape(1, 2, 1, 1, 2)
    features = torch.tensor([[3.0, -1.0], [0.0, 0.0]]).reshape(1, 2, 1, 1, 2)
    terms = _identity(2)(latents, features)
    # cos(z_i, f_i) = 1 and 0. Pairs: z has (1, 0, 0, 1), f has (1, -1, -1, 1).
    assert terms["align_cosine"].item() == pytest.approx(0.5)
    assert terms["align_distance"].item() == pytest.approx(0.5)
    assert _identity(2)(features, latents)["align_distance"].item() == pytest.approx(0.5)  # either may be the larger
    terms = _identity(2, cosine_margin=0.4, distance_margin=0.3)(latents, features)
    assert terms["align_cosine"].item() == pytest.approx(0.6 / 2)
    assert terms["align_distance"].item() == pytest.approx(2 * 0.7 / 4)


def test_distance_ignores_rotation_and_scale_and_cosine_does_not() -> None:
    latents, features, model = _draw(2, 6, 1, 3, 4), _draw(2, 6, 1, 3, 4, seed=1), _identity(6)
    plain = model(latents, features)
    turned = torch.einsum("dc,bcthw->bdthw", _rotation(6), features) * 3.0
    torch.testing.assert_close(model(latents, turned)["align_distance"], plain["align_distance"], rtol=1e-5, atol=1e-6)
    moved = torch.einsum("dc,bcthw->bdthw", _rotation(6), latents) * 0.1
    torch.testing.assert_close(model(moved, features)["align_distance"], plain["align_distance"], rtol=1e-5, atol=1e-6)
    assert (model(latents, turned)["align_cosine"] - plain["align_cosine"]).abs().min() > 1e-3
    torch.testing.assert_close(model(5 * latents, features)["align_cosine"], plain["align_cosine"])


@pytest.mark.parametrize("term", ["cosine", "distance"])
def test_a_margin_of_two_switches_a_term_off(term: str) -> None:
    latents = _draw(2, 6, 1, 3, 4).requires_grad_()
    features = torch.cat([-latents.detach()[:, :, :, :1], _draw(2, 6, 1, 2, 4, seed=1)], dim=3)
    model = _identity(6, **{f"{term}_margin": OFF})
    value = model(latents, features)[f"align_{term}"]
    assert value.max() < 1e-6
    assert _identity(6, **{f"{term}_margin": 0.1})(latents, features)[f"align_{term}"].min() > 0.05
    value.sum().backward()
    assert latents.grad is not None and latents.grad.abs().max() == 0


def test_gradient_goes_to_latents_and_projection_only() -> None:
    latents, features = _draw(2, 4, 1, 3, 4).requires_grad_(), _draw(2, 6, 1, 5, 7).requires_grad_()
    model = LatentAlignment(4, 6)
    assert [name for name, _ in model.named_parameters()] == ["projection.weight"]
    sum(model(latents, features).values()).sum().backward()  # type: ignore[union-attr]
    assert latents.grad is not None and latents.grad.abs().max() > 0
    assert model.projection.weight.grad is not None and model.projection.weight.grad.abs().max() > 0
    assert features.grad is None


def test_descending_aligns() -> None:
    features = _draw(1, 5, 1, 4, 4)
    latents = _draw(1, 3, 1, 4, 4, seed=1).requires_grad_()
    model = LatentAlignment(3, 5, AlignmentConfig(cosine_margin=0.0, distance_margin=0.0))
    with torch.no_grad():
        model.projection.weight.copy_(_draw(5, 3, seed=2))
    optimizer = torch.optim.Adam([latents, *model.parameters()], lr=0.05)
    values = []
    for _ in range(60):
        terms = model(latents, features)
        optimizer.zero_grad()
        (terms["align_cosine"] + terms["align_distance"]).sum().backward()
        optimizer.step()
        values.append({name: value.item() for name, value in terms.items()})
    assert values[-1]["align_cosine"] < 0.5 * values[0]["align_cosine"]
    assert values[-1]["align_distance"] < 0.7 * values[0]["align_distance"]


def test_tokens_belong_to_the_draw() -> None:
    latents, features, draws = _draw(3, 4, 1, 6, 6), _draw(3, 4, 1, 6, 6, seed=1), torch.tensor([7, 8, 9])
    model = _identity(4, max_tokens=10)
    terms = model(latents, features, draws=draws, seed=5)
    order = torch.tensor([2, 0])
    some = model(latents[order], features[order], draws=draws[order], seed=5)
    other_draws, other_seed = model(latents, features, draws=draws + 10, seed=5), model(latents, features, draws=draws)
    for name, value in terms.items():
        torch.testing.assert_close(some[name], value[order])
        assert (other_draws[name] - value).abs().min() > 1e-6
        assert (other_seed[name] - value).abs().min() > 1e-6
    for value in model(latents, latents, draws=draws).values():
        assert value.max() < 1e-6  # the same tokens of both
    state = torch.get_rng_state()
    model(latents, features, draws=draws)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"draws: got none, needed one per sample \(3\): 36 tokens .* max_tokens 10"):
        model(latents, features)
    with pytest.raises(ValueError, match="draws: got 2, needed one per sample"):
        model(latents, features, draws=draws[:2])


def test_drawn_tokens_are_different_ones_and_fair() -> None:
    count, kept = 36, 12
    features = _draw(200, 4, 1, 6, 6, seed=1)
    model = _identity(4, max_tokens=kept)
    latents = _draw(200, 4, 1, 6, 6).requires_grad_()
    drawn = model(latents, features, draws=torch.arange(200))
    drawn["align_cosine"].sum().backward()
    assert latents.grad is not None
    touched = latents.grad.abs().sum(1).flatten(1) > 0
    assert touched.sum(1).tolist() == [kept] * 200  # no token twice
    share = touched.float().mean(0)
    assert (share - kept / count).abs().max() < 0.13  # 4 standard deviations
    everything = _identity(4)(latents, features)
    assert drawn["align_cosine"].mean().item() == pytest.approx(everything["align_cosine"].mean().item(), abs=0.04)
    # As many tokens as there are: nothing is drawn, the result is that of all.
    torch.testing.assert_close(_identity(4, max_tokens=count)(latents, features), everything, rtol=0, atol=0)


def test_features_are_averaged_over_the_frames_of_a_latent_frame() -> None:
    frames = torch.arange(9.0).reshape(1, 1, 9, 1, 1).expand(1, 2, 9, 2, 2)
    assert features_per_latent(frames, (3, 2, 2))[0, 0, :, 0, 0].tolist() == [0.0, 2.5, 6.5]  # 0 | 1-4 | 5-8
    assert features_per_latent(frames, (5, 2, 2))[0, 0, :, 0, 0].tolist() == [0.0, 1.5, 3.5, 5.5, 7.5]
    assert torch.equal(features_per_latent(frames, (9, 2, 2)), frames)
    for latent_frames in (4, 8, 10, 1):
        with pytest.raises(ValueError, match=rf"features: got 9 frames, needed 1 \+ {latent_frames - 1} \* f"):
            features_per_latent(frames, (latent_frames, 2, 2))


def test_features_are_interpolated_in_space() -> None:
    ramp = (torch.arange(8.0) + 0.5).reshape(1, 1, 1, 1, 8).expand(1, 1, 2, 4, 8) / 8
    for width in (4, 16):
        got = features_per_latent(ramp, (2, 6, width))
        assert got.shape == (1, 1, 2, 6, width)
        expected = (torch.arange(width) + 0.5) / width  # the same ramp, on the other grid
        inner = slice(width // 4, -width // 4)
        torch.testing.assert_close(got[0, 0, 1, 3, inner], expected[inner], rtol=1e-5, atol=1e-6)
    stripes = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(4).reshape(1, 1, 1, 1, 16).expand(1, 1, 1, 4, 16)
    assert features_per_latent(stripes, (1, 4, 4))[..., 1:3].abs().max() < 1e-6  # shrunk without aliases


def test_teacher_sees_the_frames_that_belong_to_latents() -> None:
    seen: list[list[float]] = []

    def teacher(video: Tensor) -> Tensor:
        seen.append(video[0, 0, :, 0, 0].tolist())
        return video[..., ::2, ::2]

    video = torch.arange(9.0).reshape(1, 1, 9, 1, 1).expand(1, 1, 9, 4, 4).requires_grad_()
    assert teacher_features(teacher, video, 4).shape == (1, 1, 3, 2, 2)
    assert not teacher_features(teacher, video, 4, "all").requires_grad
    teacher_features(teacher, video, 2)
    teacher_features(teacher, video, 1)
    teacher_features(teacher, video[:, :, :1], 4)
    assert seen == [[0, 2, 6], list(range(9)), [0, 1, 3, 5, 7], list(range(9)), [0]]
    with pytest.raises(ValueError, match=r"num_frames must be 1 \+ k \* 4 .*got 8"):
        teacher_features(teacher, video[:, :, 1:], 4)
    with pytest.raises(ValueError, match=r"teacher: gave shape \(1, 1, 4, 4\), needed \(1, d, 3, h, w\)"):
        teacher_features(lambda x: x[:, :, 0], video, 4)


def test_a_clip_and_its_frames_features_agree_whether_averaged_before_or_inside() -> None:
    latents, features = _draw(2, 4, 3, 2, 2), _draw(2, 4, 9, 4, 4, seed=1)
    model = _identity(4)
    inside, before = model(latents, features), model(latents, features_per_latent(features, (3, 2, 2)))
    for name in inside:
        torch.testing.assert_close(inside[name], before[name], rtol=1e-5, atol=1e-6)


def test_terms_are_fp32_for_half_precision() -> None:
    model, latents, features = LatentAlignment(4, 6), _draw(2, 4, 1, 3, 3), _draw(2, 6, 1, 3, 3)
    exact = model(latents, features)
    rounded = model.bfloat16()(latents.bfloat16(), features.bfloat16())
    for name, value in rounded.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0, atol=0.02)
    for value in _identity(4).bfloat16()(latents.bfloat16(), latents.bfloat16()).values():
        assert value.max() < 1e-6  # only the projection itself is in half precision


def test_wrong_arguments_name_their_field() -> None:
    with pytest.raises(ConfigError, match="distance_margin: got -1.0, needed 0 or more"):
        AlignmentConfig(distance_margin=-1.0)
    with pytest.raises(ConfigError, match="max_tokens: got 1, needed 2 or more"):
        AlignmentConfig(max_tokens=1)
    model = LatentAlignment(4, 6)
    with pytest.raises(ValueError, match=r"latents: got shape \(2, 5, 1, 3, 3\), needed \(2, 4, t, h, w\)"):
        model(_draw(2, 5, 1, 3, 3), _draw(2, 6, 1, 3, 3))
    with pytest.raises(ValueError, match=r"features: got shape \(1, 6, 1, 3, 3\), needed \(2, 6, t, h, w\)"):
        model(_draw(2, 4, 1, 3, 3), _draw(1, 6, 1, 3, 3))
