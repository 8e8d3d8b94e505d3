import math

import pytest
import torch

from ltd.config import ConfigError
from ltd.diffusion import (
    DataPredictionConfig,
    EdmPredictionConfig,
    FlowMatching,
    FlowMatchingConfig,
    GvpPathConfig,
    LinearPath,
    LogitNormalConfig,
    LognormalConfig,
    NoisePredictionConfig,
    ShiftConfig,
    UniformConfig,
    VpPathConfig,
)
from ltd.rng import DrawRandom

DRAWS = DrawRandom(5, range(4))
X0 = torch.randn(4, 3, 1, 2, 2, generator=torch.Generator().manual_seed(1))


def oracle(x0):
    """The denoiser that knows the data: v = (x_t - x0) / t, exact for one x0."""
    return lambda x_t, t, cond: (x_t - x0) / t.reshape(-1, 1, 1, 1, 1)


def test_the_true_velocity_has_no_loss_and_a_constant_error_counts_once():
    objective = FlowMatching(FlowMatchingConfig())
    losses, weight = objective.loss(oracle(X0), X0, None, DRAWS)
    assert losses.shape == (4,) and losses.max() < 1e-8 and torch.equal(weight, torch.ones(4))
    losses, _ = objective.loss(lambda x, t, c: oracle(X0)(x, t, c) + 0.5, X0, None, DRAWS)
    assert torch.allclose(losses, torch.full((4,), 0.25), atol=1e-4)


def test_the_denoiser_sees_the_path_at_the_draws_noise_and_times():
    seen = {}

    def spy(x_t, t, cond):
        seen.update(x_t=x_t, t=t, cond=cond)
        return torch.zeros_like(x_t)

    objective = FlowMatching(FlowMatchingConfig())
    losses, _ = objective.loss(spy, X0, "condition", DRAWS)
    eps = DRAWS.normal((3, 1, 2, 2), "noise")
    assert seen["cond"] == "condition"
    assert torch.equal(seen["x_t"], LinearPath().interpolate(X0, eps, seen["t"]))
    assert torch.allclose(losses, (eps - X0).square().flatten(1).mean(1))


def test_a_sample_does_not_depend_on_its_batch():
    objective = FlowMatching(FlowMatchingConfig(stratified=True))
    denoiser = lambda x_t, t, cond: x_t.sin() * t.reshape(-1, 1, 1, 1, 1)  # noqa: E731
    whole, _ = objective.loss(denoiser, X0, None, DRAWS)
    part, _ = objective.loss(denoiser, X0[2:3], None, DrawRandom(5, [2]))
    assert torch.equal(whole[2:3], part)


def test_the_best_velocity_of_gaussian_data_reaches_the_known_floor(gaussian):
    """At time t the unavoidable error is the variance of eps - x0 given x_t: std^2 / ((1-t)^2 std^2 + t^2)."""
    rows = 500
    x0 = gaussian.mean + gaussian.std * torch.randn(rows, 8, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    objective, random = FlowMatching(FlowMatchingConfig()), DrawRandom(0, range(rows))
    for t in (0.2, 0.5, 0.9):
        floor = gaussian.std**2 / (((1 - t) * gaussian.std) ** 2 + t**2)
        best = objective.loss_at(gaussian.velocity, x0, None, random, t).mean().item()
        worse = objective.loss_at(lambda *a: gaussian.velocity(*a) + 0.2, x0, None, random, t).mean().item()
        assert best == pytest.approx(floor, rel=0.04)
        assert worse == pytest.approx(best + 0.04, abs=0.02)


def test_cosine_term():
    plain = FlowMatching(FlowMatchingConfig())
    with_cosine = FlowMatching(FlowMatchingConfig(cosine_weight=0.5))
    eps = DRAWS.normal((3, 1, 2, 2), "noise")
    for predicted, cosine in ((2 * (eps - X0), 1.0), (-(eps - X0), -1.0)):
        losses = [o.loss_at(lambda *_, p=predicted: p, X0, None, DRAWS, 0.5) for o in (plain, with_cosine)]
        assert torch.allclose(losses[1], losses[0] + 0.5 * (1 - cosine), atol=1e-5)


def test_the_loss_is_float32_for_a_half_precision_denoiser_and_data():
    objective = FlowMatching(FlowMatchingConfig())
    losses, _ = objective.loss(lambda x, t, c: x.bfloat16(), X0.bfloat16(), None, DRAWS)
    assert losses.dtype == torch.float32


def test_the_shift_reaches_training_times_and_evaluation_times():
    config = FlowMatchingConfig(times=UniformConfig(), shift=ShiftConfig(base_cells=1))
    seen = []
    FlowMatching(config).loss(lambda x, t, c: seen.append(t) or x, X0, None, DRAWS)
    FlowMatching(FlowMatchingConfig(times=UniformConfig())).loss(lambda x, t, c: seen.append(t) or x, X0, None, DRAWS)
    assert torch.allclose(seen[0], 2 * seen[1] / (1 + seen[1]))  # 4 cells against 1: factor 2
    assert FlowMatching(config).evaluation_times(1, cells=9).item() == pytest.approx(0.75)
    logit_normal = FlowMatching(FlowMatchingConfig(times=LogitNormalConfig(mean=math.log(3))))
    assert logit_normal.evaluation_times(1, cells=9).item() == pytest.approx(0.75)


MIXED = [
    torch.randn(3, *size, generator=torch.Generator().manual_seed(i))
    for i, size in enumerate([(1, 2, 2), (3, 2, 4), (1, 2, 2), (2, 6, 1)])
]


def nonlinear(x_t, t, cond):
    if isinstance(x_t, list):
        return [nonlinear(x[None], time, cond)[0] for x, time in zip(x_t, t.split(1), strict=True)]
    return x_t.sin() * (1 + t.reshape(-1, 1, 1, 1, 1))


def test_samples_of_any_sizes_equal_the_same_samples_one_by_one():
    config = FlowMatchingConfig(shift=ShiftConfig(base_cells=6), stratified=True, cosine_weight=0.3)
    objective = FlowMatching(config)
    losses, weights = objective.loss(nonlinear, MIXED, None, DRAWS)
    alone = [objective.loss(nonlinear, x[None], None, DrawRandom(5, [i]))[0] for i, x in enumerate(MIXED)]
    assert torch.equal(losses, torch.cat(alone)) and torch.equal(weights, torch.ones(4))
    assert losses.unique().numel() == 4
    fixed = objective.loss_at(nonlinear, [x.double() for x in MIXED], None, DRAWS, 0.3)
    assert fixed.dtype == torch.float64
    alone = [objective.loss_at(nonlinear, x[None], None, DrawRandom(5, [i]), 0.3) for i, x in enumerate(MIXED)]
    assert torch.allclose(fixed.float(), torch.cat(alone), atol=1e-6)


def test_a_list_meets_the_noise_and_times_of_the_batch_bit_by_bit():
    seen = []

    def spy(x_t, t, cond):
        seen.append((x_t if isinstance(x_t, list) else list(x_t), t))
        return x_t

    objective = FlowMatching(FlowMatchingConfig(shift=ShiftConfig(base_cells=3)))
    both = [objective.loss(spy, x0, None, DRAWS)[0] for x0 in (X0, list(X0))]
    assert torch.equal(*both)
    assert torch.equal(seen[0][1], seen[1][1])
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], seen[1][0], strict=True))


def test_negative_cosine_weight_is_refused():
    with pytest.raises(ConfigError, match="cosine_weight: got -1"):
        FlowMatchingConfig(cosine_weight=-1.0)


def crossed(x_t, t, cond):
    return x_t * (0.5 + t.reshape(-1, 1, 1, 1, 1))


def test_with_every_option_off_the_losses_are_those_from_before_there_were_options():
    """Recorded at the commit before; and, bit by bit, the formula of then."""
    plain = FlowMatching(FlowMatchingConfig())
    recorded = [3.5869932174682617, 2.5096895694732666, 2.7117302417755127, 2.889817476272583]
    losses, _ = plain.loss(crossed, X0, None, DRAWS)
    assert losses.tolist() == pytest.approx(recorded, rel=1e-6)
    config = FlowMatchingConfig(
        times=UniformConfig(), shift=ShiftConfig(factor=2.0, base_cells=3), stratified=True, cosine_weight=0.5
    )
    recorded = [2.4279189109802246, 3.506725549697876, 1.8691853284835815, 3.27648663520813]
    assert FlowMatching(config).loss(crossed, X0, None, DRAWS)[0].tolist() == pytest.approx(recorded, rel=1e-6)
    seen = []
    losses, _ = plain.loss(plain.denoiser(lambda x, t, c: seen.append((x, t)) or crossed(x, t, c)), X0, None, DRAWS)
    (x_t, t), eps = seen[0], DRAWS.normal(X0.shape[1:], "noise")
    time = t.reshape(-1, 1, 1, 1, 1)
    assert torch.equal(x_t, (1 - time) * X0 + time * eps)
    assert torch.equal(losses, (crossed(x_t, t, None) - (eps - X0)).square().flatten(1).mean(1))


@pytest.mark.parametrize("path", [GvpPathConfig(), VpPathConfig()], ids=lambda config: config.kind)
@pytest.mark.parametrize(
    ("loss", "prediction"), [("x0", DataPredictionConfig()), ("eps", NoisePredictionConfig())], ids=["x0", "eps"]
)
def test_in_its_own_space_the_loss_is_the_plain_error_of_the_output_at_any_time(path, loss, prediction):
    objective = FlowMatching(FlowMatchingConfig(path=path, prediction=prediction, loss=loss))
    eps = DRAWS.normal(X0.shape[1:], "noise").double()
    target = {"x0": X0.double(), "eps": eps}[loss]
    for time in (0.0, 1e-4, 0.3, 1 - 1e-4, 1.0):
        found = objective.loss_at(objective.denoiser(crossed), X0.double(), None, DRAWS, time)
        t = torch.full((4,), time, dtype=torch.float64)
        output = crossed(objective.path.interpolate(X0.double(), eps, t), t, None)
        assert torch.allclose(found, (output - target).square().flatten(1).mean(1), rtol=1e-9)


def test_edm_loss_is_the_plain_error_of_the_networks_own_output():
    objective = FlowMatching(FlowMatchingConfig(prediction=EdmPredictionConfig(sigma_data=0.8), loss="edm"))
    eps = DRAWS.normal(X0.shape[1:], "noise").double()
    t = torch.full((4,), 0.3, dtype=torch.float64)
    x_t = objective.path.interpolate(X0.double(), eps, t)
    output = crossed(*objective.prediction.inputs(x_t, t), None)
    expected = (output - objective.prediction.target(X0.double(), eps, t)).square().flatten(1).mean(1)
    found = objective.loss_at(objective.denoiser(crossed), X0.double(), None, DRAWS, 0.3)
    assert torch.allclose(found, expected, rtol=1e-10)


def test_min_snr_is_the_error_of_the_noise_near_noise_and_gamma_times_that_of_the_data_near_data():
    """min(SNR, gamma) |x0 error|^2, where |eps error|^2 = SNR |x0 error|^2; at t = 0.5 the SNR is 1."""

    def at(loss, time, gamma=4.0):
        objective = FlowMatching(FlowMatchingConfig(loss=loss, min_snr_gamma=gamma))
        return objective.loss_at(crossed, X0.double(), None, DRAWS, time)

    for time in (0.5, 0.9):
        assert torch.equal(at("min_snr", time), at("eps", time))
    assert torch.allclose(at("min_snr", 0.2), 4 * at("x0", 0.2), rtol=1e-12)  # SNR 16
    assert torch.equal(at("min_snr", 0.2, gamma=100.0), at("eps", 0.2))
    assert torch.allclose(at("eps", 0.2), 16 * at("x0", 0.2), rtol=1e-12)
    assert torch.allclose(at("velocity", 0.2), at("x0", 0.2) / 0.2**2, rtol=1e-12)


@pytest.mark.parametrize("cosine", [0.0, 0.3])
def test_cells_that_do_not_count_change_nothing_and_the_others_are_averaged(cosine):
    objective = FlowMatching(FlowMatchingConfig(cosine_weight=cosine))
    plain, ones = objective.loss(crossed, X0, None, DRAWS)
    alike, _ = objective.loss(crossed, X0, None, DRAWS, cell_weight=torch.full((4, 1, 2, 2), 3.0))
    assert torch.allclose(alike, plain, rtol=1e-6) and torch.equal(ones, torch.ones(4))
    mask = torch.zeros(4, 1, 2, 2, dtype=torch.bool)
    mask[:3, :, 0, 1] = True
    found, weights = objective.loss(crossed, X0, None, DRAWS, cell_weight=mask)
    assert weights.tolist() == [1, 1, 1, 0] and found[3] == 0
    disturbed = lambda x, t, c: torch.where(mask[:, None], crossed(x, t, c), 1e3)  # noqa: E731
    assert torch.equal(objective.loss(disturbed, X0, None, DRAWS, cell_weight=mask)[0], found)
    parts = [torch.nn.functional.one_hot(torch.tensor(i), 4).view(1, 1, 2, 2).expand(4, 1, 2, 2) for i in range(4)]
    by_cell = torch.stack([objective.loss(crossed, X0, None, DRAWS, cell_weight=part)[0] for part in parts])
    assert torch.allclose(by_cell.mean(0), plain, rtol=1e-5) and torch.allclose(by_cell[1, :3], found[:3], rtol=1e-6)


def test_cell_weights_of_a_list_equal_those_of_a_batch_and_of_wrong_shape_are_refused():
    objective = FlowMatching(FlowMatchingConfig(prediction=NoisePredictionConfig(), loss="min_snr", cosine_weight=0.1))
    denoiser, weight = objective.denoiser(nonlinear), torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = objective.loss(denoiser, X0, None, DRAWS, cell_weight=weight)
    packed = objective.loss(denoiser, list(X0), None, DRAWS, cell_weight=list(weight))
    assert torch.allclose(batch[0], packed[0], rtol=1e-6) and torch.equal(batch[1], packed[1])
    with pytest.raises(ValueError, match=r"cell_weight: got \(4, 2, 2\), needed \(4, 1, 2, 2\)"):
        objective.loss(denoiser, X0, None, DRAWS, cell_weight=weight[:, 0])


def test_time_range_squeezes_training_and_evaluation_times():
    seen = []
    spy = lambda x, t, c: seen.append(t) or x  # noqa: E731
    for time_range in ((0.0, 1.0), (0.2, 0.6)):
        FlowMatching(FlowMatchingConfig(time_range=time_range)).loss(spy, X0, None, DRAWS)
    assert torch.allclose(seen[1], 0.2 + 0.4 * seen[0])
    objective = FlowMatching(FlowMatchingConfig(times=UniformConfig(), time_range=(0.2, 0.6)))
    assert objective.evaluation_times(2, cells=4).tolist() == pytest.approx([0.3, 0.5])


def test_lognormal_times_follow_the_objectives_path_and_the_shift_the_latents_dimension():
    for path, median in ((GvpPathConfig(), 2 / math.pi * math.atan(math.exp(-0.6))), (VpPathConfig(), None)):
        objective = FlowMatching(FlowMatchingConfig(path=path, times=LognormalConfig(mean=-0.6)))
        time = objective.evaluation_times(1, cells=4)
        ratio = objective.path.sigma(time) / objective.path.alpha(time)
        assert ratio.item() == pytest.approx(math.exp(-0.6), rel=1e-5)
        assert median is None or time.item() == pytest.approx(median)
    seen = []
    for shift in (ShiftConfig(base_dim=3), ShiftConfig(factor=2.0)):  # 3 channels of 4 cells: sqrt(12 / 3)
        objective = FlowMatching(FlowMatchingConfig(shift=shift))
        objective.loss(lambda x, t, c: seen.append(t) or x, X0, None, DRAWS)
        seen.append(objective.evaluation_times(3, 4, 3))
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "edm"}, "loss: got edm with prediction.kind velocity"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma: got 0.0"),
        ({"time_range": (0.6, 0.2)}, "time_range: got \\(0.6, 0.2\\)"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        FlowMatchingConfig(**fields)
