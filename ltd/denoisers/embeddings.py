"""Embeddings of one block, and the wide head: parts that only some members of the family have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.denoisers.blocks import DitBlock, TokenContext
from ltd.denoisers.config import DitConfig
from ltd.denoisers.tokens import Tokens
from ltd.nn.embed import (
    LabelEmbedding,
    TextEmbedding,
    TextPartsEmbedding,
    TimeEmbedding,
    grid_sinusoid,
    position_sinusoid,
)
from ltd.nn.rope import rope_tables


def time_embedding(config: DitConfig, dim: int) -> TimeEmbedding:
    """Build an embedding of the time of a size."""
    return TimeEmbedding(
        dim,
        num_frequencies=config.time_features,
        scale=config.time_scale,
        shift=config.time_feature_shift,
        flipped=config.time_direction == "data",
        fourier=config.time_embedding == "fourier",
    )


def text_embedding(config: DitConfig) -> TextEmbedding | TextPartsEmbedding | None:
    """Build the embedding of the text, of one encoder or of several; None for a model without text."""
    if config.text_dim is None:
        return None
    if config.text_parts:
        return TextPartsEmbedding(config.text_parts, config.width, norm=config.text_norm)
    return TextEmbedding(config.text_dim, config.width, norm=config.text_norm)


def rotations(config: DitConfig, tokens: Tokens, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make the tables of RoPE for tokens, cos and sin."""
    return rope_tables(tokens.positions, config.head_split, theta=config.rope_theta, dtype=dtype)


def place_embedding(config: DitConfig, tokens: Tokens, dtype: torch.dtype) -> Tensor | None:
    """Embed positions ``(b or 1, n, 3)`` as the configuration says, ``(b or 1, n, d)``."""
    positions = tokens.positions if tokens.places is None else tokens.places
    match config.position_embedding:
        case "sincos":
            return position_sinusoid(positions, config.width, dtype)
        case "sincos_2d":
            return grid_sinusoid(positions, config.width, dtype)
        case _:
            return None


class BlockEmbedding(nn.Module):
    """Time and label, embedded for one block.

    Args:
        config: Options of the family.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.time_embedding = time_embedding(config, config.width)
        self.label_embedding = LabelEmbedding(config.num_classes, config.width) if config.num_classes else None

    def forward(self, times: Tensor, label: Tensor) -> Tensor:
        """Embed times ``(b, k)`` and labels ``(b,)`` as ``(b, k, d)``."""
        vector = self.time_embedding(times.flatten()).unflatten(0, times.shape)
        return vector if self.label_embedding is None else vector + self.label_embedding(label).unsqueeze(1)


class WideHead(nn.Module):
    """Blocks that see the noisy patches again, modulated token by token by what the blocks before made of them.

    Inspired by the wide head of RAE: Zheng et al. (2025), arXiv 2510.11690, Sec. 4.3 (DiT^DH), and by DDT: Wang et al.
    (2025), arXiv 2504.05741. A last layer narrower than the latents' channels has a floor to its loss: hence wide.

    Args:
        config: Options of the family.
    """

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        assert config.head is not None
        head = config.head
        self.config = config
        self.patch_embedding = nn.Linear(config.patch_dim, head.width)
        self.projection = nn.Linear(config.width, head.width) if config.width != head.width else nn.Identity()
        self.blocks = nn.ModuleList(DitBlock(config, head=True) for _ in range(head.depth))

    def forward(self, x: Tensor, time: Tensor, tokens: Tokens, context: TokenContext) -> tuple[Tensor, Tensor]:
        """Run the head.

        Args:
            x: Tokens ``(b, n, d)`` behind the blocks.
            time: Embedded time of every token ``(b, 1 or n, d)``.
            tokens: Patches ``(b, n, patch_dim)`` and their positions.
            context: Where the samples of a pack lie.

        Returns:
            Tokens ``(b, n, head.width)``, and the condition of every token, of the same shape.
        """
        assert self.config.head is not None
        condition = self.projection(F.silu(x + time))
        cos = sin = None
        if self.config.rotary:
            split = self.config.wide_head_split
            wide = torch.promote_types(x.dtype, torch.float32)
            cos, sin = rope_tables(tokens.positions, split, theta=self.config.rope_theta, dtype=wide)
        own = TokenContext(cos, sin, packing=context.packing, per_token=True)
        x = self.patch_embedding(tokens.x)
        for block in self.blocks:
            x = block(x, condition, own)
        return x, condition
