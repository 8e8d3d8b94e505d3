"""What a network's output stands for on a path, and the velocity it means: samplers and losses see velocities only.

A network is any callable ``(x, time, cond)``; its output may stand for the velocity, the data, the noise, or EDM's mix
of data and noise. ``as_denoiser`` makes the callable ``(x_t, t, cond) -> v`` of it. Knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ltd.config import ConfigError, from_dict
from ltd.diffusion.guidance import Denoiser
from ltd.diffusion.paths import LinearPathConfig, Path, PathConfig, build_path, expand_time


def _check_min_time(value: float) -> None:
    if not 0 < value < 0.5:
        raise ConfigError(f"min_time: got {value}, needed above 0 and below 0.5")


@dataclass(frozen=True, kw_only=True)
class VelocityPredictionConfig:
    """The output is the velocity dx_t/dt."""

    kind: Literal["velocity"] = "velocity"


@dataclass(frozen=True, kw_only=True)
class DataPredictionConfig:
    """The output is the data x0."""

    kind: Literal["x0"] = "x0"
    min_time: float = 0.05
    """Times closer than this to 0 or 1 are converted with its coefficients, in (0, 0.5): the velocity divides by
    sigma."""

    def __post_init__(self) -> None:
        _check_min_time(self.min_time)


@dataclass(frozen=True, kw_only=True)
class NoisePredictionConfig:
    """The output is the noise eps."""

    kind: Literal["eps"] = "eps"
    min_time: float = 0.02
    """Times closer than this to 0 or 1 are converted with its coefficients, in (0, 0.5): the velocity divides by
    alpha."""

    def __post_init__(self) -> None:
        _check_min_time(self.min_time)


@dataclass(frozen=True, kw_only=True)
class EdmPredictionConfig:
    """The output is EDM's F, whose input and target have unit variance at every noise level.

    Reference: Karras et al. (2022), arXiv 2206.00364, Eq. 7 and Table 1.
    """

    kind: Literal["edm"] = "edm"
    sigma_data: float = 1.0
    """Standard deviation of the latents, above 0: 1 for unit-scale ones; the paper has 0.5, MicroDiT 0.9."""
    time_input: Literal["log_sigma", "time"] = "log_sigma"
    """What the network is told as its time: c_noise = ln(sigma / alpha) / 4, or t itself."""
    min_time: float = 1e-4
    """Times closer than this to 0 or 1 are converted with its coefficients, in (0, 0.5): c_noise is infinite there."""

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ConfigError(f"sigma_data: got {self.sigma_data}, needed above 0")
        _check_min_time(self.min_time)


PredictionConfig = VelocityPredictionConfig | DataPredictionConfig | NoisePredictionConfig | EdmPredictionConfig


@dataclass(frozen=True, kw_only=True)
class ParametrizationConfig:
    """What a network was trained to predict, and on which path: all that turns it into a denoiser."""

    path: PathConfig = field(default_factory=LinearPathConfig)
    """Mixture of data and noise."""
    prediction: PredictionConfig = field(default_factory=VelocityPredictionConfig)
    """What the network's output stands for."""


class Prediction(Protocol):
    """Conversions between a network's output and the velocity, per sample ``(b, ...)``.

    Times are ``(b,)``, or ``(b, t)`` for the latent frames of ``(b, c, t, h, w)``.
    """

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Make what the network is given of the state and the time."""
        ...

    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Turn the network's output into the velocity."""
        ...

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Compute the output that is right for known data and noise."""
        ...

    def clamp(self, t: Tensor) -> Tensor:
        """Keep times away from the ends at which a conversion divides by 0."""
        ...


class _Plain:
    """A prediction whose network sees the state and the time as they are."""

    def __init__(self, path: Path, min_time: float) -> None:
        self.path, self.min_time = path, min_time

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, t

    def clamp(self, t: Tensor) -> Tensor:
        return t.clamp(self.min_time, 1 - self.min_time) if self.min_time else t


class _Velocity(_Plain):
    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return output

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.path.velocity(x0, eps, t)


class _Data(_Plain):
    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.path.velocity_of_data(x_t, output, self.clamp(t))

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return x0


class _Noise(_Plain):
    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.path.velocity_of_noise(x_t, output, self.clamp(t))

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps


class _Edm(_Plain):
    """EDM's coefficients in terms of x_t instead of x_t / alpha, with n^2 = sigma^2 + (alpha sigma_data)^2.

    x0 = alpha sigma_data^2 / n^2 x_t + sigma sigma_data / n F(x_t / n, ln(sigma / alpha) / 4), hence
    v = (sigma sigma' + alpha alpha' sigma_data^2) / n^2 x_t - W sigma_data / n F.
    """

    def __init__(self, path: Path, config: EdmPredictionConfig) -> None:
        super().__init__(path, config.min_time)
        self.config = config

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute c_skip and c_out, which make data of ``like``'s rows and outputs, and 1 / c_in."""
        t = expand_time(self.clamp(t), like)
        alpha, sigma, scale = self.path.alpha(t), self.path.sigma(t), self.config.sigma_data
        norm = torch.sqrt(sigma.square() + (alpha * scale).square())
        return alpha * (scale / norm).square(), sigma * scale / norm, norm

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        _, _, norm = self._coefficients(t, x_t)
        if self.config.time_input == "time":
            return x_t / norm, t
        near = self.clamp(t.double())  # 1 - t has few digits in fp32 next to 1, and c_noise grows as its logarithm
        return x_t / norm, (torch.log(self.path.sigma(near) / self.path.alpha(near)) / 4).to(t.dtype)

    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        _, out, norm = self._coefficients(t, x_t)
        near, scale = expand_time(self.clamp(t), x_t), self.config.sigma_data
        slope = self.path.sigma(near) * self.path.sigma_dot(near)
        slope = slope + self.path.alpha(near) * self.path.alpha_dot(near) * scale**2
        # Data through velocity_of_data would cancel near t = 0; here nothing is divided by sigma alone.
        return slope / norm.square() * x_t - out / self.path.data_per_velocity(near) * output

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        x_t = self.path.interpolate(x0, eps, t)
        skip, out, _ = self._coefficients(t, x_t)
        return (x0 - skip * x_t) / out


def build_prediction(config: PredictionConfig, path: Path) -> Prediction:
    """Build the conversions of a prediction on a path."""
    match config:
        case VelocityPredictionConfig():
            return _Velocity(path, 0.0)
        case DataPredictionConfig():
            return _Data(path, config.min_time)
        case NoisePredictionConfig():
            return _Noise(path, config.min_time)
        case EdmPredictionConfig():
            return _Edm(path, config)


def read_parametrization(objective: Mapping[str, Any]) -> ParametrizationConfig:
    """Read what a trained network predicts out of the plain values of its objective.

    Args:
        objective: Section ``objective`` of a run's configuration; other fields are passed over, and missing ones are
            what runs had before they could choose: velocity on the linear path.

    Returns:
        Path and prediction.

    Raises:
        ConfigError: If a field is not of this version.
    """
    kept = {name: objective[name] for name in ("path", "prediction") if name in objective}
    config: ParametrizationConfig = from_dict(ParametrizationConfig, kept)
    return config


def network_times(config: ParametrizationConfig, t: Tensor) -> Tensor:
    """Tell which times ``as_denoiser`` gives a network.

    Args:
        config: What the network predicts, on which path.
        t: Times ``(k,)`` of the denoiser, in the dtype that it is given: next to 1 another rounding is another c_noise.

    Returns:
        Times ``(k,)`` of the network.
    """
    if isinstance(config.prediction, VelocityPredictionConfig):
        return t
    return build_prediction(config.prediction, build_path(config.path)).inputs(t.unsqueeze(1), t)[1]


def as_denoiser(network: Callable[..., Any], config: ParametrizationConfig) -> Denoiser:
    """Make a network a denoiser: a callable that returns velocities.

    Args:
        network: Any ``(x, time, cond)`` that returns what ``config.prediction`` says, ``(b, ...)``; or, for b samples
            ``(c, t, h, w)`` of any sizes, a list.
        config: What the network predicts, on which path.

    Returns:
        ``(x_t, t, cond) -> v`` in the dtype of ``x_t``, computed in fp32 or more; the network itself when it predicts
        velocities.
    """
    if isinstance(config.prediction, VelocityPredictionConfig):
        return network
    prediction = build_prediction(config.prediction, build_path(config.path))

    def inputs(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x, time = prediction.inputs(x_t.to(torch.promote_types(x_t.dtype, torch.float32)), t)
        return x.to(x_t.dtype), time

    def velocity(output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        wide = torch.promote_types(x_t.dtype, torch.float32)
        return prediction.velocity(output.to(wide), x_t.to(wide), t.to(wide)).to(x_t.dtype)

    def denoiser(x_t: Tensor | Sequence[Tensor], t: Tensor, cond: Any = None) -> Any:
        if isinstance(x_t, Tensor):
            x, time = inputs(x_t, t)
            return velocity(network(x, time, cond), x_t, t)
        given = [inputs(x.unsqueeze(0), row) for x, row in zip(x_t, t.split(1), strict=True)]
        outputs = network([x.squeeze(0) for x, _ in given], torch.cat([time for _, time in given]), cond)
        rows = zip(outputs, x_t, t.split(1), strict=True)
        return [velocity(out.unsqueeze(0), x.unsqueeze(0), row).squeeze(0) for out, x, row in rows]

    return denoiser
