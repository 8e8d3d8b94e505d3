"""Rotary position embedding over (t, h, w) from explicit positions, so that it is right on every shard and size.

Each head's channels are split among the three axes; channel ``i`` is rotated together with channel ``i + head_dim / 2``
by an angle that is linear in the token's position, so scores depend only on differences of positions.

Reference: Su et al. (2021), arXiv 2104.09864, Eq. 34.
"""

from __future__ import annotations

import torch
from torch import Tensor


def default_rope_split(head_dim: int) -> tuple[int, int, int]:
    """Share a head's channels among (t, h, w): a third each, in even parts, time taking the remainder.

    Args:
        head_dim: Channels of one head; even, 6 or more.

    Returns:
        Channels for (t, h, w).

    Raises:
        ValueError: If ``head_dim`` is odd or too small for three even parts.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(
            f"num_heads: got heads of {head_dim} channels (width / num_heads), needed an even number of 6 or more "
            "(3D RoPE splits it among time, height and width)"
        )
    part = head_dim // 6 * 2
    return head_dim - 2 * part, part, part


def check_rope_split(split: tuple[int, int, int], head_dim: int) -> None:
    """Refuse a split that does not cover the head in even parts.

    Args:
        split: Channels for (t, h, w).
        head_dim: Channels of one head.

    Raises:
        ValueError: If a part is odd or negative, or the parts do not add up to ``head_dim``.
    """
    if min(split) < 0 or any(part % 2 for part in split) or sum(split) != head_dim:
        raise ValueError(
            f"rope_split: got {split}, needed three even parts that add up to head_dim = {head_dim} (width / num_heads)"
        )


def rope_tables(
    positions: Tensor, split: tuple[int, int, int], *, theta: float = 10_000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Compute the cosine and sine of every token's rotation angles, in float64 inside.

    Args:
        positions: ``(b or 1, n, 3)``, (t, h, w) coordinates, whole or fractional.
        split: Channels for (t, h, w), each even.
        theta: Base of the geometric series of frequencies, from 1 down to about ``1 / theta`` on each axis.
        dtype: Dtype of the result; no less than float32.

    Returns:
        Cosine and sine, each ``(b or 1, n, 1, head_dim / 2)``.
    """
    angles = []
    for axis, part in enumerate(split):
        exponents = torch.arange(0, part, 2, device=positions.device, dtype=torch.float64) / max(part, 1)
        angles.append(positions[..., axis : axis + 1].double() * theta**-exponents)
    angle = torch.cat(angles, dim=-1).unsqueeze(-2)  # b n 1 head_dim/2
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys.

    Args:
        x: ``(b, n, heads, head_dim)``.
        cos: ``(b or 1, n, 1, head_dim / 2)``, float32 or wider.
        sin: Like ``cos``.

    Returns:
        Rotated ``x``; its dtype is kept, the arithmetic is that of the tables.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
