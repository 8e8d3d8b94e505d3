"""Optimiser settings of a run and the learning-rate schedule: a pure function of the step. Knows no engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ltd.config import ConfigError
from ltd.parallel.config import OptimizerSettings


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and schedule of a run."""

    kind: Literal["adamw", "sgd"] = "adamw"
    #: Peak learning rate; not scaled by batch size or world size.
    lr: float = 1e-4
    #: Adam's decay rates of the first and second moments.
    betas: tuple[float, float] = (0.9, 0.95)
    #: Added to Adam's denominator.
    eps: float = 1e-8
    #: Decoupled weight decay, of the groups that the model names for decay.
    weight_decay: float = 0.0
    #: Largest global gradient norm before the step; null never clips.
    grad_clip: float | None = 1.0
    #: Shape of the learning rate after the warm-up.
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    #: Steps of linear warm-up from 0 (step 1 has lr / warmup_steps).
    warmup_steps: int = 0
    #: Share of the run, at its end, over which ``wsd`` decays linearly, in [0, 1].
    cooldown: float = 0.2
    #: Steps done when ``wsd`` begins to decay, linearly over the rest of the run, in the place of ``cooldown``: the
    #: step of a fork makes a cool-down of a trunk whose rate is constant.
    cooldown_from: int | None = None
    #: Last learning rate of ``cosine`` and ``wsd`` over the peak, in [0, 1].
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ConfigError(f"lr: must be at least 0, got {self.lr}")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps: must be at least 0, got {self.warmup_steps}")
        for name in ("cooldown", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: must lie in [0, 1], got {getattr(self, name)}")
        if self.cooldown_from is not None:
            if self.schedule != "wsd":
                raise ConfigError(f"cooldown_from: is of the schedule wsd, got schedule {self.schedule}")
            if self.cooldown_from < self.warmup_steps:
                raise ConfigError(
                    f"cooldown_from: got {self.cooldown_from}, needed warmup_steps = {self.warmup_steps} or more"
                )
        self.settings()

    def settings(self) -> OptimizerSettings:
        """Pick what the engine's optimiser needs."""
        return OptimizerSettings(
            kind=self.kind,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            grad_clip=self.grad_clip,
        )


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Compute the learning rate of one step.

    Args:
        config: Peak, shape and warm-up.
        step: Steps done before this one, from 0.
        num_steps: Steps of the whole run.

    Returns:
        The learning rate: linear over the warm-up, then constant, a half cosine to ``final_ratio`` of the peak, or
        constant and linear over the last ``cooldown`` of the run, or from ``cooldown_from`` on (WSD): (num_steps -
        step) over the number of decaying steps, so that the first of them has the whole peak.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        span = max(1, num_steps - config.warmup_steps)
        done = min(1.0, (step - config.warmup_steps) / span)
        ratio = 0.5 * (1 + math.cos(math.pi * done))
    else:
        decaying = (
            round(config.cooldown * num_steps) if config.cooldown_from is None else num_steps - config.cooldown_from
        )
        span = max(1, decaying)
        ratio = min(1.0, max(0.0, (num_steps - step) / span))
    return config.lr * (config.final_ratio + (1 - config.final_ratio) * ratio)
