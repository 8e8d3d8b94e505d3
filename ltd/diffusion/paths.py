"""Paths between data and noise: x_t = alpha(t) x0 + sigma(t) eps. Time is noise-at-1: t = 0 is data, t = 1 is noise.

The velocity is v = dx_t/dt = alpha' x0 + sigma' eps. With W = alpha sigma' - alpha' sigma the two equations solve to

    x0 = (sigma'/W) x_t - (sigma/W) v        eps = -(alpha'/W) x_t + (alpha/W) v

whose coefficients stay finite where sigma' or 1/sigma do not: conversions go through them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ltd.config import ConfigError


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Give times the dimensions that broadcast against what they are of.

    Args:
        t: Times ``(b,)``; or ``(b, t)``, one for every latent frame.
        like: Samples ``(b, ...)``; ``(b, c, t, h, w)`` for a time per latent frame.

    Returns:
        The times, ``(b, 1, ...)``, or ``(b, 1, t, 1, 1)``.

    Raises:
        ValueError: If times per latent frame are not of the samples' frames.
    """
    if t.ndim < 2:
        return t.reshape(-1, *[1] * (like.ndim - 1))
    if like.ndim != 5 or tuple(t.shape) != (len(like), like.shape[2]):
        raise ValueError(
            f"t: got {tuple(t.shape)} for {tuple(like.shape)}, needed one a sample, or (b, t) for (b, c, t, h, w)"
        )
    return t[:, None, :, None, None]


@dataclass(frozen=True, kw_only=True)
class LinearPathConfig:
    """Straight lines: alpha = 1 - t, sigma = t."""

    kind: Literal["linear"] = "linear"


@dataclass(frozen=True, kw_only=True)
class GvpPathConfig:
    """Quarter circles at constant speed: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    kind: Literal["gvp"] = "gvp"


@dataclass(frozen=True, kw_only=True)
class VpPathConfig:
    """The variance-preserving diffusion of DDPM in continuous time, whose noise rate grows linearly."""

    kind: Literal["vp"] = "vp"
    beta_min: float = 0.1
    """Noise rate at t = 0, above 0."""
    beta_max: float = 20.0
    """Noise rate at t = 1, at least beta_min; alpha(1) is exp(-(beta_min + beta_max) / 4)."""

    def __post_init__(self) -> None:
        if not self.beta_min > 0:
            raise ConfigError(f"beta_min: got {self.beta_min}, needed above 0")
        if not self.beta_max >= self.beta_min:
            raise ConfigError(f"beta_max: got {self.beta_max}, needed beta_min = {self.beta_min} or more")


PathConfig = LinearPathConfig | GvpPathConfig | VpPathConfig


class Path(ABC):
    """A family of mixtures of data and noise. Functions of ``t`` keep its shape and dtype."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Compute the share of the data; 1 at t = 0."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Compute the share of the noise; 0 at t = 0."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """Compute d alpha / dt."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """Compute d sigma / dt; infinite at t = 0 on the VP path."""

    @abstractmethod
    def data_per_velocity(self, t: Tensor) -> Tensor:
        """Compute sigma / W: how far an error of the velocity moves the data. Finite everywhere, 0 at t = 0."""

    @abstractmethod
    def noise_per_velocity(self, t: Tensor) -> Tensor:
        """Compute alpha / W: how far an error of the velocity moves the noise. Finite everywhere."""

    @abstractmethod
    def shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``sigma' / W`` and ``-alpha' / W``, the shares of x_t in the data and in the noise. Finite."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """Find the time at which ``sigma / alpha`` has a value, of 0 or more; 1 where the path never gets there."""

    def interpolate(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Mix data ``x0`` and noise ``eps``, both ``(b, ...)``, at times ``t`` ``(b,)``."""
        t = expand_time(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Compute the velocity ``alpha' x0 + sigma' eps`` of data and noise ``(b, ...)`` at times ``t`` ``(b,)``."""
        t = expand_time(t, x0)
        return self.alpha_dot(t) * x0 + self.sigma_dot(t) * eps

    def data(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Recover the data from the state and the velocity, both ``(b, ...)``, at times ``t`` ``(b,)``."""
        t = expand_time(t, x_t)
        return self.shares(t)[0] * x_t - self.data_per_velocity(t) * v

    def noise(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Recover the noise from the state and the velocity, both ``(b, ...)``, at times ``t`` ``(b,)``."""
        t = expand_time(t, x_t)
        return self.shares(t)[1] * x_t + self.noise_per_velocity(t) * v

    def velocity_of_data(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Compute the velocity that ``data`` turns into ``x0``; t = 0 divides by 0."""
        t = expand_time(t, x_t)
        return (self.shares(t)[0] * x_t - x0) / self.data_per_velocity(t)

    def velocity_of_noise(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Compute the velocity that ``noise`` turns into ``eps``; divides by 0 where alpha is 0."""
        t = expand_time(t, x_t)
        return (eps - self.shares(t)[1] * x_t) / self.noise_per_velocity(t)


class LinearPath(Path):
    """x_t = (1 - t) x0 + t eps, with velocity v = dx_t/dt = eps - x0.

    Reference: Lipman et al. (2022), arXiv 2210.02747, Eq. 22-23; Liu et al. (2022), arXiv 2209.03003, Eq. 1 (both with
    time the other way round).
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Compute ``1 - t``."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Return ``t``."""
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return -1 for every time."""
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return 1 for every time."""
        return torch.ones_like(t)

    def data_per_velocity(self, t: Tensor) -> Tensor:
        """Return ``t``."""
        return t

    def noise_per_velocity(self, t: Tensor) -> Tensor:
        """Compute ``1 - t``."""
        return 1 - t

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 and 1."""
        return torch.ones_like(t), torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        """Compute ``ratio / (1 + ratio)``."""
        return 1 - 1 / (1 + ratio)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor | None = None) -> Tensor:
        """Compute the velocity, the same at every time."""
        return eps - x0


class RotationPath(Path):
    """A path with alpha^2 + sigma^2 = 1: state and velocity turn by the angle arctan(sigma / alpha), at rate W."""

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """Compute the rate W at which the angle grows."""

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Compute ``-W sigma``."""
        return -self.rate(t) * self.sigma(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Compute ``W alpha``."""
        return self.rate(t) * self.alpha(t)

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma."""
        return self.alpha(t), self.sigma(t)


class GvpPath(RotationPath):
    """x_t = cos(pi t / 2) x0 + sin(pi t / 2) eps, the generalised variance-preserving path.

    Reference: Ma et al. (2024), SiT, arXiv 2401.08740, section 3.2 (with time as here).
    """

    def rate(self, t: Tensor) -> Tensor:
        """Return pi / 2 for every time."""
        return torch.full_like(t, math.pi / 2)

    def alpha(self, t: Tensor) -> Tensor:
        """Compute ``cos(pi t / 2)`` as a sine, exactly 0 at t = 1."""
        return torch.sin(math.pi / 2 * (1 - t))

    def sigma(self, t: Tensor) -> Tensor:
        """Compute ``sin(pi t / 2)``."""
        return torch.sin(math.pi / 2 * t)

    def data_per_velocity(self, t: Tensor) -> Tensor:
        """Compute ``sigma / W``."""
        return self.sigma(t) * (2 / math.pi)

    def noise_per_velocity(self, t: Tensor) -> Tensor:
        """Compute ``alpha / W``."""
        return self.alpha(t) * (2 / math.pi)

    def time(self, ratio: Tensor) -> Tensor:
        """Compute ``(2 / pi) arctan(ratio)``."""
        return torch.arctan(ratio) * (2 / math.pi)


class VpPath(RotationPath):
    """The VP diffusion: beta(t) = beta_min + t (beta_max - beta_min), ln alpha = -1/2 of its integral from 0.

    Reference: Song et al. (2020), arXiv 2011.13456, Eq. 32-33; as a path: Ma et al. (2024), SiT, arXiv 2401.08740.

    Args:
        config: Noise rates.
    """

    def __init__(self, config: VpPathConfig) -> None:
        self.config = config

    def _beta(self, t: Tensor) -> Tensor:
        return self.config.beta_min + t * (self.config.beta_max - self.config.beta_min)

    def _log_alpha(self, t: Tensor) -> Tensor:
        growth = self.config.beta_max - self.config.beta_min
        return -t * (t * growth / 4 + self.config.beta_min / 2)

    def rate(self, t: Tensor) -> Tensor:
        """Compute ``beta alpha / (2 sigma)``; infinite at t = 0."""
        return self._beta(t) * self.alpha(t) / (2 * self.sigma(t))

    def alpha(self, t: Tensor) -> Tensor:
        """Compute the share of the data; ``alpha(1)`` is small but not 0."""
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Compute ``sqrt(1 - alpha^2)`` without cancellation near t = 0."""
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Compute ``-beta alpha / 2``, finite at t = 0 too."""
        return -self._beta(t) * self.alpha(t) / 2

    def data_per_velocity(self, t: Tensor) -> Tensor:
        """Compute ``sigma / W = 2 sigma^2 / (beta alpha)``."""
        return 2 * self.sigma(t).square() / (self._beta(t) * self.alpha(t))

    def noise_per_velocity(self, t: Tensor) -> Tensor:
        """Compute ``alpha / W = 2 sigma / beta``."""
        return 2 * self.sigma(t) / self._beta(t)

    def time(self, ratio: Tensor) -> Tensor:
        """Solve the quadratic ``-ln alpha(t) = ln(1 + ratio^2) / 2`` in the form without cancellation."""
        depth, half = torch.log1p(ratio.square()) / 2, self.config.beta_min / 2
        growth = self.config.beta_max - self.config.beta_min
        return (2 * depth / (half + torch.sqrt(half**2 + growth * depth))).clamp(max=1)


def build_path(config: PathConfig) -> Path:
    """Build a path from its configuration."""
    match config:
        case LinearPathConfig():
            return LinearPath()
        case GvpPathConfig():
            return GvpPath()
        case VpPathConfig():
            return VpPath(config)
