import math

import pytest
import torch

from ltd.config import ConfigError
from ltd.diffusion import GvpPathConfig, LinearPath, LinearPathConfig, VpPathConfig, build_path

PATHS = {config.kind: build_path(config) for config in (LinearPathConfig(), GvpPathConfig(), VpPathConfig())}
T = torch.linspace(0, 1, 101, dtype=torch.float64)


def draw(seed):
    return torch.randn(len(T), 3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X0, EPS = draw(0), draw(1)


def test_ends_inverses_and_derivative():
    torch.manual_seed(0)
    path = LinearPath()
    x0, eps = torch.randn(2, 4, 3, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 0.3, 0.7], dtype=torch.float64)
    x_t, v = path.interpolate(x0, eps, t), path.velocity(x0, eps)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[1], eps[1])  # t = 0 is data, t = 1 is noise
    assert torch.allclose(path.data(x_t, v, t), x0, atol=1e-14)
    assert torch.allclose(path.noise(x_t, v, t), eps, atol=1e-14)
    slope = (path.interpolate(x0, eps, t + 1e-4) - path.interpolate(x0, eps, t - 1e-4)) / 2e-4
    assert torch.allclose(slope, v, atol=1e-10)


@pytest.mark.parametrize("kind", PATHS)
def test_derivatives_are_those_of_the_shares(kind):
    path, inner, step = PATHS[kind], T[1:-1], 1e-6
    for value, slope in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        numeric = (value(inner + step) - value(inner - step)) / (2 * step)
        assert torch.allclose(slope(inner), numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PATHS)
def test_state_and_velocity_give_data_and_noise_back(kind):
    path, inner = PATHS[kind], T[1:]
    x0, eps = X0[1:], EPS[1:]
    x_t, v = path.interpolate(x0, eps, inner), path.velocity(x0, eps, inner)
    assert torch.allclose(path.data(x_t, v, inner), x0, atol=1e-10)
    assert torch.allclose(path.noise(x_t, v, inner), eps, atol=1e-10)
    assert torch.allclose(path.velocity_of_data(x_t, x0, inner), v, rtol=1e-10, atol=1e-10)
    below = inner[:-1]  # at t = 1 the linear and the GVP state hold no data
    found = path.velocity_of_noise(x_t[:-1], eps[:-1], below)
    assert torch.allclose(found, v[:-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", PATHS)
def test_the_factors_are_the_wronskians_and_finite_at_the_ends(kind):
    path, inner = PATHS[kind], T[1:]
    wronskian = path.alpha(inner) * path.sigma_dot(inner) - path.alpha_dot(inner) * path.sigma(inner)
    assert torch.allclose(path.data_per_velocity(inner), path.sigma(inner) / wronskian, rtol=1e-12, atol=1e-14)
    assert torch.allclose(path.noise_per_velocity(inner), path.alpha(inner) / wronskian, rtol=1e-12, atol=1e-14)
    for name in ("alpha", "sigma", "alpha_dot", "data_per_velocity", "noise_per_velocity"):
        assert getattr(path, name)(T).isfinite().all(), name
    assert path.alpha(T)[0] == 1 and path.sigma(T)[0] == 0 and path.data_per_velocity(T)[0] == 0
    assert torch.equal(path.interpolate(X0, EPS, T)[0], X0[0])


def test_known_values():
    half = torch.tensor(0.5, dtype=torch.float64)
    gvp, vp = PATHS["gvp"], PATHS["vp"]
    assert gvp.alpha(half).item() == pytest.approx(math.sqrt(0.5)) == gvp.sigma(half).item()
    assert gvp.alpha(torch.ones(1)).item() == 0
    # ln alpha = -(1/4) t^2 (20 - 0.1) - (1/2) t 0.1
    assert vp.alpha(half).item() == pytest.approx(math.exp(-19.9 / 16 - 0.025))
    assert vp.alpha(torch.ones(1)).item() == pytest.approx(math.exp(-(20 + 0.1) / 4))
    assert torch.allclose(vp.alpha(T) ** 2 + vp.sigma(T) ** 2, torch.ones_like(T), atol=1e-14)


def test_vp_keeps_small_noise_levels_that_cancellation_would_lose():
    t = torch.tensor([1e-12], dtype=torch.float64)
    assert PATHS["vp"].sigma(t).item() == pytest.approx(math.sqrt(0.1 * 1e-12), rel=1e-6)


def test_vp_is_the_continuous_limit_of_diffusers_linear_schedule():
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    alpha = scheduler.alphas_cumprod.double().sqrt()
    assert (PATHS["vp"].alpha(t) - alpha).abs().max() < 2e-3
    assert (PATHS["vp"].alpha(1 - t) - alpha).abs().max() > 0.5


@pytest.mark.parametrize("kind", PATHS)
def test_time_inverts_the_noise_level(kind):
    path, inner = PATHS[kind], T[1:-1]
    assert torch.allclose(path.time(path.sigma(inner) / path.alpha(inner)), inner, rtol=1e-11, atol=1e-13)
    assert path.time(torch.tensor([0.0, 1e9], dtype=torch.float64)).tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VpPathConfig(beta_min=0.0), "beta_min: got 0.0"),
        (lambda: VpPathConfig(beta_max=0.05), "beta_max: got 0.05, needed beta_min = 0.1"),
    ],
)
def test_bad_values_name_the_field(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
