"""Geometry on uint8 frames ``(t, h, w, c)``: antialiased resize, crop. Knows no randomness and no files.

To *cover* a size, the picture is scaled by one factor until it just covers it, to whole pixels, and then cut.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

#: How frames are scaled and cut, recorded in the manifests of latent caches.
FILTER = "bicubic-antialiased-cover2"


def cover_size(source_height: int, source_width: int, height: int, width: int) -> tuple[int, int]:
    """Find the size to scale to.

    Args:
        source_height: Rows of the source.
        source_width: Columns of the source.
        height: Rows to cover.
        width: Columns to cover.

    Returns:
        (rows, columns): one of them as asked, the other at least as large, rounded.
    """
    factor = max(height / source_height, width / source_width)
    return max(height, round(source_height * factor)), max(width, round(source_width * factor))


def cut_offset(scaled: tuple[int, int], height: int, width: int, crop: tuple[float, float]) -> tuple[int, int]:
    """Find the first pixel of the cut.

    Args:
        scaled: (rows, columns) of the scaled picture.
        height: Rows of the cut.
        width: Columns of the cut.
        crop: Position in (height, width) as a share of the slack; (0.5, 0.5) is the centre.

    Returns:
        (top, left).
    """
    return round(crop[0] * (scaled[0] - height)), round(crop[1] * (scaled[1] - width))


def cut_geometry(
    source: tuple[int, int], height: int, width: int, crop: tuple[float, float], *, flip: bool
) -> tuple[float, float, float, float]:
    """Say what was cut out of what, as SDXL tells its denoiser.

    Reference: Podell et al. (2023), arXiv 2307.01952, Section 2.2.

    Args:
        source: (rows, columns) of the upright source.
        height: Rows of the cut.
        width: Columns of the cut.
        crop: Position of the cut, as in ``cut_offset``.
        flip: Whether the cut was mirrored left and right; what it leaves out on the left is then the source's right.

    Returns:
        Height and width of the source; rows above and columns left of the cut, in pixels of the scaled picture.
    """
    scaled = cover_size(*source, height, width)
    top, left = cut_offset(scaled, height, width, crop)
    left = scaled[1] - width - left if flip else left
    return float(source[0]), float(source[1]), float(top), float(left)


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize frames with an antialiased bicubic filter.

    Args:
        frames: uint8 ``(t, h, w, 3)``.
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        uint8 ``(t, height, width, 3)``; the input itself where nothing changes.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    if not (frames.flags.c_contiguous and frames.flags.writeable):  # torch takes neither turned nor read-only arrays
        frames = frames.copy()
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    # torch's uint8 kernel is the filter of Pillow, at a fifth of the time, where it gets interleaved rows.
    scaled = functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return scaled.permute(0, 2, 3, 1).numpy()


def cover(frames: np.ndarray, height: int, width: int, *, crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Scale frames until they cover a size, and cut.

    Args:
        frames: uint8 ``(t, h, w, 3)``.
        height: Rows of the result.
        width: Columns of the result.
        crop: Position of the cut in (height, width) as a share of the slack; (0.5, 0.5) is the centre.

    Returns:
        uint8 ``(t, height, width, 3)``, contiguous; the source's own pixels where nothing is scaled.
    """
    scaled = cover_size(frames.shape[1], frames.shape[2], height, width)
    top, left = cut_offset(scaled, height, width, crop)
    return np.ascontiguousarray(resize(frames, *scaled)[:, top : top + height, left : left + width])
