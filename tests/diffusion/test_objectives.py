import math

import pytest
import torch

from ltd.config import ConfigError
from ltd.diffusion import FlowMatching, FlowMatchingConfig, LinearPath, LogitNormalConfig, ShiftConfig, UniformConfig
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
