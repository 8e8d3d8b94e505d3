"""Embeddings of what a denoiser is told: times, labels, text tokens, positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.nn.norm import RMSNorm
from ltd.nn.rope import default_rope_split, rope_tables


def sinusoid(values: Tensor, dim: int, max_period: float = 10_000.0, *, shift: int = 0) -> Tensor:
    """Embed numbers by cosines and sines of geometrically spaced frequencies.

    Reference: Vaswani et al. (2017), arXiv 1706.03762, Sec. 3.5 (cosines first).

    Args:
        values: ``(b,)``.
        dim: Size of the embedding, even.
        max_period: Longest period over ``2 pi``, about; the shortest is ``2 pi``.
        shift: 1 makes the lowest frequency exactly ``1 / max_period``.

    Returns:
        ``(b, dim)``, float32, or float64 for float64 values.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    steps = torch.arange(dim // 2, device=values.device, dtype=values.dtype)
    # In this order of operations, as the published models were trained: another rounds large angles differently.
    angles = values[:, None] * torch.exp(-math.log(max_period) * steps / (dim // 2 - shift))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def position_sinusoid(positions: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embed (t, h, w) positions by cosines and sines, a third of the channels per axis.

    Args:
        positions: ``(b or 1, n, 3)``, whole or fractional.
        dim: Size of the embedding; even, 6 or more.
        dtype: Of the result, float32 or wider.

    Returns:
        ``(b or 1, n, dim)``: all cosines, then all sines.

    Raises:
        ValueError: If ``dim`` is odd or too small for three axes.
    """
    return torch.cat(rope_tables(positions, default_rope_split(dim), dtype=dtype), dim=-1).squeeze(-2)


def grid_sinusoid(positions: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embed the column, then the row of positions, each by sines and then cosines; the time is left out.

    The layout of DiT (Peebles and Xie, 2022), whose embedding of a grid is fixed.

    Args:
        positions: ``(b or 1, n, 3)``, (t, h, w), whole or fractional.
        dim: Size of the embedding; divides by 4.
        dtype: Of the result, float32 or wider.

    Returns:
        ``(b or 1, n, dim)``.
    """
    steps = torch.arange(dim // 4, device=positions.device, dtype=torch.float64) / (dim // 4)
    angles = positions.double()[..., (2, 1), None] * 10_000.0**-steps  # b n 2 dim/4
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)


class TimeEmbedding(nn.Module):
    """Embed diffusion times, or other numbers of a sample: features, then a two-layer perceptron.

    Args:
        dim: Size of the embedding.
        num_frequencies: Number of features, even.
        scale: What times in [0, 1] are multiplied by first; the discrete-time models' 1000 by default.
        shift: Of the sinusoid's frequencies.
        flipped: Whether the features are of ``1 - t``.
        fourier: Whether the frequencies are drawn once (standard normal, stored) instead of a geometric series.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_frequencies: int = 256,
        scale: float = 1000.0,
        shift: int = 0,
        flipped: bool = False,
        fourier: bool = False,
    ) -> None:
        super().__init__()
        self.num_frequencies, self.scale, self.shift, self.flipped = num_frequencies, scale, shift, flipped
        self.frequencies: Tensor | None
        self.register_buffer("frequencies", torch.randn(num_frequencies // 2) if fourier else None)
        self.input = nn.Linear(num_frequencies, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times ``(b,)`` in [0, 1] as ``(b, dim)`` in the parameters' dtype; the features are made in fp32."""
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        wide = (1 - wide if self.flipped else wide) * self.scale
        if self.frequencies is None:
            features = sinusoid(wide, self.num_frequencies, shift=self.shift)
        else:
            angles = 2 * math.pi * wide[:, None] * self.frequencies.to(wide.dtype)
            features = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return self.output(F.silu(self.input(features.to(self.input.weight.dtype))))


class ScalarEmbedding(nn.Module):
    """Embed several numbers of a sample, such as its frame rate, and add them up; a NaN is unknown and adds nothing.

    Reference: Podell et al. (2023), SDXL, arXiv 2307.01952, Sec. 2.2 (size and crop as conditions).

    Args:
        num: How many numbers.
        dim: Size of the embedding.
    """

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(TimeEmbedding(dim, scale=1.0) for _ in range(num))

    def forward(self, values: Tensor) -> Tensor:
        """Embed ``(b, num)`` as ``(b, dim)``."""
        known = ~values.isnan()
        values = torch.where(known, values, 0)
        parts = [layer(values[:, i]) * known[:, i, None] for i, layer in enumerate(self.embeddings)]
        return torch.stack(parts).sum(0)


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
        norm: Whether there is the norm.
    """

    def __init__(self, text_dim: int, dim: int, *, norm: bool = True) -> None:
        super().__init__()
        self.text_dim = text_dim
        self.norm = RMSNorm(text_dim) if norm else nn.Identity()
        self.input = nn.Linear(text_dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        """Project ``(b, n, text_dim)`` of any dtype to ``(b, n, dim)`` in the parameters' dtype."""
        text = text.to(self.input.weight.dtype)
        return self.output(F.gelu(self.input(self.norm(text)), approximate="tanh"))


class TextPartsEmbedding(nn.Module):
    """Bring the embeddings of several text encoders, one behind another, to the model's width, each by its own weights.

    Args:
        parts: Tokens and channels of each encoder.
        dim: Size of the result.
        norm: Whether there is the norm.
    """

    def __init__(self, parts: Sequence[tuple[int, int]], dim: int, *, norm: bool = True) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.text_dim = max(channels for _, channels in parts)
        self.embeddings = nn.ModuleList(TextEmbedding(channels, dim, norm=norm) for _, channels in parts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all encoders."""
        return sum(tokens for tokens, _ in self.parts)

    def forward(self, text: Tensor) -> Tensor:
        """Project ``(b, num_tokens, text_dim)``, narrower encoders padded with zeros, to ``(b, num_tokens, dim)``."""
        stretches = text.split([tokens for tokens, _ in self.parts], dim=1)
        made = [
            layer(stretch[..., :channels])
            for layer, stretch, (_, channels) in zip(self.embeddings, stretches, self.parts, strict=True)
        ]
        return torch.cat(made, dim=1)


class ImageEmbedding(nn.Module):
    """Bring an image encoder's tokens to the model's width: norm, linear, GELU, linear, norm.

    The layout of Wan's image-to-video models.

    Args:
        image_dim: Size of the encoder's tokens.
        dim: Size of the result.
        positions: Number of tokens that have a learned position; None = no positions.
    """

    def __init__(self, image_dim: int, dim: int, positions: int | None = None) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(positions, image_dim)) if positions else None
        self.norm = nn.LayerNorm(image_dim)
        self.input = nn.Linear(image_dim, image_dim)
        self.output = nn.Linear(image_dim, dim)
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """Project the tokens.

        Args:
            image: ``(b, n, image_dim)``, any float dtype.

        Returns:
            ``(b, n, dim)`` in the parameters' dtype.

        Raises:
            ValueError: If the tokens are not as many as the positions.
        """
        image = image.to(self.input.weight.dtype)
        if self.positions is not None:
            if image.shape[1] != len(self.positions):
                raise ValueError(f"image: got {image.shape[1]} tokens, needed image_positions = {len(self.positions)}")
            image = image + self.positions
        return self.out_norm(self.output(F.gelu(self.input(self.norm(image)))))


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
