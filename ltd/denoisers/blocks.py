"""The transformer block of the DiT family and its output layer: single-device modules on tokens and a condition vector.

Blocks take tensors (and the plain numbers of a pack) and return tensors, so that activation checkpointing can wrap them
from outside, and nothing in them depends on the number of tokens, so that they run unchanged on a part of the sequence.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.nn.attention import CrossAttention, SelfAttention
from ltd.nn.norm import RMSNorm
from ltd.nn.packing import Packing, by_sample


def normalise_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Apply a parameter-free RMSNorm, scale by ``1 + scale`` and shift, in fp32 or wider.

    Args:
        x: ``(b, n, d)``.
        shift: ``(b, 1 or n, d)``.
        scale: Like ``shift``.
        eps: Added to the mean square.

    Returns:
        ``(b, n, d)`` in the dtype of ``x``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normal = F.rms_norm(x.to(wide), (x.shape[-1],), eps=eps)
    return torch.addcmul(shift.to(wide), normal, 1 + scale.to(wide)).to(x.dtype)


def add_gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Add ``gate * branch`` to ``x``: tokens ``(b, n, d)`` both, gate ``(b, 1, d)``."""
    return torch.addcmul(x, gate, branch)


class SwiGLU(nn.Module):
    """Gated perceptron: ``out(silu(a) * b)`` with ``a, b`` from one product.

    Reference: Shazeer (2020), arXiv 2002.05202, Eq. 6.

    Args:
        dim: Width of input and output.
        hidden: Width of the gate.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(dim, 2 * hidden)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., dim)``."""
        gate, value = self.input(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class BlockModulation(nn.Module):
    """Shifts, scales and gates of one block from the condition vector; zero at the start.

    Args:
        dim: Width.
        num_vectors: How many vectors of that width.
    """

    def __init__(self, dim: int, num_vectors: int = 6) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(dim, num_vectors * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Split ``linear(condition)``, with condition ``(b, 1, d)`` after its SiLU, into vectors ``(b, 1, d)``."""
        return self.linear(condition).chunk(self.num_vectors, dim=-1)


class TableModulation(nn.Module):
    """Shifts, scales and gates of one block from a projection that all share, plus a learned table; zero at first.

    Reference: Chen et al. (2023), PixArt-alpha, arXiv 2310.00426, Sec. 2.3 (adaLN-single).

    Args:
        dim: Width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6 * dim))

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Add the table to the shared projection ``(b, 1, 6 d)`` and split it into six ``(b, 1, d)``."""
        return (condition + self.table).chunk(6, dim=-1)


class DitBlock(nn.Module):
    """Self-attention, text cross-attention (if any) and SwiGLU, modulated by adaLN-zero: the identity at the start.

    Reference: Peebles and Xie (2022), arXiv 2212.09748, Sec. 3.2.

    Args:
        dim: Width.
        num_heads: Attention heads.
        mlp_hidden: Width of the SwiGLU gate.
        shared_modulation: Whether the condition arrives projected to ``6 * dim`` and the block only adds a table.
        cross_attention: Whether the block reads text.
        qk_norm: Whether queries and keys are normalised.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_hidden: int,
        *,
        shared_modulation: bool = False,
        cross_attention: bool = False,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        self.modulation = TableModulation(dim) if shared_modulation else BlockModulation(dim)
        self.attention = SelfAttention(dim, num_heads, qk_norm=qk_norm)
        self.cross_norm = RMSNorm(dim) if cross_attention else None
        self.cross_attention = CrossAttention(dim, num_heads, qk_norm=qk_norm) if cross_attention else None
        self.mlp = SwiGLU(dim, mlp_hidden)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        cos: Tensor,
        sin: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Update tokens.

        Args:
            x: ``(b, n, d)``.
            condition: ``(b, 1, d)`` after its SiLU, or the shared projection ``(b, 1, 6 d)``; a pack's has a row per
                sample.
            cos: Rotation table ``(b or 1, n, 1, head_dim / 2)``.
            sin: Like ``cos``.
            text: ``(b, m, d)``; needed by a block with cross-attention.
            text_mask: Bool ``(b, m)``; of a pack, which samples have text, or None (``CrossAttention``).
            packing: Where the samples of a pack lie, b = 1; None when a row is a sample.

        Returns:
            ``(b, n, d)``.
        """
        lengths, segments = (packing.lengths, packing.attention) if packing else (None, None)
        modulated = functools.partial(by_sample, normalise_modulate, lengths)
        gated = functools.partial(by_sample, add_gated, lengths)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)
        x = gated([x, self.attention(modulated([x], [shift_a, scale_a]), cos, sin, segments)], [gate_a])
        if self.cross_attention is not None and self.cross_norm is not None:
            text_segments = packing.text if packing else None
            x = x + self.cross_attention(self.cross_norm(x), text, text_mask, text_segments)
        return gated([x, self.mlp(modulated([x], [shift_m, scale_m]))], [gate_m])


class FinalLayer(nn.Module):
    """Modulated norm and projection of tokens to patches; outputs zero at the start.

    Args:
        dim: Width.
        patch_dim: Features of one patch.
    """

    def __init__(self, dim: int, patch_dim: int) -> None:
        super().__init__()
        self.modulation = BlockModulation(dim, 2)
        self.linear = nn.Linear(dim, patch_dim)

    def forward(self, x: Tensor, condition: Tensor, lengths: tuple[int, ...] | None = None) -> Tensor:
        """Project tokens to patches.

        Args:
            x: ``(b, n, d)``.
            condition: ``(b, 1, d)``; a row per sample of a pack.
            lengths: Tokens of each sample of a pack, b = 1; None when a row is a sample.

        Returns:
            ``(b, n, patch_dim)``.
        """
        return self.linear(by_sample(normalise_modulate, lengths, [x], self.modulation(condition)))
