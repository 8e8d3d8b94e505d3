"""Embeddings of what a denoiser is told: times, labels, text tokens, positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.nn.norm import RMSNorm
from ltd.nn.rope import default_rope_split, rope_tables


def sinusoid(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed numbers by cosines and sines of geometrically spaced frequencies.

    Reference: Vaswani et al. (2017), arXiv 1706.03762, Sec. 3.5 (cosines first).

    Args:
        values: ``(b,)``.
        dim: Size of the embedding, even.
        max_period: Longest period; the shortest is ``2 pi``.

    Returns:
        ``(b, dim)``, float32, or float64 for float64 values.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    steps = torch.arange(dim // 2, device=values.device, dtype=values.dtype)
    angles = values[:, None] * torch.exp(steps * (-math.log(max_period) / (dim // 2)))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def position_sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Embed (t, h, w) positions by cosines and sines, a third of the channels per axis.

    Args:
        positions: ``(b or 1, n, 3)``, whole or fractional.
        dim: Size of the embedding; even, 6 or more.

    Returns:
        ``(b or 1, n, dim)``, float32: all cosines, then all sines.

    Raises:
        ValueError: If ``dim`` is odd or too small for three axes.
    """
    return torch.cat(rope_tables(positions, default_rope_split(dim)), dim=-1).squeeze(-2)


class TimeEmbedding(nn.Module):
    """Embed diffusion times: sinusoid, then a two-layer perceptron.

    Args:
        dim: Size of the embedding.
        num_frequencies: Size of the sinusoid, even.
        scale: What times in [0, 1] are multiplied by first; the discrete-time models' 1000 by default.
    """

    def __init__(self, dim: int, *, num_frequencies: int = 256, scale: float = 1000.0) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.scale = scale
        self.input = nn.Linear(num_frequencies, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times ``(b,)`` in [0, 1] as ``(b, dim)`` in the parameters' dtype; the sinusoid is computed in fp32."""
        wide = sinusoid(t.to(torch.promote_types(t.dtype, torch.float32)) * self.scale, self.num_frequencies)
        return self.output(F.silu(self.input(wide.to(self.input.weight.dtype))))


class LabelEmbedding(nn.Module):
    """Embed class labels; every negative label is the null class, a row of its own.

    Args:
        num_classes: Number of classes.
        dim: Size of the embedding.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, label: Tensor) -> Tensor:
        """Embed labels ``(b,)``, long, negative for none, as ``(b, dim)``."""
        return self.table(torch.where(label < 0, self.num_classes, label))


class TextEmbedding(nn.Module):
    """Bring a text encoder's token embeddings to the model's width: norm, linear, GELU, linear.

    Args:
        text_dim: Size of the encoder's embeddings.
        dim: Size of the result.
    """

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(text_dim)
        self.input = nn.Linear(text_dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        """Project ``(b, n, text_dim)`` of any dtype to ``(b, n, dim)`` in the parameters' dtype."""
        text = text.to(self.input.weight.dtype)
        return self.output(F.gelu(self.input(self.norm(text)), approximate="tanh"))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average the kept tokens.

    Args:
        x: ``(b, n, d)``.
        mask: Bool ``(b, n)``, True = keep.

    Returns:
        ``(b, d)``; zero where nothing is kept.
    """
    kept = torch.where(mask[..., None], x, 0)
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(x.dtype)
