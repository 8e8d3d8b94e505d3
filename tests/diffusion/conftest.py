"""Gaussian data N(mean, std^2), for which the best velocity is known; for tests of objectives and samplers."""

from types import SimpleNamespace

import pytest
import torch

MEAN, STD = 0.7, 0.4


def velocity(x_t, t, cond=None):
    """E[eps - x0 | x_t] for x0 ~ N(MEAN, STD^2), eps ~ N(0, 1)."""
    t = t.reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t.dtype)
    variance = ((1 - t) * STD) ** 2 + t**2
    residual = (x_t - (1 - t) * MEAN) / variance
    return t * residual - (MEAN + (1 - t) * STD**2 * residual)


@pytest.fixture
def gaussian():
    """The data, its velocity, and standard normal noise with mean exactly 0 and standard deviation exactly 1."""
    x = torch.randn(64, 2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = (x - x.mean()) / x.std(correction=0)
    # The flow of Gaussian data is an affine map: the truth for any sampler.
    return SimpleNamespace(mean=MEAN, std=STD, velocity=velocity, noise=noise, truth=MEAN + STD * noise)
