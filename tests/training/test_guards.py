"""What counts as a spike, what is excluded, and what a checkpoint keeps of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ltd.config import ConfigError
from ltd.data import Batch, PackedBatch
from ltd.training.guards import GuardConfig, Guards


def watched(*, median: float = 2.0, steps: int = 12, **fields: Any) -> Guards:
    guards = Guards(GuardConfig(**{"spike": "skip", "loss_factor": 3.0, "grad_factor": 5.0, **fields}))
    for step in range(steps):
        guards.applied(median + 0.1 * (step % 3 - 1), 10.0)
    return guards


def batch(*keys: str) -> Batch:
    size = len(keys)
    return Batch(
        keys=keys,
        draws=tuple(range(size)),
        weight=torch.ones(size),
        captions=("",) * size,
        fps=torch.ones(size),
        mean=torch.full((size, 2, 1, 2, 2), math.nan),
        logvar=torch.ones(size, 2, 1, 2, 2),
        text_mask=torch.ones(size, 3, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    "fields",
    [{"loss_factor": 1.0}, {"grad_factor": 0.5}, {"window": 9}, {"max_discarded": -1}, {"loss_factor": math.nan}],
)
def test_bad_field_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        GuardConfig(**fields)


def test_loss_is_a_spike_above_the_factor_of_the_median() -> None:
    guards = watched()
    assert guards.judge({"loss": 5.99}, "loss") is None
    incident = guards.judge({"loss": 6.01}, "loss")
    assert incident is not None and incident.cause == "loss_spike" and incident.policy == "skip"
    assert "6.01" in incident.message and "3 x the median" in incident.message


def test_only_the_differentiated_term_can_spike() -> None:
    assert watched().judge({"loss": 2.0, "kl": 1e6}, "loss") is None


def test_too_few_steps_a_median_of_zero_and_ignore_look_for_no_spike() -> None:
    for guards in (watched(steps=9), watched(median=-2.0), watched(spike="ignore")):
        assert guards.judge({"loss": 1e9}, "loss") is None
    assert watched(steps=9).gradient_limit() == math.inf
    assert watched(spike="ignore").gradient_limit() == math.inf
    assert watched().gradient_limit() == 50.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_any_term_that_is_not_finite_stops(value: float) -> None:
    incident = Guards(GuardConfig()).judge({"loss": 1.0, "kl": value}, "loss")
    assert incident is not None and (incident.cause, incident.policy) == ("non_finite", "stop")
    assert "'kl'" in incident.message


def test_gradient_that_is_not_finite_follows_its_own_policy() -> None:
    guards = watched(non_finite="rewind")
    assert guards.judge_gradient(math.nan).policy == "rewind"
    spike = guards.judge_gradient(51.0)
    assert (spike.cause, spike.policy) == ("gradient_spike", "skip") and "51" in spike.message


def test_window_forgets() -> None:
    guards = watched(window=10)
    for _ in range(10):
        guards.applied(100.0, 1000.0)
    assert guards.judge({"loss": 200.0}, "loss") is None
    assert guards.gradient_limit() == 5000.0


def test_more_discarded_steps_than_allowed_stop_the_run() -> None:
    guards = watched(max_discarded=2, non_finite="skip")
    for key in ("a", "b"):
        incident = guards.judge({"loss": math.nan}, "loss")
        assert incident is not None and incident.policy == "skip"
        guards.exclude([key])
    last = guards.judge({"loss": math.nan}, "loss")
    assert last is not None and last.policy == "stop" and "max_discarded" in last.message


def test_excluded_samples_weigh_nothing_and_carry_nothing() -> None:
    guards = Guards(GuardConfig())
    original = batch("a", "b", "c")
    assert guards.mask(original) is original
    guards.exclude(["b", "elsewhere"])
    masked = guards.mask(original)
    assert isinstance(masked, Batch)
    assert masked.weight.tolist() == [1.0, 0.0, 1.0]
    assert masked.mean is not None and masked.mean[1].eq(0).all() and masked.mean[[0, 2]].isnan().all()
    assert masked.text_mask is not None and masked.text_mask.tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert original.weight.tolist() == [1.0, 1.0, 1.0]
    packed = guards.mask(PackedBatch((batch("a"), batch("b", "d"))))
    assert packed.weight.tolist() == [1.0, 0.0, 1.0]


def test_state_continues_and_a_rewind_forgets_no_exclusion() -> None:
    guards = watched()
    saved = guards.state()
    assert Guards(guards.config, saved).state() == saved
    guards.exclude(["x"])
    guards.applied(50.0, 1.0)
    guards.restore(saved)
    assert guards.state() == {**saved, "excluded": ["x"], "num_discarded": 1}
