"""Geometry on uint8 frames ``(t, h, w, c)``: antialiased resize, crop, flip. Knows no randomness and no files."""

from __future__ import annotations

import numpy as np
from PIL import Image

#: How frames are resized, recorded in the manifests of latent caches.
FILTER = "bicubic-antialiased"


def resize(
    frames: np.ndarray, height: int, width: int, *, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Resize frames, or a part of them, with an antialiased bicubic filter.

    Args:
        frames: uint8 ``(t, h, w, 3)``.
        height: Rows of the result.
        width: Columns of the result.
        box: Part of the source as (left, top, right, bottom) in source pixels; None takes all of it.

    Returns:
        uint8 ``(t, height, width, 3)``; the input itself where nothing changes.
    """
    source_height, source_width = frames.shape[1:3]
    whole = (0.0, 0.0, float(source_width), float(source_height))
    box = box or whole
    if (source_height, source_width) == (height, width) and box == whole:
        return frames
    images = (Image.fromarray(frame) for frame in frames)
    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box)) for image in images])


def cover(
    frames: np.ndarray, height: int, width: int, *, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> np.ndarray:
    """Cut frames to a size: the largest part of the wanted aspect, resized in one step.

    Args:
        frames: uint8 ``(t, h, w, 3)``.
        height: Rows of the result.
        width: Columns of the result.
        crop: Position of the part in (height, width) as a share of the slack; (0.5, 0.5) is the centre.
        flip: Whether to mirror left and right.

    Returns:
        uint8 ``(t, height, width, 3)``, contiguous.
    """
    source_height, source_width = frames.shape[1:3]
    scale = min(source_height / height, source_width / width)
    part_height, part_width = min(height * scale, source_height), min(width * scale, source_width)
    top = crop[0] * (source_height - part_height)
    left = crop[1] * (source_width - part_width)
    if scale == 1.0:  # no resampling: whole pixels, so that the cut equals the source
        top, left = float(round(top)), float(round(left))
    box = (left, top, min(left + part_width, source_width), min(top + part_height, source_height))
    cut = resize(frames, height, width, box=box)
    return np.ascontiguousarray(cut[:, :, ::-1] if flip else cut)
