"""Closed-form start of an autoencoder's linear path from data.

The encoder becomes the whitened principal components of blocks of pixels; the decoder the least-squares map from each
neighbourhood of latents to its block. Gradient training then starts from the best linear autoencoder instead of from
noise. Everything is accumulated in float64 from the videos given, in their order: the result depends on them alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.autoencoders.causal_vae import CausalVae
from ltd.nn.causal_conv import FixedCausalConv3d, pad_front, space_to_depth

# Least squares is regularised by this share of the mean squared latent, so that a constant channel stays solvable.
RIDGE = 1e-4


@torch.no_grad()
def initialize_from_data(model: CausalVae, videos: Iterable[Tensor]) -> None:
    """Set the linear path to principal components and least squares; the convolutional path is left as it is.

    Latents get unit variance per channel over the data, ordered from the largest component to the smallest, each with
    the sign that makes its weights' sum positive.

    Reference: Pearson (1901) (principal components); Hoerl and Kennard (1970) (ridge regression).

    Args:
        model: Autoencoder with ``linear_path``; changed in place.
        videos: Batches ``(b, c, t, h, w)`` in [-1, 1] of any sizes; kept in memory until the function returns.

    Raises:
        ValueError: If the model has no linear path, or the videos hold fewer blocks than the block has values.
    """
    if not model.linear_encoder:
        raise ValueError("initialize_from_data needs a model with a linear path (model.linear_path: true)")
    batches = list(videos)
    _set_encoder(model, batches)
    _set_decoder(model, batches)


def _blocks(model: CausalVae, video: Tensor) -> Tensor:
    factors = (model.compression.t, model.compression.h, model.compression.w)
    return space_to_depth(video.float(), factors).movedim(1, -1)


def _set_encoder(model: CausalVae, batches: list[Tensor]) -> None:
    project = model.linear_encoder[1]
    assert isinstance(project, FixedCausalConv3d) and project.bias is not None
    size = project.in_channels
    count, total = 0, torch.zeros(size, dtype=torch.float64)
    products = torch.zeros(size, size, dtype=torch.float64)
    for video in batches:
        rows = _blocks(model, video).reshape(-1, size)
        count += len(rows)
        total += rows.double().sum(0)
        products += (rows.T @ rows).double()
    if count < size:
        raise ValueError(f"initialize_from_data: got {count} blocks of {size} values, needed at least {size} blocks")
    mean = total / count
    variances, basis = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    keep = model.latent_channels
    variances, basis = variances.flip(0)[:keep].clamp_min(1e-12), basis.flip(1)[:, :keep]
    basis = basis * torch.where(basis.sum(0) < 0, -1.0, 1.0)
    weight = (basis / variances.sqrt()).T
    project.weight.copy_(weight.reshape(project.weight.shape))
    project.bias.copy_(-(weight @ mean))


def _set_decoder(model: CausalVae, batches: list[Tensor]) -> None:
    project, rebuild = model.linear_encoder[1], model.linear_decoder[0]
    assert isinstance(project, FixedCausalConv3d) and isinstance(rebuild, FixedCausalConv3d)
    assert project.bias is not None and rebuild.bias is not None
    weight, bias = project.weight.float().flatten(1), project.bias.float()
    kernel = (rebuild.kernel_size[0], rebuild.kernel_size[1], rebuild.kernel_size[2])
    size = rebuild.in_channels * math.prod(kernel) + 1
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, project.in_channels, dtype=torch.float64)
    count = 0
    for video in batches:
        blocks = _blocks(model, video)
        rows = _neighbourhoods((blocks @ weight.T + bias).movedim(-1, 1), kernel)
        count += len(rows)
        gram += (rows.T @ rows).double()
        cross += (rows.T @ blocks.reshape(len(rows), -1)).double()
    penalty = torch.full((size,), RIDGE * count, dtype=torch.float64)
    penalty[-1] = 0.0  # the constant is free
    solution = torch.linalg.solve(gram + penalty.diag(), cross).T
    rebuild.weight.copy_(solution[:, :-1].reshape(rebuild.weight.shape))
    rebuild.bias.copy_(solution[:, -1])


def _neighbourhoods(latents: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """List what a causal convolution sees at every cell: ``(cells, c * prod(kernel) + 1)``, the last column 1."""
    kt, kh, kw = kernel
    padded = F.pad(pad_front(latents, kt - 1), (kw // 2, kw // 2, kh // 2, kh // 2, 0, 0), mode="replicate")
    windows = padded.unfold(2, kt, 1).unfold(3, kh, 1).unfold(4, kw, 1)
    rows = windows.movedim(1, 4).flatten(4).flatten(0, 3)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
