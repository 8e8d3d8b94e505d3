"""Shifts, scales and gates: how a condition becomes vectors, and how tokens are met with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.denoisers.config import DitConfig

Condition: TypeAlias = Tensor | tuple[Any, ...]
"""What modulates a block: the condition, or the vectors that its modulation made of it beforehand."""


class ModulatedNorm(nn.Module):
    """RMSNorm or LayerNorm, scaled by ``1 + scale`` and shifted, in fp32 or wider.

    Args:
        config: Options of the family.
        dim: Width.
        eps: Added to the mean square or the variance.
    """

    def __init__(self, config: DitConfig, dim: int, eps: float) -> None:
        super().__init__()
        self.centred, self.eps = config.norm == "layer", eps
        self.weight = nn.Parameter(torch.ones(dim)) if config.norm_weight else None

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Normalise and modulate.

        Args:
            x: ``(b, n, d)``.
            shift: ``(b, 1 or n, d)``.
            scale: Like ``shift``.

        Returns:
            ``(b, n, d)`` in the dtype of ``x``.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(wide)
        norm = F.layer_norm if self.centred else F.rms_norm
        normal = norm(x.to(wide), (x.shape[-1],), weight, eps=self.eps)
        return torch.addcmul(shift.to(wide), normal, 1 + scale.to(wide)).to(x.dtype)


def add_gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Add ``gate * branch`` to ``x``: tokens ``(b, n, d)`` both, gate ``(b, 1 or n, d)``."""
    return torch.addcmul(x, gate, branch)


def of_tokens(vectors: Sequence[Tensor], levels: Tensor | None) -> list[Tensor]:
    """Give tokens ``(b, n)`` their levels' rows of vectors ``(b or 1, k, d)``, or the vectors as they are."""
    return list(vectors) if levels is None else [_rows_of(vector, levels) for vector in vectors]


def _rows_of(vector: Tensor, levels: Tensor) -> Tensor:
    """Take rows ``levels (b, n)`` of ``(b or 1, k, d)``, without writing out an index for every channel."""
    if vector.device.type == "cpu" and vector.dtype in (torch.float32, torch.float64):
        # Copies and adds whole rows, in the order of a gather: the same bits, several times as fast.
        firsts = vector.shape[1] * torch.arange(len(vector)).unsqueeze(1)
        return F.embedding(levels + firsts, vector.flatten(0, 1))
    return vector.expand(len(levels), -1, -1).gather(1, levels.unsqueeze(-1).expand(-1, -1, vector.shape[-1]))


def vectors_of(modulation: nn.Module, condition: Condition) -> Sequence[Tensor]:
    """Make the vectors of a condition, unless it is them already."""
    return condition if isinstance(condition, tuple) else modulation(condition)


class BlockModulation(nn.Module):
    """Shifts, scales and gates of one block from the condition vector; zero at the start.

    Args:
        dim: Width.
        num_vectors: How many vectors of that width.
        condition_dim: Size of the condition; the width if left out.
    """

    def __init__(self, dim: int, num_vectors: int = 6, condition_dim: int | None = None) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(condition_dim or dim, num_vectors * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Split ``linear(condition)``, with condition ``(b, k, d)`` after its SiLU, into vectors ``(b, k, d)``."""
        return self.linear(condition).chunk(self.num_vectors, dim=-1)


class TableModulation(nn.Module):
    """Shifts, scales and gates from a projection that all share, plus a learned table; zero at first.

    Reference: Chen et al. (2023), PixArt-alpha, arXiv 2310.00426, Sec. 2.3 (adaLN-single).

    Args:
        dim: Width.
        num_vectors: How many vectors of that width.
    """

    def __init__(self, dim: int, num_vectors: int = 6) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.table = nn.Parameter(torch.zeros(num_vectors * dim))

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Add the table to the shared projection ``(b, k, num_vectors d)`` and split it into vectors ``(b, k, d)``."""
        return (condition + self.table).chunk(self.num_vectors, dim=-1)
