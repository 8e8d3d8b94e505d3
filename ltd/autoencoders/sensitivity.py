"""How much each latent channel matters in pixels: a scale of latents that puts a denoiser's effort where it shows."""

from __future__ import annotations

import torch
from torch import Tensor

from ltd.autoencoders.autoencoder import Autoencoder


@torch.no_grad()
def pixel_sensitivity(model: Autoencoder, latents: Tensor, std: Tensor, signs: Tensor) -> Tensor:
    """Measure the change of the pixels when one channel moves by its standard deviation.

    Args:
        model: Autoencoder.
        latents: Raw latents of some clips, ``(b, c, t, h, w)``.
        std: Standard deviation of each channel over the data, ``(c,)``.
        signs: +1 or -1 for each cell, ``(b, t, h, w)``: which way it moves.

    Returns:
        Root mean square change of the decoded pixels per channel, ``(c,)`` float64; for an orthonormal linear decoder
        it is in proportion to ``std``.
    """
    base = model.decode(latents).double()
    changes = []
    for channel, step in enumerate(std.tolist()):
        moved = latents.clone()
        moved[:, channel] += step * signs.to(latents)
        changes.append((model.decode(moved).double() - base).square().mean().sqrt())
    return torch.stack(changes).cpu()


def pixel_scaled_std(std: Tensor, sensitivity: Tensor) -> Tensor:
    """Turn sensitivities into the divisor of a ``LatentNorm``.

    Args:
        std: Standard deviation of each raw channel, ``(c,)``.
        sensitivity: What ``pixel_sensitivity`` gave, ``(c,)``.

    Returns:
        ``(c,)``: dividing by it gives channels whose standard deviations are in proportion to their sensitivity, with
        mean square 1 over the channels, so that an error of given size costs the same in pixels in every channel.
    """
    wanted = sensitivity / sensitivity.square().mean().sqrt()
    return std / wanted
