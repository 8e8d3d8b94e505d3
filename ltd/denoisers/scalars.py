"""The numbers of a sample that a model may be told: frame rate, size of the source, what the cut leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Columns of a sample's size and crop, in the order of ``geometry``.
_GEOMETRY = ("height", "width", "crop_top", "crop_left")


def stack_scalars(names: Sequence[str], fps: Tensor, geometry: Tensor) -> Tensor:
    """Put the numbers in the order in which a model takes them.

    Args:
        names: ``DitConfig.scalars``.
        fps: Frames per second ``(b,)``; 0, of images and where unknown, becomes NaN.
        geometry: ``(b, 4)``: height and width of the source, rows above and columns left of the cut; NaN = unknown.

    Returns:
        ``(b, len(names))``, float32, NaN where unknown.
    """
    known = {name: geometry[:, column].float() for column, name in enumerate(_GEOMETRY)}
    known["fps"] = torch.where(fps > 0, fps.float(), math.nan)
    return torch.stack([known[name] for name in names], dim=1)
