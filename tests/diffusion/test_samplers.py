import pytest
import torch

from ltd.config import ConfigError
from ltd.diffusion import GuidanceConfig, SamplerConfig, ShiftConfig, sample, time_grid


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
