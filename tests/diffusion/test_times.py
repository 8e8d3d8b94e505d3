import math

import pytest
import torch
from scipy import stats

from ltd.config import ConfigError
from ltd.diffusion import (
    GvpPathConfig,
    LogitNormalConfig,
    LognormalConfig,
    ModeConfig,
    SamplerConfig,
    ShiftConfig,
    UniformConfig,
    VpPathConfig,
    build_path,
    draw_times,
    quantile_times,
    shift_times,
    time_grid,
)
from ltd.rng import DrawRandom

T = torch.linspace(0, 1, 101, dtype=torch.float64)


def test_shift_composes_inverts_and_keeps_the_ends():
    assert torch.allclose(shift_times(shift_times(T, 3.0), 2.5), shift_times(T, 7.5), atol=1e-14)
    assert torch.allclose(shift_times(shift_times(T, 3.0), 1 / 3), T, atol=1e-14)
    assert shift_times(T, 5.0)[[0, -1]].tolist() == [0.0, 1.0]
    assert shift_times(T, 1.0) is T
    assert (shift_times(T, 3.0)[1:-1] > T[1:-1]).all()  # above 1: towards noise


def test_shift_adds_its_logarithm_to_the_logit():
    inner = T[1:-1]
    assert torch.allclose(torch.logit(shift_times(inner, 3.0)), torch.logit(inner) + math.log(3.0), atol=1e-12)


def test_factor_follows_the_size():
    assert ShiftConfig().resolve(12345) == 1.0
    assert ShiftConfig(factor=3.0).resolve(12345) == 3.0
    assert ShiftConfig(base_cells=100).resolve(400) == pytest.approx(2.0)
    assert ShiftConfig(factor=1.5, base_cells=4096).resolve(196608) == pytest.approx(1.5 * math.sqrt(48))


def test_factor_follows_the_latent_dimension():
    """RAE: 16 x 16 cells of 768 channels against 4096 numbers."""
    shift = ShiftConfig(base_dim=4096)
    assert shift.resolve(256, 768) == pytest.approx(6.928, abs=1e-3)
    assert ShiftConfig(factor=0.5, base_dim=4096).resolve(256, 64) == pytest.approx(1.0)
    middle = time_grid(SamplerConfig(steps=2, shift=ShiftConfig(base_dim=4)), cells=9, channels=4)[1]
    assert middle.item() == pytest.approx(0.75)  # factor 3
    with pytest.raises(ValueError, match="shift.base_dim needs the number of latent channels"):
        shift.resolve(256)


def test_lognormal_noise_levels_are_a_logit_normal_on_the_linear_path():
    random = DrawRandom(3, range(64))
    plain = draw_times(LognormalConfig(mean=-0.6, std=1.2), random)
    assert torch.allclose(plain, draw_times(LogitNormalConfig(mean=-0.6, std=1.2), random), rtol=1e-6)


@pytest.mark.parametrize("config", [GvpPathConfig(), VpPathConfig()], ids=lambda config: config.kind)
def test_noise_levels_are_lognormal_on_any_path(config):
    path = build_path(config)
    t = draw_times(LognormalConfig(mean=-0.6, std=1.2), DrawRandom(3, range(4000)), path=path).double()
    logs = torch.log(path.sigma(t) / path.alpha(t)).numpy()
    assert stats.kstest(logs, stats.norm(-0.6, 1.2).cdf).pvalue > 0.01
    assert stats.kstest(logs, stats.norm(-0.5, 1.2).cdf).pvalue < 0.01


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.75])
def test_mode_times_are_the_papers_map_of_uniforms(scale):
    """SD3, Eq. 20: f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u); symmetric, and for s = 0 uniform."""
    u = T.flip(0)
    paper = 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)
    times = ModeConfig(scale=scale).quantile(T)
    assert torch.allclose(times, paper, atol=1e-14)
    assert torch.allclose(times + times.flip(0), torch.ones_like(T), atol=1e-14) and (times.diff() >= -1e-9).all()
    assert torch.equal(ModeConfig(scale=0.0).quantile(T), T)
    middle = ((times > 0.4) & (times < 0.6)).double().mean()
    assert (middle > 0.22) if scale > 0 else (middle < 0.18)


@pytest.mark.parametrize("stratified", [False, True])
def test_shifted_logit_normal_is_a_logit_normal_with_moved_mean(stratified):
    config = LogitNormalConfig(mean=-0.4, std=0.8)
    times = draw_times(config, DrawRandom(3, range(4000)), factor=2.5, stratified=stratified)
    expected = stats.norm(-0.4 + math.log(2.5), 0.8)
    assert stats.kstest(torch.logit(times.double()).numpy(), expected.cdf).pvalue > 0.01
    unshifted = stats.norm(-0.4, 0.8)
    assert stats.kstest(torch.logit(times.double()).numpy(), unshifted.cdf).pvalue < 1e-6


def test_uniform_times_are_uniform():
    times = draw_times(UniformConfig(), DrawRandom(0, range(4000)))
    assert stats.kstest(times.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("stratified", [False, True])
def test_a_time_belongs_to_its_draw(stratified):
    config = LogitNormalConfig()
    whole = draw_times(config, DrawRandom(0, range(8)), stratified=stratified)
    part = draw_times(config, DrawRandom(0, [6, 2]), stratified=stratified)
    assert torch.equal(part, whole[[6, 2]])
    assert not torch.equal(whole, draw_times(config, DrawRandom(1, range(8)), stratified=stratified))


@pytest.mark.parametrize("start", [0, 10**9])
def test_stratified_times_are_spread_evenly_over_any_run_of_draws(start):
    spread = draw_times(UniformConfig(), DrawRandom(0, range(start, start + 64)), stratified=True)
    independent = draw_times(UniformConfig(), DrawRandom(0, range(start, start + 64)))
    gaps = [times.sort().values.diff().max().item() for times in (spread, independent)]
    assert gaps[0] < 3 / 64 < gaps[1]


def test_quantile_times_split_the_distribution_into_equal_parts():
    config = LogitNormalConfig(mean=0.3, std=1.2)
    times = quantile_times(config, 5, factor=2.0)
    logits = torch.logit(times.double()).numpy()
    assert stats.norm(0.3 + math.log(2.0), 1.2).cdf(logits) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogitNormalConfig(std=0.0), "std: got 0.0"),
        (lambda: ShiftConfig(factor=-1.0), "factor: got -1.0"),
        (lambda: ShiftConfig(base_cells=0), "base_cells: got 0"),
        (lambda: ShiftConfig(base_dim=0), "base_dim: got 0"),
        (lambda: ShiftConfig(base_dim=4096, base_cells=256), "base_dim: got 4096 beside base_cells 256"),
        (lambda: LognormalConfig(std=0.0), "std: got 0.0"),
        (lambda: ModeConfig(scale=1.76), "scale: got 1.76, needed -1 to"),
    ],
)
def test_bad_values_name_the_field(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
