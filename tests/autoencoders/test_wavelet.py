"""The Haar transform: energy, inverse and sub-bands against closed forms; losses on them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ltd.autoencoders.wavelet import Subbands, haar_forward, haar_inverse, high_frequency_loss, subband_losses

#: Place of each band along the coefficients' third axis.
LH, HL, HH = 0, 1, 2


def _video(frames: int = 5, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(2, 3, frames, size, 2 * size, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


def _energy(bands: Subbands) -> Tensor:
    return sum((band.square().flatten(1).sum(1) for band in bands.high), bands.low.square().flatten(1).sum(1))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("frames", [1, 5])
def test_keeps_energy_and_inverts(levels: int, time: bool, frames: int) -> None:
    video = _video(frames)
    bands = haar_forward(video, levels=levels, time=time)
    torch.testing.assert_close(_energy(bands), video.square().flatten(1).sum(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(haar_inverse(bands), video, rtol=0, atol=1e-14)
    assert len(bands.high) == levels
    assert {band.shape[2] for band in bands.high} == {7 if time else 3}
    assert bands.low.shape == (2, 3, 1 + (frames - 1) // (2**levels if time else 1), 8 // 2**levels, 16 // 2**levels)


def test_bands_of_one_block_are_its_sums_and_differences() -> None:
    a, b, c, d = 1.0, 2.0, 4.0, 8.0
    bands = haar_forward(torch.tensor([[a, b], [c, d]]).reshape(1, 1, 1, 2, 2))
    assert bands.low.flatten().tolist() == [(a + b + c + d) / 2]
    expected = {LH: (a - b + c - d) / 2, HL: (a + b - c - d) / 2, HH: (a - b - c + d) / 2}
    for band, value in expected.items():
        assert bands.high[0][0, 0, band].item() == value


def test_levels_are_listed_from_the_finest() -> None:
    coarse = torch.zeros(1, 1, 1, 4, 4)
    coarse[..., :2, :] = 1.0  # an edge between blocks: invisible at the first level
    first, second = haar_forward(coarse, levels=2).high
    assert first.abs().max() == 0
    assert second[0, 0, HL].item() == 2.0


def test_the_first_frame_stands_alone_in_time() -> None:
    video = _video(5)
    bands, plain = haar_forward(video, levels=2, time=True), haar_forward(video[:, :, :1], levels=2)
    torch.testing.assert_close(bands.low[:, :, :1], plain.low, rtol=1e-14, atol=1e-15)
    for with_time, without in zip(bands.high, plain.high, strict=True):
        torch.testing.assert_close(with_time[:, :, :3, :1], without, rtol=1e-14, atol=1e-15)
        assert with_time[:, :, 3:, 0].abs().max() < 1e-15
    still = video[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert haar_forward(still, time=True).high[0][:, :, 3:].abs().max() < 1e-15
    flat = torch.tensor([0.0, 1.0, -1.0]).reshape(1, 1, 3, 1, 1).expand(1, 1, 3, 2, 2)
    high_in_time = haar_forward(flat, time=True).high[0][0, 0, 3, 1]  # one block (1, -1) in time, its second frame
    assert high_in_time.item() == pytest.approx(8 / math.sqrt(8))


def test_sizes_that_do_not_halve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"height must be a multiple of 4 .*got 6; nearest: 4 and 8"):
        haar_forward(torch.zeros(1, 3, 1, 6, 8), levels=2)
    with pytest.raises(ValueError, match=r"num_frames must be 1 \+ k \* 2 .*got 4"):
        haar_forward(torch.zeros(1, 3, 4, 8, 8), time=True)
    with pytest.raises(ValueError, match="levels: got 0, needed 1 or more"):
        haar_forward(torch.zeros(1, 3, 1, 8, 8), levels=0)
    with pytest.raises(ValueError, match=r"video: got shape \(3, 8, 8\), needed"):
        haar_forward(torch.zeros(3, 8, 8))


@pytest.mark.parametrize("time", [False, True])
def test_squared_terms_add_up_to_the_squared_error(time: bool) -> None:
    video, other = _video(), _video(seed=1)
    losses = subband_losses(other, video, levels=2, kind="l2", time=time)
    total = (other - video).square().flatten(1).mean(1).float()
    torch.testing.assert_close(losses["low"] + losses["high"], total, rtol=1e-6, atol=0)


def test_an_error_in_one_band_changes_its_term_only() -> None:
    video = _video(1)
    checker = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(4, 8)
    losses = subband_losses(video + 0.1 * checker, video)
    # Each 2 x 2 block has one coefficient HH of 0.2: a quarter of them is 0.2 per pixel value.
    torch.testing.assert_close(losses["high"], torch.full((2,), 0.2 / 4), rtol=1e-5, atol=0)
    assert losses["low"].max() < 1e-6
    losses = subband_losses(video + 0.1, video)
    torch.testing.assert_close(losses["low"], torch.full((2,), 0.2 / 4), rtol=1e-5, atol=0)
    assert losses["high"].max() < 1e-6


def test_kinds_of_cost() -> None:
    video = torch.zeros(2, 1, 1, 2, 2)
    reconstruction = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]).reshape(2, 1, 1, 2, 2)
    # Sample 0 has HH = 2 and nothing else, over 4 pixel values; sample 1 is perfect.
    for kind, expected in {"l1": 2.0, "l2": 4.0, "charbonnier": math.sqrt(4.0 + 0.25) - 0.5}.items():
        loss = high_frequency_loss(reconstruction, video, kind=kind, epsilon=0.5)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, torch.tensor([expected / 4, 0.0]))
    limit = high_frequency_loss(reconstruction, video, kind="charbonnier", epsilon=1e-6)
    torch.testing.assert_close(limit, high_frequency_loss(reconstruction, video), rtol=1e-5, atol=0)


def test_every_level_adds_its_bands_and_images_agree_with_and_without_time() -> None:
    video, other = _video(1), _video(1, seed=1)
    one, two = (high_frequency_loss(other, video, levels=levels) for levels in (1, 2))
    low = haar_forward(other - video).low
    expected = one + haar_forward(low).high[0].abs().flatten(1).sum(1).float() / video[0].numel()
    torch.testing.assert_close(two, expected, rtol=1e-6, atol=0)
    for kind in ("l1", "charbonnier"):
        plain = high_frequency_loss(other, video, levels=2, kind=kind)  # type: ignore[arg-type]
        timed = high_frequency_loss(other, video, levels=2, kind=kind, time=True)  # type: ignore[arg-type]
        torch.testing.assert_close(timed, plain, rtol=1e-5, atol=0)


def test_losses_are_fp32_for_half_precision_and_have_gradients() -> None:
    video = _video(dtype=torch.float32)
    reconstruction = _video(seed=1, dtype=torch.bfloat16).requires_grad_()
    loss = high_frequency_loss(reconstruction, video, kind="charbonnier")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, high_frequency_loss(reconstruction.float(), video, kind="charbonnier"))
    loss.sum().backward()
    assert reconstruction.grad is not None and reconstruction.grad.abs().max() > 0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"reconstruction: got shape .* needed"):
        high_frequency_loss(_video(1), _video(5))
    with pytest.raises(ValueError, match="epsilon: got 0.0, needed more than 0"):
        high_frequency_loss(_video(), _video(), kind="charbonnier", epsilon=0.0)
    with pytest.raises(ValueError, match="kind: got 'huber'"):
        high_frequency_loss(_video(), _video(), kind="huber")  # type: ignore[arg-type]
