"""Training objectives: pure functions of a denoiser, data, conditions and the draws' random numbers.

Everything but the denoiser's call is fp32 (fp64 for fp64 data). No mean over the batch is taken here: per-sample losses
and weights are returned, so that the caller's normalisation is the same for any number of ranks and accumulation steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.config import ConfigError
from ltd.diffusion.guidance import Denoiser
from ltd.diffusion.paths import LinearPath
from ltd.diffusion.times import LogitNormalConfig, ShiftConfig, UniformConfig, draw_times, quantile_times
from ltd.rng import DrawRandom


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """Times and terms of the flow-matching loss."""

    times: LogitNormalConfig | UniformConfig = field(default_factory=LogitNormalConfig)
    """Distribution of training times, before the shift."""
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    """Shift of the times with the size of the latents; sampling wants the same."""
    stratified: bool = False
    """Whether successive draws' times are spread evenly over the distribution instead of independent."""
    cosine_weight: float = 0.0
    """Weight of 1 - cos(predicted, true velocity) over channels, averaged over cells; 0 = off."""

    def __post_init__(self) -> None:
        if self.cosine_weight < 0:
            raise ConfigError(f"cosine_weight: got {self.cosine_weight}, needed 0 or more")


class FlowMatching:
    """Regress the velocity of the straight path between data and noise.

    Reference: Lipman et al. (2022), arXiv 2210.02747, Eq. 23; cosine term: Yao et al. (2025), arXiv 2501.01423.

    Args:
        config: Times and terms.
    """

    def __init__(self, config: FlowMatchingConfig) -> None:
        self.config = config
        self.path = LinearPath()

    def loss(
        self, denoiser: Denoiser, x0: Tensor | Sequence[Tensor], cond: Any, random: DrawRandom
    ) -> tuple[Tensor, Tensor]:
        """Compute the training loss of a batch.

        Args:
            denoiser: Any ``(x_t, t, cond) -> v``; must take and return a list where ``x0`` is one.
            x0: Unit-scale latents ``(b, c, t, h, w)``, or b samples ``(c, t, h, w)`` of any sizes.
            cond: Conditions, passed on to the denoiser.
            random: Random numbers of the ``b`` draws; streams ``"noise"`` and ``"time"``. A sample meets the same ones
                in a batch and in a list.

        Returns:
            Per-sample losses ``(b,)``, float32, and their weights ``(b,)``, ones.
        """
        if isinstance(x0, Tensor):
            times = self._times(x0[0, 0].numel(), random)
        else:
            times = torch.cat([self._times(x[0].numel(), row) for x, row in zip(x0, _rows(random), strict=True)])
        losses = self.loss_at(denoiser, x0, cond, random, times)
        return losses, torch.ones_like(losses)

    def loss_at(
        self,
        denoiser: Denoiser,
        x0: Tensor | Sequence[Tensor],
        cond: Any,
        random: DrawRandom,
        times: Tensor | float,
    ) -> Tensor:
        """Compute the loss at given times, with the noise that ``loss`` would draw.

        Args:
            denoiser: Any ``(x_t, t, cond) -> v``; must take and return a list where ``x0`` is one.
            x0: Unit-scale latents ``(b, c, t, h, w)``, or b samples ``(c, t, h, w)`` of any sizes.
            cond: Conditions, passed on to the denoiser.
            random: Random numbers of the ``b`` draws; stream ``"noise"``.
            times: One time for all, or ``(b,)``, in [0, 1].

        Returns:
            Per-sample losses ``(b,)``, float32 (float64 for float64 data).
        """
        if not isinstance(x0, Tensor):
            return self._packed_loss_at(denoiser, x0, cond, random, times)
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        t = torch.as_tensor(times, dtype=x0.dtype).to(x0.device).expand(len(x0))
        eps = random.normal(x0.shape[1:], "noise").to(x0)
        v = self.path.velocity(x0, eps)
        return self._losses(denoiser(self.path.interpolate(x0, eps, t), t, cond), v)

    def _packed_loss_at(
        self, denoiser: Callable[..., Any], x0: Sequence[Tensor], cond: Any, random: DrawRandom, times: Tensor | float
    ) -> Tensor:
        rows = [x.unsqueeze(0).to(torch.promote_types(x.dtype, torch.float32)) for x in x0]  # 1 c t h w each
        t = torch.as_tensor(times, dtype=rows[0].dtype).to(rows[0].device).expand(len(rows))
        draws = zip(rows, _rows(random), strict=True)
        eps = [row.normal(x.shape[1:], "noise").to(x) for x, row in draws]
        noisy = [self.path.interpolate(*row).squeeze(0) for row in zip(rows, eps, t.split(1), strict=True)]
        predicted = denoiser(noisy, t, cond)
        samples = zip(predicted, rows, eps, strict=True)
        return torch.cat([self._losses(p.unsqueeze(0), self.path.velocity(x, e)) for p, x, e in samples])

    def _losses(self, predicted: Tensor, v: Tensor) -> Tensor:
        """Compare predicted with true velocities ``(b, c, t, h, w)``, row by row."""
        predicted = predicted.to(v.dtype)
        losses = (predicted - v).square().flatten(1).mean(1)
        if self.config.cosine_weight:
            cosine = F.cosine_similarity(predicted, v, dim=1).flatten(1).mean(1)
            losses = losses + self.config.cosine_weight * (1 - cosine)
        return losses

    def _times(self, cells: int, random: DrawRandom) -> Tensor:
        """Draw the times of samples of so many latent cells."""
        factor = self.config.shift.resolve(cells)
        return draw_times(self.config.times, random, factor=factor, stratified=self.config.stratified)

    def evaluation_times(self, num: int, cells: int) -> Tensor:
        """List fixed times for a held-out loss: middles of ``num`` equally likely parts of the training distribution.

        Args:
            num: Number of times.
            cells: Latent cells t * h * w of one sample, for the shift.

        Returns:
            ``(num,)``, float32, increasing.
        """
        return quantile_times(self.config.times, num, factor=self.config.shift.resolve(cells))


def _rows(random: DrawRandom) -> list[DrawRandom]:
    """Split the random numbers of a batch into those of its samples."""
    return [DrawRandom(random.seed, [draw]) for draw in random.draws]
