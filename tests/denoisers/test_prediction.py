"""A denoiser that predicts data returns the velocity of that prediction."""

from __future__ import annotations

import pytest
import torch

from ltd.config import ConfigError
from ltd.denoisers import DitConfig, build_denoiser
from ltd.diffusion import LinearPath

CONFIG = DitConfig(latent_channels=4, patch=(1, 1, 1), width=24, depth=1, num_heads=2, prediction="data")


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_right_data_give_the_right_velocity() -> None:
    model = build_denoiser(CONFIG).double()
    x0, eps, t = draw(3, 4, 2, 3, 5, seed=0), draw(3, 4, 2, 3, 5, seed=1), torch.tensor([0.05, 0.4, 1.0]).double()
    path = LinearPath()
    found = model._velocity(x0, path.interpolate(x0, eps, t), t)
    torch.testing.assert_close(found, path.velocity(x0, eps), rtol=1e-10, atol=1e-10)


def test_at_the_start_data_are_predicted_as_zero_and_small_times_are_held_up() -> None:
    model = build_denoiser(CONFIG).double()
    x_t, t = draw(2, 4, 2, 3, 5, seed=0), torch.tensor([0.5, 0.001]).double()
    expected = torch.stack([x_t[0] / 0.5, x_t[1] / CONFIG.min_time])
    torch.testing.assert_close(model(x_t, t), expected)


def test_last_euler_step_lands_on_the_predicted_data() -> None:
    model = build_denoiser(CONFIG).double()
    with torch.no_grad():
        torch.nn.init.normal_(model.final.linear.weight, std=0.5)
    x_t, t = draw(1, 4, 2, 3, 5, seed=0), torch.tensor([0.1]).double()
    raw: list[torch.Tensor] = []
    model.final.register_forward_hook(lambda module, inputs, output: raw.append(output.detach()))
    landed = x_t - 0.1 * model(x_t, t).detach()
    predicted = raw[0].reshape(1, 2, 3, 5, 4).permute(0, 4, 1, 2, 3)
    assert predicted.std() > 0.1
    torch.testing.assert_close(landed, predicted)


def test_min_time_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_time"):
        DitConfig(min_time=0.0)
