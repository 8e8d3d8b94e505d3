"""Sensitivity of pixels to latents on a decoder whose answer is known."""

from __future__ import annotations

import torch
from torch import Tensor

from ltd.autoencoders.sensitivity import pixel_scaled_std, pixel_sensitivity


class LinearDecoder(torch.nn.Module):
    """Each latent channel becomes one pixel channel, times a gain."""

    def __init__(self, gains: Tensor) -> None:
        super().__init__()
        self.gains = gains

    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.gains.reshape(1, -1, 1, 1, 1)


def test_sensitivity_is_gain_times_spread() -> None:
    gains, std = torch.tensor([1.0, -3.0, 0.5, 2.0]), torch.tensor([2.0, 1.0, 1.0, 0.1])
    latents = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    signs = torch.randint(0, 2, (2, 3, 5, 5), generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = pixel_sensitivity(LinearDecoder(gains), latents, std, signs)  # type: ignore[arg-type]
    # one of four pixel channels moves: a mean over all of them halves the root
    torch.testing.assert_close(found, (gains.abs() * std).double() / 2, rtol=1e-5, atol=1e-6)


def test_scaled_latents_have_spread_in_proportion_to_sensitivity_and_unit_mean_square() -> None:
    std, sensitivity = torch.tensor([2.0, 1.0, 0.5]).double(), torch.tensor([1.0, 4.0, 2.0]).double()
    spread = std / pixel_scaled_std(std, sensitivity)
    torch.testing.assert_close(spread / spread[0], sensitivity / sensitivity[0])
    torch.testing.assert_close(spread.square().mean(), torch.tensor(1.0).double())


def test_equal_sensitivities_give_the_ordinary_norm() -> None:
    std = torch.tensor([2.0, 1.0, 0.5])
    assert torch.equal(pixel_scaled_std(std, torch.full((3,), 7.0)), std)
