from __future__ import annotations

from typing import Any

import pytest

from ltd.config import ConfigError
from ltd.parallel import EmaConfig, OptimizerSettings, ParallelConfig
from ltd.parallel.engine import deepspeed_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zero": 4}, "parallel.zero"),
        ({"sequence": 0}, "parallel.sequence"),
        ({"accumulation": 0}, "parallel.accumulation"),
        ({"timeout_s": 0.0}, "parallel.timeout_s"),
        ({"activation_checkpointing_every": 2}, "parallel.activation_checkpointing"),
        ({"engine": "torch", "sequence": 2}, "parallel.sequence"),
        ({"engine": "torch", "deepspeed": {"a": 1}}, "parallel.deepspeed"),
    ],
)
def test_bad_parallel_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"eps": 0.0}, "optim.eps"),
        ({"weight_decay": -1.0}, "optim.weight_decay"),
        ({"grad_clip": 0.0}, "optim.grad_clip"),
    ],
)
def test_bad_optimizer_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerSettings(**fields)


def resolve(**extra: Any) -> dict[str, Any]:
    config = ParallelConfig(zero=2, precision="fp32", deepspeed=extra)
    return deepspeed_config(config, OptimizerSettings(), stage=2, num_backwards=4)


def test_extra_deepspeed_fields_are_merged() -> None:
    resolved = resolve(zero_optimization={"reduce_bucket_size": 1000}, wall_clock_breakdown=True)
    assert resolved["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert resolved["wall_clock_breakdown"] is True
    assert resolved["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"zero_optimization": {"stage": 3}}, "parallel.zero"),
        ({"bf16": {"enabled": True}}, "parallel.precision"),
        ({"gradient_clipping": 2.0}, "optim.grad_clip"),
        ({"train_batch_size": 8}, "data.global_batch"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload"),
        ({"communication_data_type": "bf16"}, "communication_data_type"),
    ],
)
def test_extra_deepspeed_field_that_contradicts_is_refused(extra: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        resolve(**extra)


def test_ema_decay_warms_up() -> None:
    config = EmaConfig(decays=(0.9,))
    assert [config.decay_at(step, 0.9) for step in (0, 1, 1000)] == [0.1, 2 / 11, 0.9]
    assert EmaConfig(decays=(0.9,), warmup=False).decay_at(0, 0.9) == 0.9
    for wrong in ((1.0,), (0.9, -0.1), (0.9, 0.9), ()):
        with pytest.raises(ConfigError, match=r"ema\.decays"):
            EmaConfig(decays=wrong)
