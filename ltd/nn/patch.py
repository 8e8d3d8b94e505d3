"""Latents to tokens and back, and the position of every token. Knows nothing of what the tokens mean.

A token is one patch of latent cells; its features are ordered ``(pt, ph, pw, c)``. Tokens run over (t, h, w), the last
fastest, but no layer may rely on that order: a token's place is given by its position alone.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ltd.shapes import VideoShape, num_tokens


def token_grid(latent: VideoShape, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Count the tokens along each axis.

    Args:
        latent: Size of the latents in cells.
        patch: Latent cells per token along (t, h, w).

    Returns:
        Tokens along (t, h, w).

    Raises:
        ValueError: If an axis does not divide by the patch.
    """
    num_tokens(latent, patch)
    return latent.num_frames // patch[0], latent.height // patch[1], latent.width // patch[2]


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut latents into tokens.

    Args:
        x: ``(b, c, t, h, w)``.
        patch: Latent cells per token along (t, h, w).

    Returns:
        ``(b, n, pt * ph * pw * c)``, a copy.

    Raises:
        ValueError: If an axis does not divide by the patch.
    """
    token_grid(VideoShape(*x.shape[2:]), patch)
    pt, ph, pw = patch
    return rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Put tokens back together: the inverse of ``patchify``.

    Args:
        tokens: ``(b, n, pt * ph * pw * c)``.
        grid: Tokens along (t, h, w).
        patch: Latent cells per token along (t, h, w).

    Returns:
        ``(b, c, t, h, w)``.
    """
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(tokens, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


def grid_positions(grid: tuple[int, int, int], device: torch.device | None = None) -> Tensor:
    """List the (t, h, w) index of every token of a grid.

    Args:
        grid: Tokens along (t, h, w).
        device: Where to make the result.

    Returns:
        ``(1, n, 3)``, float32, in the order of ``patchify``.
    """
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 3)
