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
from ltd.diffusion.paths import LinearPath, Path
from ltd.rng import DrawRandom, derive_seed


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """Factor a of the time shift; the defaults do not shift."""

    factor: float = 1.0
    """Explicit factor, above 0; above 1 spends more time near noise."""
    base_cells: int | None = None
    """Latent cells (t * h * w) at which the size asks for no shift; others multiply the factor by
    sqrt(cells / base_cells). Null = sizes are treated alike."""
    base_dim: int | None = None
    """Latent numbers (channels * t * h * w) at which the size asks for no shift; others multiply the factor by
    sqrt(numbers / base_dim): for latents of many channels. RAE has 4096. Instead of base_cells."""

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ConfigError(f"factor: got {self.factor}, needed above 0 and finite (1 = no shift)")
        if self.base_cells is not None and self.base_cells < 1:
            raise ConfigError(f"base_cells: got {self.base_cells}, needed 1 or more, or null")
        if self.base_dim is not None and self.base_dim < 1:
            raise ConfigError(f"base_dim: got {self.base_dim}, needed 1 or more, or null")
        if self.base_dim is not None and self.base_cells is not None:
            raise ConfigError(f"base_dim: got {self.base_dim} beside base_cells {self.base_cells}, needed one of them")

    def resolve(self, cells: int, channels: int | None = None) -> float:
        """Compute the factor for latents of a size.

        Reference: Esser et al. (2024), Stable Diffusion 3, arXiv 2403.03206, Eq. 23; by dimension: Zheng et al.
        (2025), RAE, arXiv 2510.11690.

        Args:
            cells: Latent cells t * h * w of one sample.
            channels: Channels of a cell; needed with ``base_dim``.

        Returns:
            ``factor * sqrt(cells / base_cells)``, or ``factor * sqrt(cells * channels / base_dim)``.

        Raises:
            ValueError: If ``base_dim`` is set and the channels are not given.
        """
        if self.base_dim is not None:
            if channels is None:
                raise ValueError("shift.base_dim needs the number of latent channels, got none")
            return self.factor * math.sqrt(cells * channels / self.base_dim)
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


@dataclass(frozen=True, kw_only=True)
class LognormalConfig:
    """Times whose noise level sigma / alpha is log-normal on the path at hand; on the linear path a logit-normal.

    Reference: Karras et al. (2022), arXiv 2206.00364, Table 1.
    """

    kind: Literal["lognormal"] = "lognormal"
    mean: float = -1.2
    """Mean of ln(sigma / alpha). EDM has -1.2 on images of standard deviation 0.5, MicroDiT -0.6 and then 0."""
    std: float = 1.2
    """Standard deviation of ln(sigma / alpha), above 0."""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ConfigError(f"std: got {self.std}, needed above 0")

    def ratio(self, u: Tensor) -> Tensor:
        """Map probabilities in (0, 1) to noise levels: ``exp(mean + std * normal_quantile(u))``."""
        return torch.exp(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True, kw_only=True)
class ModeConfig:
    """Times with density above 0 everywhere, most (or, below 0, least) of it in the middle.

    Reference: Esser et al. (2024), Stable Diffusion 3, arXiv 2403.03206, Eq. 20.
    """

    kind: Literal["mode"] = "mode"
    scale: float = 1.29
    """s, in [-1, 2 / (pi - 2)]: how much weight the middle has; 0 is uniform."""

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ConfigError(f"scale: got {self.scale}, needed -1 to 2 / (pi - 2) = {2 / (math.pi - 2):.4f}")

    def quantile(self, u: Tensor) -> Tensor:
        """Map probabilities to times: ``u - s (sin^2(pi u / 2) - u)``, the paper's map of ``1 - u``."""
        return u - self.scale * (torch.sin(math.pi / 2 * u).square() - u)


TimesConfig = UniformConfig | LogitNormalConfig | LognormalConfig | ModeConfig


def _quantile(config: TimesConfig, u: Tensor, path: Path | None) -> Tensor:
    if isinstance(config, LognormalConfig):
        return (path or LinearPath()).time(config.ratio(u))
    return config.quantile(u)


def draw_times(
    config: TimesConfig,
    random: DrawRandom,
    *,
    factor: float = 1.0,
    stratified: bool = False,
    path: Path | None = None,
) -> Tensor:
    """Draw one time per sample.

    Args:
        config: Distribution before the shift.
        random: Random numbers of the batch; stream ``"time"``.
        factor: Factor of the shift.
        stratified: Whether the underlying uniforms of successive draws are spread evenly instead of independently.
        path: Path on which a log-normal noise level becomes a time; None is the linear one.

    Returns:
        ``(b,)``, float32, in (0, 1), CPU.
    """
    u = draw_quantiles(random, stratified=stratified)
    return shift_times(_quantile(config, u.clamp(2**-25, 1 - 2**-25), path), factor).float()


def draw_quantiles(random: DrawRandom, *, stratified: bool = False) -> Tensor:
    """Tell where in the distribution of times each draw's time lies, whatever the distribution and the shift.

    Args:
        random: Random numbers of the batch; stream ``"time"``.
        stratified: As for ``draw_times``.

    Returns:
        ``(b,)``, float64, in [0, 1), CPU: the share of all times that is smaller.
    """
    return _spread(random) if stratified else random.uniform((), "time").double()


def quantile_times(config: TimesConfig, num: int, *, factor: float = 1.0, path: Path | None = None) -> Tensor:
    """List the times at the middles of ``num`` equally likely parts of the training distribution.

    Args:
        config: Distribution before the shift.
        num: Number of times.
        factor: Factor of the shift.
        path: Path on which a log-normal noise level becomes a time; None is the linear one.

    Returns:
        ``(num,)``, float32, increasing.
    """
    middles = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    return shift_times(_quantile(config, middles, path), factor).float()


def _spread(random: DrawRandom) -> Tensor:
    """Place draw ``i`` at frac(offset + i * golden ratio): any run of draws is spread evenly over [0, 1)."""
    golden, bits = 0x9E3779B97F4A7C15, 1 << 64  # 64-bit integers: exact for any draw index
    offset = derive_seed(random.seed, "time")
    return torch.tensor([(offset + draw * golden) % bits / bits for draw in random.draws], dtype=torch.float64)
