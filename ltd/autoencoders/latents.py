"""Latents of a variational autoencoder: their posterior, their statistics over a data set, and their normalisation.

Raw latents are what an encoder gives and a cache stores; unit-scale latents are what a denoiser sees. ``LatentNorm`` is
the only bridge between the two and is saved with the autoencoder. Knows nothing of pixels or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over raw latents; ``mean`` and ``logvar`` are ``(b, c, t, h, w)``, fp32 or wider."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Draw ``mean + std * noise`` for standard normal ``noise`` of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Compute the divergence from the standard normal.

        Returns:
            ``(b,)`` nats, summed over each sample's latents.

        Reference: Kingma and Welling (2013), arXiv 1312.6114, App. B.
        """
        terms = 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
        return terms.flatten(1).sum(1)


class LatentNorm(nn.Module):
    """Per-channel affine map between raw and unit-scale latents; the identity until ``set`` is called.

    Args:
        channels: Channels of the latents.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Take new statistics.

        Args:
            mean: ``(c,)`` mean of the raw latents.
            std: ``(c,)`` standard deviation of the raw latents, positive.

        Raises:
            ValueError: If a shape differs from the channels, or a value is not finite or not positive.
        """
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.mean.shape:
                raise ValueError(f"latent {name}: got shape {tuple(value.shape)}, needed {tuple(self.mean.shape)}")
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"latent statistics must be finite with std > 0, got mean {mean} and std {std}")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def to_plain(self) -> dict[str, list[float]]:
        """Give the statistics as plain numbers, for manifests."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    def normalize(self, latents: Tensor) -> Tensor:
        """Map raw latents ``(b, c, t, h, w)`` to unit scale; dtype is kept."""
        return (latents - self._column(self.mean, latents)) / self._column(self.std, latents)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Map unit-scale latents ``(b, c, t, h, w)`` back to raw ones: the inverse of ``normalize``."""
        return latents * self._column(self.std, latents) + self._column(self.mean, latents)

    def _column(self, value: Tensor, like: Tensor) -> Tensor:
        return value.to(like).reshape(1, -1, 1, 1, 1)


@dataclass
class LatentStatistics:
    """Mean and variance per channel over any number of latents, in float64; mergeable over processes.

    Reference: Chan, Golub and LeVeque (1983), Eq. 2.1 (pairwise update of mean and sum of squares).
    """

    count: float = 0.0
    center: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def update(self, posterior: Posterior) -> None:
        """Add a batch: the moments of samples drawn from the posterior, without drawing any."""
        channels = posterior.mean.shape[1]
        mean = posterior.mean.detach().double().cpu().movedim(1, 0).reshape(channels, -1)
        variance = posterior.logvar.detach().double().cpu().exp().movedim(1, 0).reshape(channels, -1)
        center = mean.mean(1)
        squares = (mean - center[:, None]).square().sum(1) + variance.sum(1)
        self._combine(float(mean.shape[1]), center, squares)

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator saw, given as its ``state()``."""
        center = torch.tensor(state["center"], dtype=torch.float64)
        self._combine(float(state["count"]), center, torch.tensor(state["squares"], dtype=torch.float64))

    def state(self) -> dict[str, Any]:
        """Give the accumulated sums as plain numbers."""
        return {"count": self.count, "center": self.center.tolist(), "squares": self.squares.tolist()}

    @property
    def mean(self) -> Tensor:
        """Mean per channel, ``(c,)`` float64."""
        return self.center.clone()

    @property
    def std(self) -> Tensor:
        """Standard deviation per channel, ``(c,)`` float64.

        Raises:
            ValueError: If nothing was added yet.
        """
        if not self.count:
            raise ValueError("no latents were added: their standard deviation is not defined")
        return (self.squares / self.count).sqrt()

    def _combine(self, count: float, center: Tensor, squares: Tensor) -> None:
        if not count:
            return
        if not self.count:
            self.count, self.center, self.squares = count, center, squares
            return
        total = self.count + count
        delta = center - self.center
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.center = self.center + delta * (count / total)
        self.count = total
