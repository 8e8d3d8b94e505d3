"""Health of latents and codes, droplets and spectra against closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from ltd.evaluation.latent_health import (
    RADIAL_BINS,
    ActivationProbe,
    CodeUsage,
    LatentHealth,
    droplets,
    power_spectrum,
    radial_spectrum,
)


def _random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _latents(shape: tuple[int, ...] = (4, 3, 2, 16, 16), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_random(seed), dtype=torch.float64)


def _power_law(slope: float, batch: int, channels: int, height: int, width: int) -> Tensor:
    """Gaussian maps of power ``f ** -slope``, cut out of larger ones so that they do not wrap around."""
    noise = torch.randn(batch, channels, 1, 2 * height, 2 * width, generator=_random(3), dtype=torch.float64)
    rows, columns = torch.fft.fftfreq(2 * height)[:, None], torch.fft.fftfreq(2 * width)
    radius = (rows**2 + columns**2).sqrt().double()
    radius[0, 0] = 1
    colored = torch.fft.ifft2(torch.fft.fft2(noise) * radius ** (-slope / 2)).real
    return colored[..., :height, :width]


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("size", [(64, 64), (32, 48), (16, 16)])
def test_spectrum_slope_is_that_of_known_noise(slope: float, size: tuple[int, int]) -> None:
    health = LatentHealth()
    health.update(_power_law(slope, 16, 4, *size))
    assert health.spectrum_slope == pytest.approx(-slope, abs=0.1 if slope < 3 and min(size) > 16 else 0.3)


def test_spectrum_slope_weighs_channels_alike_whatever_their_scale_and_leaves_out_dead_ones() -> None:
    latents = torch.cat([_power_law(2.0, 8, 1, 32, 32), _power_law(0.0, 8, 1, 32, 32)], 1)
    latents = latents / latents.std((0, 2, 3, 4), keepdim=True)
    even, scaled, silent = LatentHealth(), LatentHealth(), LatentHealth()
    even.update(latents)
    scaled.update(latents * torch.tensor([1.0, 30.0]).view(1, 2, 1, 1, 1))
    assert scaled.spectrum_slope == pytest.approx(even.spectrum_slope, abs=1e-9)
    silent.update(latents * torch.tensor([1.0, 1e-3]).view(1, 2, 1, 1, 1))
    assert silent.dead.tolist() == [False, True]
    assert silent.spectrum_slope == pytest.approx(-2, abs=0.2)


def test_moments_and_kl_per_channel_equal_two_passes() -> None:
    offset = torch.tensor([100.0, -3.0, 0.0]).view(1, 3, 1, 1, 1)
    mean, logvar = 2 * _latents() + offset, _latents(seed=1) - 1
    health = LatentHealth()
    for part in range(4):
        health.update(mean[part : part + 1], logvar[part : part + 1])
    rows = mean.movedim(1, 0).flatten(1)
    normal, standard = torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(normal, standard).mean((0, 2, 3, 4))
    torch.testing.assert_close(health.mean, rows.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(health.std, rows.std(1, correction=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(health.posterior_std, logvar.exp().mean((0, 2, 3, 4)).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(health.kl, kl, rtol=1e-12, atol=0)
    values = health.values()
    assert values["kl_nats_max"] == pytest.approx(float(kl[0])) and values["kl_nats_min"] == pytest.approx(float(kl[2]))
    assert values["kl_nats_mean"] == pytest.approx(float(kl.mean()))
    assert values["mean_abs_max"] == pytest.approx(float(rows.mean(1)[0]))
    assert values["std_max"] == pytest.approx(float(health.std.max())) and values["dead_channels"] == 0
    assert set(health.channels()) == {"mean", "std", "posterior_std", "kl_nats"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_are_found_on_either_side_and_in_any_batch(sign: int, order: tuple[int, int]) -> None:
    latents = _latents().clamp(-2, 2) + 50
    latents[1, 1, 0, 3, 3] = -60
    health = LatentHealth()
    for row in order:
        health.update(sign * latents[row : row + 1])
    assert health.max_abs == 60
    assert health.max_sigmas == pytest.approx(abs(float((health.mean[1] + sign * 60) / health.std[1])))


def test_dead_channels_by_the_posterior_and_by_the_largest() -> None:
    """A channel of variance v, posterior of variance p: dead at v <= p / 100 or at v <= largest v / 10000."""
    scale = torch.tensor([1.0, 0.12, 0.08, 0.009]).view(1, 4, 1, 1, 1)
    mean = scale * _latents((8, 4, 1, 16, 16))
    mean = 3 * mean / mean[:, :1].std(correction=0)
    alone, beside = LatentHealth(), LatentHealth()
    alone.update(mean)
    beside.update(mean, torch.full_like(mean, math.log(9.0)))
    assert alone.dead.tolist() == [False, False, False, True]
    assert beside.dead.tolist() == [False, False, True, True]
    assert beside.values()["dead_channels"] == 2
    constant = LatentHealth()
    constant.update(torch.ones(2, 3, 1, 8, 8))
    assert constant.dead.all() and constant.spectrum_slope is None
    assert "spectrum_slope" not in constant.values()


@pytest.mark.parametrize("time", [1, 3])
def test_merged_halves_equal_the_whole(time: int) -> None:
    mean, logvar = _latents((4, 3, time, 8, 12)), _latents((4, 3, time, 8, 12), 1)
    mean = mean + 1000
    whole, merged, other = LatentHealth(), LatentHealth(), LatentHealth()
    whole.update(mean, logvar)
    merged.update(mean[:3], logvar[:3])
    other.update(mean[3:], logvar[3:])
    merged.merge(json.loads(json.dumps(other.state())))
    merged.merge(LatentHealth().state())
    assert len(whole.values()) == 10
    assert merged.values() == pytest.approx(whole.values(), rel=1e-10)
    assert merged.channels()["std"] == pytest.approx(whole.channels()["std"], rel=1e-10)
    fresh = LatentHealth()
    fresh.merge(whole.state())
    assert fresh.values() == whole.values()


def test_small_maps_and_latents_without_posterior_leave_figures_out() -> None:
    health = LatentHealth()
    health.update(_latents((2, 3, 1, 4, 16)))
    assert set(health.values()) == {"mean_abs_max", "std_min", "std_max", "dead_channels", "max_abs", "max_sigmas"}
    assert set(health.channels()) == {"mean", "std"}


def test_white_noise_has_its_variance_at_every_frequency() -> None:
    maps = 3 * _latents((1, 400, 1, 24, 32))[0, :, 0]
    power = power_spectrum(maps).mean(0)
    assert power[3:-3, 3:-3].mean() == pytest.approx(9, rel=0.02)
    assert power[0, 0] < 1e-20  # the mean is gone
    bins, _, counts = radial_spectrum(maps)
    filled = counts > 0
    assert (bins.mean(0)[filled] / counts[filled]).sub(9).abs().max() < 0.6
    assert counts.sum() == (_radius(24, 32) <= 0.5).sum() - 9


def _radius(height: int, width: int) -> Tensor:
    return (torch.fft.fftfreq(height).double()[:, None] ** 2 + torch.fft.fftfreq(width).double() ** 2).sqrt()


@pytest.mark.parametrize(("cycles", "ring"), [((16, 0), 8), ((0, 16), 8), ((12, 16), 10), ((0, 64), 31)])
def test_radial_bins_hold_their_frequencies(cycles: tuple[int, int], ring: int) -> None:
    """Of 128 x 128 positions: 16 cycles are 1/8 cycle per position, 64 are Nyquist; bins are 1/64 wide."""
    rows, columns = torch.arange(128.0, dtype=torch.float64)[:, None], torch.arange(128.0, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * (cycles[0] * rows + cycles[1] * columns) / 128)
    power, logs, counts = radial_spectrum(wave[None])
    near = power[0, max(ring - 1, 0) : ring + 1].sum()
    assert int(power[0].argmax()) == ring and near > 0.7 * power.sum() and len(counts) == RADIAL_BINS
    mean_frequency = (logs / counts).exp()
    assert ring / 64 <= mean_frequency[ring] <= (ring + 1) / 64


def test_droplets_are_counted_per_map() -> None:
    activation = torch.randn(2, 3, 2, 32, 32, generator=_random())
    activation[1, 2, 1, 5, 5:8] = -60
    activation[0, 0, 0] = 4.0
    positions, shares = droplets(activation)
    assert positions.shape == shares.shape == (2, 3, 2)
    assert positions[1, 2, 1] == 3 and positions.sum() == 3
    assert shares[1, 2, 1] == pytest.approx(3 * 60**2 / (3 * 60**2 + 1021), abs=0.01)
    assert shares[0, 0, 0] == 0
    frame_positions, _ = droplets(activation[:, :, 1])
    assert torch.equal(frame_positions, positions[:, :, 1])


def test_a_spot_is_found_up_to_one_percent_of_its_map() -> None:
    """A spot of share s in a flat map lies sqrt(1 / s - 1) standard deviations off."""
    maps = torch.zeros(2, 1, 40, 50)
    maps[0].view(-1)[:19] = 1  # sqrt(2000 / 19 - 1) = 10.2
    maps[1].view(-1)[:20] = 1  # sqrt(2000 / 20 - 1) = 9.95
    positions, shares = droplets(maps)
    assert positions.flatten().tolist() == [19, 0]
    assert shares.flatten()[0] == pytest.approx(1 - 19 / 2000)
    maps[1, 0, 0, 0] = math.nan
    positions, shares = droplets(maps)
    assert positions[1] == 2000 and shares[1].isnan()


def test_droplets_refuse_what_cannot_hold_one() -> None:
    with pytest.raises(ValueError, match=r"got activation \(2, 64\), needed"):
        droplets(torch.zeros(2, 64))
    with pytest.raises(ValueError, match="got maps of 101 positions, needed more than 101"):
        droplets(torch.zeros(1, 1, 1, 101))
    assert droplets(torch.eye(102)[:1].view(1, 1, 6, 17))[0] == 1


class _Streamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.second((self.first(x), None))


def test_probe_collects_outputs_until_closed() -> None:
    model, x = _Streamed(), torch.randn(2, 3, 12, 12, generator=_random())
    with ActivationProbe(model, ["first", "second"]) as probe:
        plain = model(x)[0]
        model(x[:1])
        taken = probe.take()
        assert probe.take() == {}
    assert [len(taken[name]) for name in ("first", "second")] == [2, 2]
    assert torch.equal(taken["first"][0], plain) and torch.equal(taken["second"][1], plain[:1])
    assert plain.requires_grad and not taken["first"][0].requires_grad
    model(x)
    assert probe.take() == {}


def test_probe_names_the_nearest_and_leaves_no_hook_behind() -> None:
    model = _Streamed()
    with pytest.raises(ValueError, match="no submodule secnd; nearest is second"):
        ActivationProbe(model, ["first", "secnd"])
    assert not model.first._forward_hooks


def test_perplexity_of_known_histograms() -> None:
    usage = CodeUsage(8)
    usage.update(torch.arange(4).repeat(5).view(2, 2, 5))
    assert usage.perplexity == pytest.approx(4) and usage.share_unused == 0.5
    usage.update(torch.full((20,), 7))
    # half of the uses are code 7, an eighth each of codes 0 to 3
    assert usage.perplexity == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(8)))
    usage.update(torch.tensor(5))
    assert usage.values() == {"perplexity": usage.perplexity, "share_unused": 2 / 8}


def test_merged_codes_equal_the_whole_and_strangers_are_refused() -> None:
    codes = torch.randint(0, 50, (3, 100), generator=_random())
    whole, merged, other = CodeUsage(64), CodeUsage(64), CodeUsage(64)
    whole.update(codes)
    merged.update(codes[:1])
    other.update(codes[1:])
    merged.merge(json.loads(json.dumps(other.state())))
    assert merged.values() == whole.values()
    with pytest.raises(ValueError, match="got code -1..64, needed 0..63"):
        whole.update(torch.tensor([-1, 64]))
    with pytest.raises(ValueError, match="got counts of 8 codes, needed 64"):
        whole.merge(CodeUsage(8).state())
    with pytest.raises(ValueError, match="no codes were counted"):
        CodeUsage(8).values()


def test_refusals_name_what_was_got() -> None:
    with pytest.raises(ValueError, match="no latents were counted"):
        LatentHealth().values()
    with pytest.raises(ValueError, match=r"got latents \(2, 3, 8, 8\), needed"):
        LatentHealth().update(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"differ in shape: \(1, 3, 1, 8, 8\) and \(1, 3, 1, 8, 9\)"):
        LatentHealth().update(torch.zeros(1, 3, 1, 8, 8), torch.zeros(1, 3, 1, 8, 9))
    health = LatentHealth()
    health.update(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(ValueError, match="got latents of 2 channels after 3"):
        health.update(torch.zeros(1, 2, 1, 8, 8))
