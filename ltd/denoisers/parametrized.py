"""A trained network together with what it predicts: the denoiser that it means. Knows no files and no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ltd.denoisers.checks import check_times
from ltd.denoisers.conditioning import Conditioning
from ltd.denoisers.config import DitConfig
from ltd.denoisers.dit import Dit
from ltd.diffusion import ParametrizationConfig, as_denoiser, network_times


class Parametrized(nn.Module):
    """Return velocities, whatever the network was trained to predict.

    Args:
        network: Predicts what ``parametrization`` says.
        parametrization: Prediction and path.
    """

    def __init__(self, network: Dit, parametrization: ParametrizationConfig) -> None:
        super().__init__()
        self.network, self.parametrization = network, parametrization

    @property
    def config(self) -> DitConfig:
        """Configuration of the network."""
        return self.network.config

    def prepare(self, cond: Conditioning) -> Conditioning:
        """Compute what text and image give once, as ``Dit.prepare``."""
        return self.network.prepare(cond)

    def prepare_steps(self, cond: Conditioning, times: Tensor) -> list[Conditioning]:
        """Compute once what every step of a sampler has in common or knows beforehand, as ``Dit.prepare_steps``."""
        return self.network.prepare_steps(cond, network_times(self.parametrization, times))

    def forward(self, x_t: Tensor | Sequence[Tensor], t: Tensor, cond: Conditioning | None = None) -> Any:
        """Predict the velocity of the network's path.

        Args:
            x_t: Noisy latents ``(b, c, t, h, w)``, or b samples ``(c, t, h, w)`` of any sizes.
            t: Times ``(b,)`` in [0, 1]; 0 is data, 1 is noise. Or ``(b, t)``, a time for every latent frame.
            cond: Conditions, passed on to the network.

        Returns:
            The velocity in the shapes and dtypes of ``x_t``; a list where ``x_t`` is samples.

        Raises:
            ValueError: If a time lies outside [0, 1] (looked at on the CPU only), or the network takes no such input.
        """
        check_times(t)
        denoiser: Callable[..., Any] = as_denoiser(self.network, self.parametrization)
        return denoiser(x_t, t, cond)
