"""Which tokens of a sample are trained on when most of them are dropped behind the first blocks."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ltd.denoisers.frame_tasks import repeat_cells
from ltd.nn.patch import token_grid
from ltd.rng import DrawRandom
from ltd.shapes import VideoShape


def draw_kept(
    cells: tuple[int, int, int], patch: tuple[int, int, int], share: float, random: DrawRandom
) -> tuple[Tensor, Tensor]:
    """Draw the tokens of each sample that stay.

    Reference: Sehwag et al. (2024), MicroDiT, arXiv 2407.15811, Sec. 3 (deferred masking).

    Args:
        cells: Latent cells (t, h, w) of every sample.
        patch: Latent cells per token.
        share: Share of the tokens that is dropped, in [0, 1).
        random: Random numbers of the ``b`` samples; stream ``"tokens"``.

    Returns:
        Numbers of the tokens that stay ``(b, k)``, long, rising, for ``Conditioning.kept``; the weight of every cell in
        the loss ``(b, t, h, w)``, float: 1 where its token stays, else 0.
    """
    grid = token_grid(VideoShape(*cells), patch)
    num = prod(grid)
    order = random.uniform((num,), "tokens").argsort(dim=1)
    kept = order[:, : max(1, round((1 - share) * num))].sort(dim=1).values
    weight = torch.zeros(len(kept), num).scatter(1, kept, 1.0).unflatten(1, grid)
    return kept, repeat_cells(weight, patch)
