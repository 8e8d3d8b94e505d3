"""Learning-rate schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from ltd.config import ConfigError
from ltd.training.optim import OptimConfig, learning_rate


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_follows_half_a_period_to_the_final_ratio() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="cosine", final_ratio=0.1)
    for step in range(2, 12):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 10))
        assert learning_rate(config, step, 12) == pytest.approx(expected)
    assert learning_rate(config, 12, 12) == pytest.approx(0.1)


def test_wsd_is_constant_and_then_linear_over_the_cooldown() -> None:
    config = OptimConfig(lr=1.0, schedule="wsd", cooldown=0.2)
    rates = [learning_rate(config, step, 10) for step in range(11)]
    assert rates == pytest.approx([1.0] * 9 + [0.5, 0.0])


@pytest.mark.parametrize("fields", [{"lr": -1.0}, {"warmup_steps": -1}, {"cooldown": 1.5}, {"final_ratio": -0.1}])
def test_values_out_of_range_name_the_field(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        OptimConfig(**fields)  # type: ignore[arg-type]


def test_wsd_from_a_step_is_a_trunk_and_then_linear_over_the_rest() -> None:
    trunk = OptimConfig(lr=2.0, warmup_steps=2)
    for start, count in ((4, 4), (7, 3), (2, 1)):
        config = OptimConfig(lr=2.0, warmup_steps=2, schedule="wsd", cooldown_from=start, final_ratio=0.25)
        rates = [learning_rate(config, step, start + count) for step in range(start + count)]
        assert rates[:start] == [learning_rate(trunk, step, 100) for step in range(start)]
        assert rates[start:] == pytest.approx([2.0 * (0.25 + 0.75 * (count - n) / count) for n in range(count)])


def test_a_step_to_cool_down_from_needs_its_schedule_and_lies_behind_the_warm_up() -> None:
    with pytest.raises(ConfigError, match="cooldown_from: is of the schedule wsd, got schedule constant"):
        OptimConfig(cooldown_from=4)
    with pytest.raises(ConfigError, match="cooldown_from: got 4, needed warmup_steps = 5 or more"):
        OptimConfig(schedule="wsd", warmup_steps=5, cooldown_from=4)
