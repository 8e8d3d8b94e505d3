"""Distributions of training times, and the shift that large latents need. Time is noise-at-1.

The shift s(t; a) = a t / (1 + (a - 1) t) moves times towards noise for a > 1. It adds ln a to logit(t), so a shifted
logit-normal(mean, std) is the logit-normal(mean + ln a, std): configure the one or the other, never both by accident.
Shifts compose, s(s(t; a); b) = s(t; a b), and s(.; 1/a) is the inverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.rng import DrawRandom, derive_seed


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """Factor a of the time shift; the defaults do not shift."""

    factor: float = 1.0
    """Explicit factor, above 0; above 1 spends more time near noise."""
    base_cells: int | None = None
    """Latent cells (t * h * w) at which the size asks for no shift; others multiply the factor by
    sqrt(cells / base_cells). Null = sizes are treated alike."""

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigError(f"factor: got {self.factor}, needed above 0 (1 = no shift)")
        if self.base_cells is not None and self.base_cells < 1:
            raise ConfigError(f"base_cells: got {self.base_cells}, needed 1 or more, or null")

    def resolve(self, cells: int) -> float:
        """Compute the factor for latents of a size.

        Reference: Esser et al. (2024), Stable Diffusion 3, arXiv 2403.03206, Eq. 23.

        Args:
            cells: Latent cells t * h * w of one sample.

        Returns:
            ``factor * sqrt(cells / base_cells)``.
        """
        return self.factor * (math.sqrt(cells / self.base_cells) if self.base_cells else 1.0)


def shift_times(t: Tensor, factor: float) -> Tensor:
    """Shift times towards noise (factor above 1) or data (below 1); 0 and 1 stay.

    Args:
        t: Times in [0, 1], any shape.
        factor: a, above 0.

    Returns:
        ``a t / (1 + (a - 1) t)``; bit-equal to ``t`` for a = 1.
    """
    return t if factor == 1 else factor * t / (1 + (factor - 1) * t)


@dataclass(frozen=True, kw_only=True)
class UniformConfig:
    """Times uniform in [0, 1)."""

    kind: Literal["uniform"] = "uniform"

    def quantile(self, u: Tensor) -> Tensor:
        """Return the times themselves: the quantile function of the uniform distribution."""
        return u


@dataclass(frozen=True, kw_only=True)
class LogitNormalConfig:
    """Times whose logit is normal.

    Reference: Esser et al. (2024), Stable Diffusion 3, arXiv 2403.03206, Eq. 19.
    """

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    """Mean of logit(t); above 0 leans towards noise."""
    std: float = 1.0
    """Standard deviation of logit(t), above 0."""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ConfigError(f"std: got {self.std}, needed above 0")

    def quantile(self, u: Tensor) -> Tensor:
        """Map probabilities in (0, 1) to times: ``sigmoid(mean + std * normal_quantile(u))``."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


TimesConfig = UniformConfig | LogitNormalConfig


def draw_times(config: TimesConfig, random: DrawRandom, *, factor: float = 1.0, stratified: bool = False) -> Tensor:
    """Draw one time per sample.

    Args:
        config: Distribution before the shift.
        random: Random numbers of the batch; stream ``"time"``.
        factor: Factor of the shift.
        stratified: Whether the underlying uniforms of successive draws are spread evenly instead of independently.

    Returns:
        ``(b,)``, float32, in (0, 1), CPU.
    """
    u = _spread(random) if stratified else random.uniform((), "time").double()
    return shift_times(config.quantile(u.clamp(2**-25, 1 - 2**-25)), factor).float()


def quantile_times(config: TimesConfig, num: int, *, factor: float = 1.0) -> Tensor:
    """List the times at the middles of ``num`` equally likely parts of the training distribution.

    Args:
        config: Distribution before the shift.
        num: Number of times.
        factor: Factor of the shift.

    Returns:
        ``(num,)``, float32, increasing.
    """
    middles = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    return shift_times(config.quantile(middles), factor).float()


def _spread(random: DrawRandom) -> Tensor:
    """Place draw ``i`` at frac(offset + i * golden ratio): any run of draws is spread evenly over [0, 1)."""
    golden, bits = 0x9E3779B97F4A7C15, 1 << 64  # 64-bit integers: exact for any draw index
    offset = derive_seed(random.seed, "time")
    return torch.tensor([(offset + draw * golden) % bits / bits for draw in random.draws], dtype=torch.float64)
