"""Solvers on every path: order, the straight path as a limit, diffusers' schedulers, and what the network predicts."""

import math
from itertools import pairwise

import pytest
import torch

from ltd.diffusion import (
    GvpPathConfig,
    LinearPath,
    LinearPathConfig,
    ParametrizationConfig,
    Path,
    SamplerConfig,
    ShiftConfig,
    VpPathConfig,
    as_denoiser,
    build_path,
    sample,
    time_grid,
)
from ltd.diffusion.solvers import Dpmpp2m, EulerMaruyama, UniPc
from ltd.rng import DrawRandom
from tests.diffusion.test_prediction import MEAN, PREDICTIONS, STD, analytic_network, best_velocity

PATHS = {config.kind: config for config in (LinearPathConfig(), GvpPathConfig(), VpPathConfig())}
#: Solver and order -> order from t = 0.9 to 0.1, where nothing is infinite; UniPC's corrector adds one.
ORDERS = {("dpmpp_2m", 2): 2, ("unipc", 1): 2, ("unipc", 2): 3, ("unipc", 3): 4}


def build(kind, order, path):
    return Dpmpp2m(build_path(path)) if kind == "dpmpp_2m" else UniPc(order, build_path(path))


def moments(path, time):
    t = torch.tensor(time, dtype=torch.float64)
    alpha, sigma = build_path(path).alpha(t).item(), build_path(path).sigma(t).item()
    return alpha * MEAN, math.sqrt((alpha * STD) ** 2 + sigma**2)


def flow(path, x, now, after):
    (mean, std), (mean_after, std_after) = moments(path, now), moments(path, after)
    return mean_after + std_after / std * (x - mean)


def exact(path):
    """The best velocity of a path, as solvers ask for it."""
    made = build_path(path)
    return lambda x, time: best_velocity(made, x, torch.full((len(x),), time, dtype=torch.float64))


def go(solver, velocity, x, times):
    for now, after in pairwise(times):
        x = solver.step(velocity, x, now, after)
    return x


def inside(steps):
    return torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()


@pytest.mark.parametrize(("kind", "order"), ORDERS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_full_order_away_from_the_ends(gaussian, kind, order, path):
    start = flow(path, gaussian.noise, 1.0, 0.9)
    truth = flow(path, start, 0.9, 0.1)
    errors = [
        (go(build(kind, order, path), exact(path), start, inside(steps)) - truth).abs().max().item()
        for steps in (320, 640)
    ]
    assert math.log2(errors[0] / errors[1]) > ORDERS[kind, order] - 0.2
    assert errors[1] < 2e-4


@pytest.mark.parametrize(("kind", "order"), ORDERS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_from_noise_to_data(gaussian, kind, order, path):
    config = SamplerConfig(kind=kind, order=order, steps=200, path=path)
    denoiser = lambda x, t, cond: best_velocity(build_path(path), x, t)  # noqa: E731
    x = sample(denoiser, gaussian.noise, None, config)
    truth = flow(path, gaussian.noise, 1.0, 0.0)
    assert (x - truth).abs().max() < (0.015 if path.kind == "vp" else 0.003)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_sde_has_the_datas_mean_and_deviation(path):
    random = DrawRandom(3, list(range(4096)))
    noise = random.normal((2, 1, 1, 2), "sample").double()
    denoiser = lambda x, t, cond: best_velocity(build_path(path), x, t)  # noqa: E731
    x = sample(denoiser, noise, None, SamplerConfig(kind="sde", steps=200, path=path), random=random)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01) and x.std().item() == pytest.approx(STD, rel=0.02)
    calm = sample(denoiser, noise, None, SamplerConfig(kind="sde", steps=9, noise=0.0, path=path), random=random)
    assert torch.allclose(calm, sample(denoiser, noise, None, SamplerConfig(steps=9)), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_straight_path_is_not_touched_by_scaling(dtype):
    for steps in (7, 50, 999):
        t = time_grid(SamplerConfig(steps=steps, shift=ShiftConfig(factor=3.0)), 4)
        assert torch.equal(LinearPath().alpha(t) + LinearPath().sigma(t), torch.ones_like(t)), "states are divided by 1"
    x = torch.randn(4, 2, 1, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    velocity = lambda state, time: torch.sin(3 * state + time)  # noqa: E731
    now, after = 0.8, 0.55
    data = x - now * velocity(x, now)
    plain = after / now * x + (1 - after / now) * data
    for solver in (Dpmpp2m(LinearPath()), UniPc(2, LinearPath())):
        assert torch.equal(solver.step(velocity, x, now, after), plain)
    random = DrawRandom(0, range(4))
    v = velocity(x, now)
    mean = x - (now - after) * (v + 0.5 * 1.0 * (x + (1 - now) * v))
    fresh = random.normal(x.shape[1:], "sde-0").to(x)
    noisy = mean + math.sqrt(1.0 * now * (now - after)) * fresh
    assert torch.equal(EulerMaruyama(1.0, random, LinearPath()).step(velocity, x, now, after), noisy)


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_what_the_network_predicts_does_not_matter(gaussian, path, prediction):
    config = ParametrizationConfig(path=path, prediction=prediction)
    denoiser = as_denoiser(analytic_network(build_path(path), prediction), config)
    start = flow(path, gaussian.noise, 1.0, 0.9)

    def velocity(x, time):
        return denoiser(x, torch.full((len(x),), time, dtype=torch.float64), None)

    for kind, order in ORDERS:
        expected = go(build(kind, order, path), exact(path), start, inside(12))
        found = go(build(kind, order, path), velocity, start, inside(12))
        assert torch.allclose(found, expected, atol=1e-12), kind


@pytest.mark.parametrize("told", ["flow_prediction", "sample", "epsilon"])
@pytest.mark.parametrize(("kind", "order"), [("dpmpp_2m", 2), ("unipc", 2), ("unipc", 3)])
def test_multistep_solvers_equal_diffusers_on_its_grid(gaussian, kind, order, told):
    diffusers = pytest.importorskip("diffusers")
    name = {"dpmpp_2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}[kind]
    options = {"solver_order": order, "prediction_type": told, "final_sigmas_type": "zero", "lower_order_final": False}
    if told == "flow_prediction":
        options |= {"use_flow_sigmas": True, "flow_shift": 1.0}
    else:
        options |= {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "leading"}
    if kind == "unipc":
        options |= {"solver_type": "bh2"}
    for config in [LinearPathConfig()] if told == "flow_prediction" else [GvpPathConfig(), VpPathConfig()]:
        path: Path = build_path(config)
        scheduler = getattr(diffusers, name)(num_train_timesteps=1000, **options)
        scheduler.set_timesteps(12)
        sigmas = scheduler.sigmas.double()
        times = (sigmas if told == "flow_prediction" else path.time(sigmas)).tolist()
        x = ours = gaussian.noise.clone()
        solver = build(kind, order, config)
        for index, (now, after) in enumerate(pairwise(times)):
            if after == 0:  # their last step depends on further options
                break
            t = torch.full((len(x),), now, dtype=torch.float64)
            v = best_velocity(path, x, t)
            output = {"flow_prediction": v, "sample": path.data(x, v, t), "epsilon": path.noise(x, v, t)}[told]
            x = scheduler.step(output, scheduler.timesteps[index], x).prev_sample
            ours = solver.step(exact(config), ours, now, after)
            assert torch.allclose(ours, x, atol=2e-6), index
        assert index == 11
