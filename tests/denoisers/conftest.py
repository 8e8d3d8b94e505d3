"""Small denoisers whose zero-initialised layers are redrawn, so that every part of them has an effect."""

import pytest
import torch

from ltd.denoisers import Conditioning, Dit, DitConfig

SMALL = {"latent_channels": 3, "width": 24, "depth": 2, "num_heads": 2, "mlp_multiple": 4}


def redraw(model, std=0.3):
    """Redraw every parameter from a normal distribution, norms around one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + values if "norm" in name else values)
    return model


@pytest.fixture
def build():
    """Build a small redrawn float64 model: ``build(text_dim=5, ...)``."""
    return lambda **options: redraw(Dit(DitConfig(**{**SMALL, **options}))).double()


@pytest.fixture
def inputs():
    """Latents of 2 clips of 2x4x6 cells, times, and 4 tokens of text with 3 and 1 real ones."""
    torch.manual_seed(0)
    text = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    x_t = torch.randn(2, 3, 2, 4, 6, dtype=torch.float64)
    return x_t, torch.tensor([0.3, 0.8], dtype=torch.float64), Conditioning(text=text, text_mask=mask)
