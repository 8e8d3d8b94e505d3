"""Outputs of every kind mean the velocity that theory gives, on every path and up to both ends."""

import math
from dataclasses import replace

import pytest
import torch

from ltd.config import ConfigError
from ltd.diffusion import (
    DataPredictionConfig,
    EdmPredictionConfig,
    FlowMatching,
    FlowMatchingConfig,
    GvpPathConfig,
    LinearPathConfig,
    NoisePredictionConfig,
    ParametrizationConfig,
    SamplerConfig,
    VelocityPredictionConfig,
    VpPathConfig,
    as_denoiser,
    build_path,
    build_prediction,
    expand_time,
    read_parametrization,
    sample,
)
from ltd.rng import DrawRandom

PATHS = [LinearPathConfig(), GvpPathConfig(), VpPathConfig()]
PREDICTIONS = [
    VelocityPredictionConfig(),
    DataPredictionConfig(),
    NoisePredictionConfig(),
    EdmPredictionConfig(sigma_data=0.8),
    EdmPredictionConfig(time_input="time"),
]
MEAN, STD = 0.7, 0.4


def wide(t):
    return t.double().reshape(-1, 1, 1, 1, 1)


def posterior_mean(path, x_t, t):
    """E[x0 | x_t] of data N(MEAN, STD^2)."""
    a, s = path.alpha(wide(t)), path.sigma(wide(t))
    return MEAN + a * STD**2 * (x_t - a * MEAN) / ((a * STD) ** 2 + s**2)


def best_velocity(path, x_t, t):
    """alpha' E[x0 | x_t] + sigma' E[eps | x_t]."""
    x0 = posterior_mean(path, x_t, t)
    a, s = path.alpha(wide(t)), path.sigma(wide(t))
    return path.alpha_dot(wide(t)) * x0 + path.sigma_dot(wide(t)) * (x_t - a * x0) / s


def analytic_network(path, config):
    """The best network for Gaussian data: it is given what a real one is, and returns what it is asked for."""

    def network(x, time, cond):
        t = time.double()
        if isinstance(config, EdmPredictionConfig):
            if config.time_input == "log_sigma":
                t = path.time(torch.exp(4 * t))
            a, s = path.alpha(wide(t)), path.sigma(wide(t))
            norm = (s**2 + (a * config.sigma_data) ** 2).sqrt()
            x_t = x.double() * norm
            # Karras et al., Eq. 7 on y = x_t / alpha at noise level r = sigma / alpha.
            r, y, sd = s / a, x_t / a, config.sigma_data
            skip, out = sd**2 / (r**2 + sd**2), r * sd / (r**2 + sd**2).sqrt()
            return (posterior_mean(path, x_t, t) - skip * y) / out
        x0 = posterior_mean(path, x, t)
        match config.kind:
            case "velocity":
                return best_velocity(path, x, t)
            case "x0":
                return x0
            case "eps":
                return (x - path.alpha(wide(t)) * x0) / path.sigma(wide(t))

    return network


def objective(path, prediction, **fields):
    return FlowMatching(FlowMatchingConfig(path=path, prediction=prediction, **fields))


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=lambda config: config.kind)
def test_every_output_means_the_same_velocity(path, prediction):
    built = build_path(path)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    x_t = torch.randn(19, 2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoiser = as_denoiser(analytic_network(built, prediction), ParametrizationConfig(path=path, prediction=prediction))
    truth = best_velocity(built, x_t, t)
    assert ((denoiser(x_t, t, None) - truth).abs() / truth.abs().clamp(min=1)).max() < 1e-10


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=lambda config: config.kind)
def test_the_target_is_what_means_the_true_velocity(path, prediction):
    built, x = build_path(path), torch.randn(2, 19, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    made = build_prediction(prediction, built)
    found = made.velocity(made.target(x[0], x[1], t), built.interpolate(x[0], x[1], t), t)
    assert torch.allclose(found, built.velocity(x[0], x[1], t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS[1:], ids=str)
@pytest.mark.parametrize("path", PATHS, ids=lambda config: config.kind)
def test_at_the_ends_velocities_stay_finite_and_bounded_in_half_precision_too(path, prediction):
    denoiser = as_denoiser(lambda x, t, c: x.tanh(), ParametrizationConfig(path=path, prediction=prediction))
    t = torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0])
    v = denoiser(torch.randn(4, 2, 1, 2, 2).bfloat16(), t, None)
    assert v.dtype == torch.bfloat16 and v.isfinite().all() and v.abs().max() < 500


@pytest.mark.parametrize(
    ("prediction", "loss"),
    [(p, loss) for p in PREDICTIONS for loss in ("velocity", "x0", "eps", "min_snr")]
    + [(p, "edm") for p in PREDICTIONS if p.kind == "edm"],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS, ids=lambda config: config.kind)
def test_the_best_network_of_gaussian_data_has_the_loss_that_theory_gives(path, prediction, loss):
    rows = 400
    built = build_path(path)
    noise = torch.randn(rows, 8, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    made = objective(path, prediction, loss=loss)
    denoiser = made.denoiser(analytic_network(built, prediction))
    for time in (0.1, 0.5, 0.9):
        t = torch.tensor(time, dtype=torch.float64)
        a, s = built.alpha(t).item(), built.sigma(t).item()
        wronskian = a * built.sigma_dot(t).item() - built.alpha_dot(t).item() * s
        variance = STD**2 * s**2 / ((a * STD) ** 2 + s**2)  # of x0 given x_t
        snr, scale = (a / s) ** 2, getattr(prediction, "sigma_data", 1.0)
        weight = {
            "velocity": (wronskian / s) ** 2,
            "x0": 1.0,
            "eps": snr,
            "min_snr": min(snr, 5.0),
            "edm": (1 / snr + scale**2) / (scale**2 / snr),
        }[loss]
        found = made.loss_at(denoiser, MEAN + STD * noise, None, DrawRandom(0, range(rows)), time).mean().item()
        assert found == pytest.approx(weight * variance, rel=0.04)


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=lambda config: config.kind)
def test_samples_of_the_best_network_have_the_datas_mean_and_deviation(path, prediction, gaussian):
    if prediction.kind == "x0":  # by default sampling stops short of the data by what remains at min_time
        prediction = replace(prediction, min_time=0.005)
    config = ParametrizationConfig(path=path, prediction=prediction)
    denoiser = as_denoiser(analytic_network(build_path(path), prediction), config)
    away = lambda x, t, c: denoiser(x, t.clamp(max=1 - 1e-6), c)  # noqa: E731  the analytic one divides by alpha
    x = sample(away, gaussian.noise, None, SamplerConfig(kind="heun", steps=200))
    assert x.mean().item() == pytest.approx(gaussian.mean, abs=0.02)
    assert x.std(correction=0).item() == pytest.approx(gaussian.std, rel=0.03)


def test_edm_inputs_and_targets_have_unit_variance_at_every_noise_level():
    config = EdmPredictionConfig(sigma_data=0.8)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (
        0.8 * torch.randn(5, 40_000, dtype=torch.float64, generator=generator),
        torch.randn(5, 40_000, generator=generator).double(),
    )
    t = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64)
    for path in map(build_path, PATHS):
        made = build_prediction(config, path)
        given, time = made.inputs(path.interpolate(x0, eps, t), t)
        assert given.std(1).tolist() == pytest.approx([1] * 5, rel=0.02)
        assert made.target(x0, eps, t).std(1).tolist() == pytest.approx([1] * 5, rel=0.02)
        assert torch.allclose(time, torch.log(path.sigma(t) / path.alpha(t)) / 4)


def test_edm_network_that_predicts_zero_means_the_best_velocity_of_centred_gaussian_data():
    """F = 0 leaves x0 = c_skip y, the posterior mean of N(0, sigma_data^2)."""
    config = ParametrizationConfig(prediction=EdmPredictionConfig(sigma_data=STD))
    x_t, t = torch.randn(7, 2, 1, 2, 2).double(), torch.linspace(0.1, 0.9, 7).double()
    found = as_denoiser(lambda x, time, c: torch.zeros_like(x), config)(x_t, t, None)
    a, s = 1 - wide(t), wide(t)
    x0 = a * STD**2 * x_t / ((a * STD) ** 2 + s**2)
    assert torch.allclose(found, (x_t - x0) / s, rtol=1e-12)


def test_time_input_tells_the_network_the_time_itself():
    seen = []
    network = lambda x, time, c: seen.append(time) or x  # noqa: E731
    t = torch.tensor([0.2, 0.7])
    for kind in ("time", "log_sigma"):
        config = ParametrizationConfig(prediction=EdmPredictionConfig(time_input=kind))
        as_denoiser(network, config)(torch.zeros(2, 1, 1, 1, 1), t, None)
    assert torch.equal(seen[0], t)
    assert seen[1].tolist() == pytest.approx([math.log(0.25) / 4, math.log(7 / 3) / 4])


@pytest.mark.parametrize("path", PATHS, ids=lambda config: config.kind)
def test_a_network_that_predicts_velocity_is_the_denoiser_itself(path):
    network = object()
    assert as_denoiser(network, ParametrizationConfig(path=path)) is network


@pytest.mark.parametrize("prediction", PREDICTIONS[1:], ids=str)
def test_a_list_of_samples_meets_what_a_batch_does(prediction):
    x_t, t = torch.randn(3, 2, 1, 2, 2), torch.tensor([0.1, 0.5, 0.9])

    def network(x, time, cond):
        if isinstance(x, list):
            return [network(row[None], when, cond)[0] for row, when in zip(x, time.split(1), strict=True)]
        return x.sin() * (1 + time.reshape(-1, 1, 1, 1, 1))

    denoiser = as_denoiser(network, ParametrizationConfig(path=GvpPathConfig(), prediction=prediction))
    assert torch.equal(torch.stack(denoiser(list(x_t), t, None)), denoiser(x_t, t, None))


@pytest.mark.parametrize("path", PATHS, ids=lambda config: config.kind)
@pytest.mark.parametrize("prediction", PREDICTIONS[1:], ids=str)
def test_a_time_per_frame_is_met_by_each_frame(prediction, path):
    x_t, t = torch.randn(2, 3, 4, 1, 2), torch.linspace(0.05, 0.95, 8).reshape(2, 4)

    def network(x, time, cond):
        return x.sin() * (1 + expand_time(time, x))

    denoiser = as_denoiser(network, ParametrizationConfig(path=path, prediction=prediction))
    found = denoiser(x_t, t, None)
    for frame in range(4):
        alone = denoiser(x_t[:, :, frame : frame + 1], t[:, frame], None)
        assert torch.allclose(found[:, :, frame : frame + 1], alone, rtol=1e-5, atol=1e-6)


def test_times_of_other_frames_are_refused():
    denoiser = as_denoiser(lambda x, time, c: x, ParametrizationConfig(prediction=DataPredictionConfig()))
    with pytest.raises(ValueError, match=r"t: got \(1, 3\) for \(1, 2, 4, 1, 1\), needed one a sample, or \(b, t\)"):
        denoiser(torch.zeros(1, 2, 4, 1, 1), torch.full((1, 3), 0.5), None)


def test_what_runs_could_not_choose_is_velocity_on_the_linear_path():
    assert read_parametrization({"shift": {}, "times": {"kind": "uniform"}}) == ParametrizationConfig()
    found = read_parametrization({"path": {"kind": "vp"}, "prediction": {"kind": "x0", "min_time": 0.1}})
    assert found == ParametrizationConfig(path=VpPathConfig(), prediction=DataPredictionConfig(min_time=0.1))
    with pytest.raises(ConfigError, match="prediction.kind"):
        read_parametrization({"prediction": {"kind": "score"}})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DataPredictionConfig(min_time=0.0), "min_time: got 0.0"),
        (lambda: NoisePredictionConfig(min_time=0.5), "min_time: got 0.5"),
        (lambda: EdmPredictionConfig(sigma_data=0.0), "sigma_data: got 0.0"),
        (lambda: EdmPredictionConfig(min_time=-1.0), "min_time: got -1.0"),
    ],
)
def test_bad_values_name_the_field(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
