import math

import pytest
import torch

from ltd.config import ConfigError
from ltd.diffusion import GuidanceConfig, SamplerConfig, ShiftConfig, sample, time_grid
from ltd.rng import DrawRandom
from tests.diffusion.conftest import MEAN, STD, velocity


def error(gaussian, kind, steps, factor):
    config = SamplerConfig(kind=kind, steps=steps, shift=ShiftConfig(factor=factor))
    return (sample(gaussian.velocity, gaussian.noise, None, config) - gaussian.truth).abs().max().item()


@pytest.mark.parametrize(("kind", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_order_of_convergence(gaussian, kind, order, factor):
    errors = [error(gaussian, kind, steps, factor) for steps in (80, 160, 320)]
    ratios = [errors[0] / errors[1], errors[1] / errors[2]]
    assert ratios == pytest.approx([2**order] * 2, rel=0.1)


@pytest.mark.parametrize(("kind", "tolerance"), [("euler", 0.01), ("heun", 1e-4)])
def test_mean_and_standard_deviation_of_gaussian_data(gaussian, kind, tolerance):
    x = sample(gaussian.velocity, gaussian.noise, None, SamplerConfig(kind=kind, steps=250))
    assert x.mean().item() == pytest.approx(gaussian.mean, rel=tolerance)
    assert x.std(correction=0).item() == pytest.approx(gaussian.std, rel=tolerance)


def test_grid_runs_from_noise_to_data_and_follows_the_size():
    grid = time_grid(SamplerConfig(steps=4, shift=ShiftConfig(base_cells=4)), cells=16)
    assert grid.tolist() == pytest.approx([1, 6 / 7, 2 / 3, 0.4, 0])  # factor 2
    assert grid[0] == 1 and grid[-1] == 0


@pytest.mark.parametrize(("kind", "calls"), [("euler", 5), ("heun", 9)])
def test_number_of_evaluations_and_progress(gaussian, kind, calls):
    times, steps = [], []
    sample(
        lambda x, t, c: times.append(t[0].item()) or torch.zeros_like(x),
        gaussian.noise,
        None,
        SamplerConfig(kind=kind, steps=5),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert len(times) == calls and max(times) == 1.0 and min(times) > 0
    assert steps == [(k, 5) for k in range(1, 6)]


def test_float64_state_keeps_what_float32_loses_over_many_steps(gaussian):
    seen = []

    def denoiser(x_t, t, cond):
        seen.append((x_t.dtype, t.dtype))
        return gaussian.velocity(x_t.double(), t).to(x_t.dtype)

    out = {}
    for state in ("float32", "float64"):
        config = SamplerConfig(steps=2000, state=state)
        out[state] = sample(denoiser, gaussian.noise.float(), None, config)
    assert set(seen) == {(torch.float32, torch.float32)} and out["float64"].dtype == torch.float32
    drift = {
        state: (x - sample(gaussian.velocity, gaussian.noise, None, config)).abs().max() for state, x in out.items()
    }
    assert drift["float64"] < drift["float32"] / 3


def test_guidance_without_a_null_condition_is_refused(gaussian):
    config = SamplerConfig(guidance=GuidanceConfig(scale=3.0))
    with pytest.raises(ValueError, match=r"guidance.scale = 3.0 needs a null condition"):
        sample(gaussian.velocity, gaussian.noise, "cond", config)


def test_no_steps_are_refused():
    with pytest.raises(ConfigError, match="steps: got 0"):
        SamplerConfig(steps=0)


SOLVERS = ("dpmpp_2m", "unipc")
#: Order measured from 320 to 640 steps. Both ends lie at an infinite log-signal-to-noise ratio, where a step is of
#: first order: UniPC of order 3 is of order 2 in all, and the others come near theirs slowly.
ORDERS = {("dpmpp_2m", 2): 1.65, ("unipc", 1): 1.7, ("unipc", 2): 1.9, ("unipc", 3): 1.9}


@pytest.mark.parametrize(("kind", "order"), ORDERS)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_order_of_the_multistep_solvers(gaussian, kind, order, factor):
    def at(steps):
        config = SamplerConfig(kind=kind, order=order, steps=steps, shift=ShiftConfig(factor=factor))
        return (sample(gaussian.velocity, gaussian.noise, None, config) - gaussian.truth).abs().max().item()

    first, second = at(320), at(640)
    assert math.log2(first / second) > ORDERS[kind, order]
    assert second < error(gaussian, "euler", 640, factor) / 10


@pytest.mark.parametrize("kind", [*SOLVERS, "sde"])
def test_one_evaluation_a_step_and_none_at_data(gaussian, kind):
    times = []
    sample(
        lambda x, t, c: times.append(t[0].item()) or torch.zeros_like(x),
        gaussian.noise,
        None,
        SamplerConfig(kind=kind, steps=5),
        random=DrawRandom(0, list(range(64))),
    )
    assert times == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("kind", [*SOLVERS, "sde"])
def test_one_step_is_the_mean(gaussian, kind):
    config = SamplerConfig(kind=kind, steps=1, order=1)
    x = sample(gaussian.velocity, gaussian.noise, None, config, random=DrawRandom(0, list(range(64))))
    if kind != "sde":
        assert x == pytest.approx(torch.full_like(x, gaussian.mean), abs=1e-12)
    assert x.isfinite().all()


def test_the_sde_has_the_data_s_mean_and_deviation_and_is_each_sample_s_own():
    draws = list(range(4096))
    random = DrawRandom(3, draws)
    noise = random.normal((2, 1, 2, 2), "sample").double()
    config = SamplerConfig(kind="sde", steps=200)
    x = sample(velocity, noise, None, config, random=random)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, rel=0.02)
    ode = sample(velocity, noise, None, SamplerConfig(steps=200))
    assert (x - ode).std() > 0.1, "it is another sample than the ODE's from the same noise"
    part = sample(velocity, noise[5:9], None, config, random=DrawRandom(3, draws[5:9]))
    assert torch.equal(part, x[5:9])
    calm = SamplerConfig(kind="sde", steps=20, noise=0.0)
    still = sample(velocity, noise, None, calm, random=random)
    assert torch.allclose(still, sample(velocity, noise, None, SamplerConfig(steps=20)), atol=1e-12)
