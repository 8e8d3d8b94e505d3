"""Between files' frames and models' videos: uint8 (b, t, h, w, c) and float (b, c, t, h, w) in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pixels_to_video(pixels: Tensor) -> Tensor:
    """Scale frames to what models see.

    Args:
        pixels: ``(b, t, h, w, c)``, uint8.

    Returns:
        ``(b, c, t, h, w)``, float32 in [-1, 1].
    """
    return pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def video_to_pixels(video: Tensor) -> Tensor:
    """Round a model's video to frames.

    Args:
        video: ``(b, c, t, h, w)``, any float dtype; values outside [-1, 1] are clipped.

    Returns:
        ``(b, t, h, w, c)``, uint8, contiguous.
    """
    scaled = ((video.float() + 1.0) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def tile(frames: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Lay stills out in a grid, row by row; smaller ones are centred on black.

    Args:
        frames: uint8 ``(h, w, 3)`` each, one or more.
        columns: Stills per row; about as wide as high by default.

    Returns:
        uint8 ``(H, W, 3)``.
    """
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    columns = columns or max(1, round(math.sqrt(len(frames) * height / width)))
    rows = math.ceil(len(frames) / columns)
    grid = np.zeros((rows * height, columns * width, 3), np.uint8)
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        top = row * height + (height - frame.shape[0]) // 2
        left = column * width + (width - frame.shape[1]) // 2
        grid[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    return grid
