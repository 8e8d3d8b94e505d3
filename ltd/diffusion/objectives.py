"""Training objectives: pure functions of a denoiser, data, conditions and the draws' random numbers.

Everything but the denoiser's call is fp32 (fp64 for fp64 data). No mean over the batch is taken here: per-sample losses
and weights are returned, so that the caller's normalisation is the same for any number of ranks and accumulation steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.config import ConfigError
from ltd.diffusion.guidance import Denoiser
from ltd.diffusion.paths import LinearPathConfig, PathConfig, build_path
from ltd.diffusion.prediction import (
    EdmPredictionConfig,
    ParametrizationConfig,
    PredictionConfig,
    VelocityPredictionConfig,
    as_denoiser,
    build_prediction,
)
from ltd.diffusion.times import LogitNormalConfig, ShiftConfig, TimesConfig, draw_quantiles, draw_times, quantile_times
from ltd.rng import DrawRandom


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """Path, prediction, times and terms of the loss."""

    path: PathConfig = field(default_factory=LinearPathConfig)
    """Mixture of data and noise; belongs to the model: sampling takes the same."""
    prediction: PredictionConfig = field(default_factory=VelocityPredictionConfig)
    """What the network's output stands for; belongs to the model: sampling takes the same."""
    loss: Literal["velocity", "x0", "eps", "min_snr", "edm"] = "velocity"
    """What the squared error is of, whatever the network predicts. With SNR = (alpha / sigma)^2, min_snr is
    min(SNR, min_snr_gamma) times the error of x0, and edm is the error of EDM's F (needs prediction.kind edm)."""
    min_snr_gamma: float = 5.0
    """Where the weight of loss: min_snr stops to grow, above 0."""
    times: TimesConfig = field(default_factory=LogitNormalConfig)
    """Distribution of training times, before the shift."""
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    """Shift of the times with the size of the latents; sampling wants the same."""
    stratified: bool = False
    """Whether successive draws' times are spread evenly over the distribution instead of independent."""
    time_range: tuple[float, float] = (0.0, 1.0)
    """(low, high): times become low + (high - low) t. Keeps off ends where a loss has no bound, such as t = 0 of the VP
    path, whose velocity is infinite."""
    cosine_weight: float = 0.0
    """Weight of 1 - cos(predicted, true velocity) over channels, averaged over cells; 0 = off."""

    def __post_init__(self) -> None:
        low, high = self.time_range
        if not 0 <= low < high <= 1:
            raise ConfigError(f"time_range: got {self.time_range}, needed 0 <= low < high <= 1")
        if not self.min_snr_gamma > 0:
            raise ConfigError(f"min_snr_gamma: got {self.min_snr_gamma}, needed above 0")
        if self.loss == "edm" and not isinstance(self.prediction, EdmPredictionConfig):
            raise ConfigError(f"loss: got edm with prediction.kind {self.prediction.kind}, needed prediction.kind edm")
        if self.cosine_weight < 0:
            raise ConfigError(f"cosine_weight: got {self.cosine_weight}, needed 0 or more")


class FlowMatching:
    """Regress the velocity of a path between data and noise, in one of its linear forms.

    Reference: Lipman et al. (2022), arXiv 2210.02747, Eq. 23; cosine term: Yao et al. (2025), arXiv 2501.01423;
    min-SNR: Hang et al. (2023), arXiv 2303.09556, Eq. 5; EDM: Karras et al. (2022), arXiv 2206.00364, Table 1.

    Args:
        config: Path, prediction, times and terms.
    """

    def __init__(self, config: FlowMatchingConfig) -> None:
        self.config = config
        self.path = build_path(config.path)
        self.prediction = build_prediction(config.prediction, self.path)

    def denoiser(self, network: Callable[..., Any]) -> Denoiser:
        """Make the network that is trained a denoiser, which the losses take.

        Args:
            network: Any ``(x, time, cond)`` whose output stands for what ``config.prediction`` says.

        Returns:
            ``(x_t, t, cond) -> v``; the network itself when it predicts velocities.
        """
        return as_denoiser(network, ParametrizationConfig(path=self.config.path, prediction=self.config.prediction))

    def loss(
        self,
        denoiser: Denoiser,
        x0: Tensor | Sequence[Tensor],
        cond: Any,
        random: DrawRandom,
        *,
        cell_weight: Tensor | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the training loss of a batch.

        Args:
            denoiser: Any ``(x_t, t, cond) -> v``, such as ``self.denoiser(network)``; must take and return a list where
                ``x0`` is one.
            x0: Unit-scale latents ``(b, c, t, h, w)``, or b samples ``(c, t, h, w)`` of any sizes.
            cond: Conditions, passed on to the denoiser.
            random: Random numbers of the ``b`` draws; streams ``"noise"`` and ``"time"``. A sample meets the same ones
                in a batch and in a list.
            cell_weight: Weight of each cell in its sample's loss, ``(b, t, h, w)`` or b of ``(t, h, w)``, float of 0 or
                more, or bool (True counts); None = all alike.

        Returns:
            Per-sample losses ``(b,)``, float32, and their weights ``(b,)``: 1, or 0 for samples without a cell that
            counts.

        Raises:
            ValueError: If the cell weights are not of the latents' shape.
        """
        if isinstance(x0, Tensor):
            times = self._times(x0.shape[1:], random)
        else:
            times = torch.cat([self._times(x.shape, row) for x, row in zip(x0, _rows(random), strict=True)])
        losses = self.loss_at(denoiser, x0, cond, random, times, cell_weight=cell_weight)
        if cell_weight is None:
            return losses, torch.ones_like(losses)
        counts = torch.stack([(weight != 0).any() for weight in cell_weight])
        return losses, counts.to(losses)

    def loss_at(
        self,
        denoiser: Denoiser,
        x0: Tensor | Sequence[Tensor],
        cond: Any,
        random: DrawRandom,
        times: Tensor | float,
        *,
        cell_weight: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Compute the loss at given times, with the noise that ``loss`` would draw.

        Args:
            denoiser: Any ``(x_t, t, cond) -> v``; must take and return a list where ``x0`` is one.
            x0: Unit-scale latents ``(b, c, t, h, w)``, or b samples ``(c, t, h, w)`` of any sizes.
            cond: Conditions, passed on to the denoiser.
            random: Random numbers of the ``b`` draws; stream ``"noise"``.
            times: One time for all, or ``(b,)``, in [0, 1].
            cell_weight: Weight of each cell in its sample's loss, as in ``loss``.

        Returns:
            Per-sample losses ``(b,)``, float32 (float64 for float64 data); 0 for samples without a cell that counts.

        Raises:
            ValueError: If the cell weights are not of the latents' shape.
        """
        if not isinstance(x0, Tensor):
            return self._packed_loss_at(denoiser, x0, cond, random, times, cell_weight)
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        t = torch.as_tensor(times, dtype=x0.dtype).to(x0.device).expand(len(x0))
        eps = random.normal(x0.shape[1:], "noise").to(x0)
        weight = None if cell_weight is None else _checked(torch.as_tensor(cell_weight), x0)
        x_t = self.path.interpolate(x0, eps, t)
        return self._losses(denoiser(x_t, t, cond), self._truth(x0, eps, x_t, t), t, weight)

    def _packed_loss_at(
        self,
        denoiser: Callable[..., Any],
        x0: Sequence[Tensor],
        cond: Any,
        random: DrawRandom,
        times: Tensor | float,
        cell_weight: Tensor | Sequence[Tensor] | None,
    ) -> Tensor:
        rows = [x.unsqueeze(0).to(torch.promote_types(x.dtype, torch.float32)) for x in x0]  # 1 c t h w each
        t = torch.as_tensor(times, dtype=rows[0].dtype).to(rows[0].device).expand(len(rows))
        given = [None] * len(rows) if cell_weight is None else [weight.unsqueeze(0) for weight in cell_weight]
        weights = [w if w is None else _checked(w, x) for w, x in zip(given, rows, strict=True)]
        eps = [row.normal(x.shape[1:], "noise").to(x) for x, row in zip(rows, _rows(random), strict=True)]
        noisy = [self.path.interpolate(*row) for row in zip(rows, eps, t.split(1), strict=True)]
        predicted = denoiser([x.squeeze(0) for x in noisy], t, cond)
        truth = [self._truth(*row) for row in zip(rows, eps, noisy, t.split(1), strict=True)]
        samples = zip(predicted, truth, t.split(1), weights, strict=True)
        return torch.cat([self._losses(p.unsqueeze(0), v, time, weight) for p, v, time, weight in samples])

    def _truth(self, x0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Compute the velocity that the right output means, near the ends by the prediction's own coefficients."""
        return self.prediction.velocity(self.prediction.target(x0, eps, t), x_t, t)

    def _losses(self, predicted: Tensor, v: Tensor, t: Tensor, weight: Tensor | None) -> Tensor:
        """Compare predicted with true velocities ``(b, c, t, h, w)``, row by row; ``weight`` is ``(b, 1, t, h, w)``."""
        predicted = predicted.to(v.dtype)
        error = (predicted - v).square()
        losses = error.flatten(1).mean(1) if weight is None else _weighted_mean(error, weight)
        if self.config.loss != "velocity":
            losses = losses * self._scale(t)
        if self.config.cosine_weight:
            cosine = F.cosine_similarity(predicted, v, dim=1).unsqueeze(1)
            term = 1 - cosine.flatten(1).mean(1) if weight is None else _weighted_mean(1 - cosine, weight)
            losses = losses + self.config.cosine_weight * term
        return losses

    def _scale(self, t: Tensor) -> Tensor:
        """Compute what turns the squared error of the velocity at times ``(b,)`` into that of ``config.loss``.

        Every factor is finite at both ends: nothing is divided by alpha or sigma.
        """
        t = self.prediction.clamp(t)
        data, noise = self.path.data_per_velocity(t).square(), self.path.noise_per_velocity(t).square()
        match self.config.loss:
            case "x0":
                return data
            case "eps":
                return noise
            case "min_snr":  # data * min(SNR, gamma)
                return torch.minimum(noise, self.config.min_snr_gamma * data)
            case "edm":  # data * (r^2 + s^2) / (r s)^2 for r = sigma / alpha and s = sigma_data
                assert isinstance(self.config.prediction, EdmPredictionConfig)
                return noise + data / self.config.prediction.sigma_data**2
            case _:
                return torch.ones_like(t)

    def _times(self, shape: Sequence[int], random: DrawRandom) -> Tensor:
        """Draw the times of samples of a shape (c, t, h, w)."""
        channels, *cells = shape
        factor = self.config.shift.resolve(math.prod(cells), channels)
        stratified = self.config.stratified
        return self._squeeze(
            draw_times(self.config.times, random, factor=factor, stratified=stratified, path=self.path)
        )

    def _squeeze(self, t: Tensor) -> Tensor:
        low, high = self.config.time_range
        return t if (low, high) == (0, 1) else low + (high - low) * t

    def quantiles(self, random: DrawRandom) -> Tensor:
        """Tell where in the training distribution the times of ``loss`` lie.

        Args:
            random: Random numbers of the draws.

        Returns:
            ``(b,)``, float64, in [0, 1), CPU; the shift and the range do not count.
        """
        return draw_quantiles(random, stratified=self.config.stratified)

    def evaluation_times(self, num: int, cells: int, channels: int | None = None) -> Tensor:
        """List fixed times for a held-out loss: middles of ``num`` equally likely parts of the training distribution.

        Args:
            num: Number of times.
            cells: Latent cells t * h * w of one sample, for the shift.
            channels: Channels of a cell, for a shift by latent dimension.

        Returns:
            ``(num,)``, float32, increasing.
        """
        factor = self.config.shift.resolve(cells, channels)
        return self._squeeze(quantile_times(self.config.times, num, factor=factor, path=self.path))


def _checked(weight: Tensor, x0: Tensor) -> Tensor:
    """Give cell weights ``(b, t, h, w)`` the channel dimension and dtype of latents ``(b, c, t, h, w)``."""
    needed = (len(x0), *x0.shape[2:])
    if tuple(weight.shape) != needed:
        raise ValueError(f"cell_weight: got {tuple(weight.shape)}, needed {needed} for latents {tuple(x0.shape)}")
    return weight.to(x0).unsqueeze(1)


def _weighted_mean(value: Tensor, weight: Tensor) -> Tensor:
    """Average ``(b, c, t, h, w)`` over all but the batch by weights ``(b, 1, t, h, w)``; 0 where all weights are 0."""
    total = weight.flatten(1).sum(1) * value.shape[1]
    sums = (value * weight).flatten(1).sum(1)
    return sums / torch.where(total > 0, total, torch.ones_like(total))


def _rows(random: DrawRandom) -> list[DrawRandom]:
    """Split the random numbers of a batch into those of its samples."""
    return [DrawRandom(random.seed, [draw]) for draw in random.draws]
