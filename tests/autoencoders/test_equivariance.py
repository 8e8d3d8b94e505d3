"""Transforms of latents and of pixels that belong together, how they are drawn, and the error of an encoder."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.autoencoders.equivariance import (
    EquivarianceConfig,
    EquivarianceDraw,
    Transform,
    draw_transforms,
    equivariance_error,
    transform_latents,
    transform_video,
)
from ltd.config import ConfigError
from ltd.shapes import Compression

COMPRESSION = Compression(1, 4, 4)


def _video(frames: int = 3, height: int = 16, width: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _pool(video: Tensor) -> Tensor:
    return F.avg_pool3d(video, (1, 4, 4))


def _repeat(latents: Tensor) -> Tensor:
    return latents.repeat_interleave(4, 3).repeat_interleave(4, 4)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_pooling_and_repeating_commute_with_turns(turns: int) -> None:
    video, turn = _video(), Transform(quarter_turns=turns)
    assert equivariance_error(_pool, video, COMPRESSION, turn).max() < 1e-6
    decoded = _repeat(transform_latents(_pool(video), turn))
    torch.testing.assert_close(decoded, transform_video(_repeat(_pool(video)), turn, COMPRESSION), rtol=0, atol=1e-6)


def test_error_by_hand_and_of_an_encoder_that_does_not_commute() -> None:
    video = _video(1, 8, 8)
    ramp = torch.arange(4.0).reshape(1, 1, 1, 2, 2)

    def positional(x: Tensor) -> Tensor:
        return _pool(x) * 0 + ramp

    turn = Transform(quarter_turns=2)  # latents 0 1 / 2 3 -> 3 2 / 1 0, against 0 1 / 2 3
    error = equivariance_error(positional, video, COMPRESSION, turn)
    expected = (9 + 1 + 1 + 9) ** 0.5 / (0 + 1 + 4 + 9) ** 0.5
    torch.testing.assert_close(error, torch.full((2,), expected))
    assert equivariance_error(positional, video, COMPRESSION, Transform()).max() == 0
    shrink = Transform(scale=(0.75, 0.75))
    difference = _pool(transform_video(_video(), shrink, COMPRESSION)) - transform_latents(_pool(_video()), shrink)
    expected = difference.flatten(1).norm(dim=1) / _pool(_video()).flatten(1).norm(dim=1)
    error = equivariance_error(_pool, _video().requires_grad_(), COMPRESSION, shrink)
    torch.testing.assert_close(error, expected)
    assert error.min() > 0.01 and not error.requires_grad


def test_a_quarter_turn_moves_pixels_as_it_moves_latents() -> None:
    latents = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).reshape(1, 1, 1, 2, 3)
    turned = transform_latents(latents, Transform(quarter_turns=1))
    assert turned[0, 0, 0].tolist() == [[3.0, 6.0], [2.0, 5.0], [1.0, 4.0]]
    assert torch.equal(transform_latents(turned, Transform(quarter_turns=3)), latents)
    video = transform_video(_repeat(latents), Transform(quarter_turns=1), COMPRESSION)
    assert torch.equal(video, _repeat(turned))


@pytest.mark.parametrize("scale", [1 / 32, 0.25, 0.4, 0.5, 0.7, 31 / 32])
@pytest.mark.parametrize("turns", [0, 1, 2])
def test_video_has_exactly_the_size_of_its_latents(scale: float, turns: int) -> None:
    transform = Transform(scale=(scale, scale), quarter_turns=turns)
    latents = transform_latents(_pool(_video()), transform)
    video = transform_video(_video(), transform, COMPRESSION)
    assert _pool(video).shape == latents.shape
    assert video.shape[3] == 4 * latents.shape[3] and video.shape[4] == 4 * latents.shape[4]
    sides = [max(1, int(side * scale + 0.5)) for side in (4, 6)]
    assert list(latents.shape[3:]) == (sides[::-1] if turns % 2 else sides)


def test_scaling_is_bilinear_per_frame_and_the_same_for_all_frames() -> None:
    video, transform = _video(), Transform(scale=(0.5, 0.5), quarter_turns=1)
    moved = transform_video(video, transform, COMPRESSION)
    for frame in range(3):
        expected = F.interpolate(video[:, :, frame], (8, 12), mode="bilinear", align_corners=False)
        assert torch.equal(moved[:, :, frame], torch.rot90(expected, 1, (2, 3)))
        single = transform_video(video[:, :, frame : frame + 1], transform, COMPRESSION)
        assert torch.equal(moved[:, :, frame : frame + 1], single)


def test_unequal_scales() -> None:
    moved = transform_video(_video(), Transform(scale=(0.5, 1.0)), COMPRESSION)
    assert moved.shape[3:] == (8, 24)
    assert transform_latents(_pool(_video()), Transform(scale=(1.0, 0.5))).shape[3:] == (4, 3)


def test_identity_gives_the_very_input() -> None:
    video = _video()
    for transform in (Transform(), Transform(quarter_turns=4)):
        assert transform.is_identity
        assert transform_video(video, transform, COMPRESSION) is video
        assert transform_latents(video, transform) is video
        odd = _video(height=18)
        assert transform_video(odd, transform, COMPRESSION) is odd  # nothing to refuse where nothing is done
    assert not Transform(scale=(1.0, 0.5)).is_identity and not Transform(quarter_turns=2).is_identity


def test_gradients_pass() -> None:
    latents = _pool(_video()).requires_grad_()
    transform_latents(latents, Transform(scale=(0.5, 0.5), quarter_turns=1)).sum().backward()
    assert latents.grad is not None
    torch.testing.assert_close(latents.grad, torch.full_like(latents, 0.25))  # half of each side, from exact means


def test_cells_that_are_not_square_and_sizes_that_do_not_divide_are_refused() -> None:
    oblong = Compression(1, 4, 8)
    with pytest.raises(ValueError, match="quarter_turns: got 1 with a compression of 4 x 8"):
        transform_video(_video(), Transform(quarter_turns=1), oblong)
    half = transform_video(_video(), Transform(quarter_turns=2, scale=(0.5, 0.4)), oblong)
    assert half.shape[3:] == (8, 8)
    with pytest.raises(ValueError, match=r"height must be a multiple of 4 \(compression\), got 18"):
        transform_video(_video(height=18), Transform(scale=(0.5, 0.5)), COMPRESSION)
    with pytest.raises(ValueError, match=r"encode: gave .* needed .* Compression\(t=1, h=8, w=8\)"):
        equivariance_error(_pool, _video(), Compression(1, 8, 8), Transform(scale=(0.7, 0.7)))


def test_draws_are_a_function_of_seed_and_step() -> None:
    config = EquivarianceConfig()
    draws = [draw_transforms(config, 3, step) for step in range(50)]
    state = torch.get_rng_state()
    assert [draw_transforms(config, 3, step) for step in reversed(range(50))] == draws[::-1]
    assert torch.equal(state, torch.get_rng_state())
    assert [draw_transforms(config, 4, step) for step in range(50)] != draws


def test_shares_and_ranges_of_draws() -> None:
    config = EquivarianceConfig(probability=0.4, scales=(4, 7), scale_unit=8)
    draws = [draw_transforms(config, 0, step) for step in range(1500)]
    moved = [draw.latents for draw in draws if not draw.latents.is_identity]
    shrunk = [draw.input for draw in draws if not draw.input.is_identity]
    assert not any(not draw.latents.is_identity and not draw.input.is_identity for draw in draws)
    assert len(moved) / 1500 == pytest.approx(0.4, abs=0.05)
    assert len(shrunk) / (1500 - len(moved)) == pytest.approx(0.25, abs=0.06)
    for transforms in (moved, shrunk):
        assert {transform.scale for transform in transforms} == {(k / 8, k / 8) for k in (4, 5, 6, 7)}
    # Scaled and turned, always both; a shrunk input is not turned.
    assert {transform.quarter_turns for transform in moved} == {1, 2, 3}
    assert {transform.quarter_turns for transform in shrunk} == {0}
    for turns in (1, 2, 3):
        assert sum(t.quarter_turns == turns for t in moved) / len(moved) == pytest.approx(1 / 3, abs=0.08)


def test_settings_of_draws() -> None:
    plain = EquivarianceConfig(probability=0.0, downscale_share=0.0)
    assert {draw_transforms(plain, 0, step) for step in range(50)} == {EquivarianceDraw()}
    always = EquivarianceConfig(probability=1.0, rotate=False)
    assert {draw_transforms(always, 0, step).latents.quarter_turns for step in range(50)} == {0}
    turns_only = EquivarianceConfig(probability=1.0, scales=(32, 32))
    assert {draw_transforms(turns_only, 0, step).latents.scale for step in range(50)} == {(1.0, 1.0)}
    both = [draw_transforms(EquivarianceConfig(probability=1.0, anisotropic=True), 0, step) for step in range(50)]
    assert sum(draw.latents.scale[0] != draw.latents.scale[1] for draw in both) > 40
    # A setting changes what it names: the steps chosen, their heights and turns stay.
    one = [draw_transforms(EquivarianceConfig(probability=1.0), 0, step) for step in range(50)]
    assert [draw.latents.scale[0] for draw in both] == [draw.latents.scale[0] for draw in one]
    assert [draw.latents.quarter_turns for draw in both] == [draw.latents.quarter_turns for draw in one]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, r"probability: got 1.5, needed within \[0, 1\]"),
        ({"downscale_share": -0.1}, r"downscale_share: got -0.1, needed within \[0, 1\]"),
        ({"scales": (0, 4)}, r"scales: got \(0, 4\), needed 1 <= low"),
        ({"scales": (9, 8)}, r"scales: got \(9, 8\)"),
        ({"scales": (8, 33)}, r"scales: got \(8, 33\), .* scale_unit = 32"),
    ],
)
def test_wrong_settings_name_their_field(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EquivarianceConfig(**options)  # type: ignore[arg-type]


HALF = Compression(1, 2, 2)


class _Toy(nn.Module):
    """A linear autoencoder with overlapping kernels: 2 numbers for 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv3d(1, 2, (1, 4, 4), (1, 2, 2), (0, 1, 1))
        self.decoder = nn.ConvTranspose3d(2, 1, (1, 6, 6), (1, 2, 2), (0, 2, 2))

    def loss(self, video: Tensor, draw: EquivarianceDraw) -> Tensor:
        """Compute the loss of one step as the module's docstring has it."""
        video = transform_video(video, draw.input, HALF)
        latents = transform_latents(self.encoder(video), draw.latents)
        return F.mse_loss(self.decoder(latents), transform_video(video, draw.latents, HALF))


def _train(model: _Toy, video: Tensor, config: EquivarianceConfig, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(video, draw_transforms(config, 0, step)).backward()
        optimizer.step()


def _measure(model: _Toy, video: Tensor) -> tuple[float, float]:
    """Give the error and the PSNR in dB of plain reconstruction."""
    transforms = (Transform(quarter_turns=1), Transform((0.75, 0.75), 1))
    errors = [equivariance_error(model.encoder, video, HALF, transform).mean().item() for transform in transforms]
    with torch.no_grad():
        return sum(errors) / 2, (10 * torch.log10(4 / model.loss(video, EquivarianceDraw()))).item()


def test_training_lowers_the_error_and_keeps_the_reconstruction() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Toy()
    coarse = torch.rand(100, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    video = F.interpolate(coarse, (16, 16), mode="bicubic")[:, :, None]
    plain = EquivarianceConfig(probability=0.0, downscale_share=0.0)
    _train(model, video, plain, 150)
    control = copy.deepcopy(model)
    before, psnr = _measure(model, video)
    _train(model, video, EquivarianceConfig(), 200)
    _train(control, video, plain, 100)
    after, psnr_after = _measure(model, video)
    assert after < 0.65 * before
    assert psnr_after > psnr
    assert _measure(control, video)[0] > 0.85 * before  # more training alone does not do it
