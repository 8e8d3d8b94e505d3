"""Optical flow between frames, by the dense inverse search that OpenCV ships: no weights, exact to a part of a pixel.

Reference: Kroeger et al. (2016), arXiv 1603.03590.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.encoders.frames import check_clips

#: Smallest side that OpenCV's coarsest level and patches of 8 pixels allow.
_SMALLEST_SIDE = 16


class DenseFlow:
    """Flow from each frame to the next and back.

    Raises:
        ConfigError: If OpenCV is not installed.
    """

    name = "optical flow (OpenCV's dense inverse search, medium preset)"
    preprocessing = "8-bit luma at the frames' own size"

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as error:
            raise ConfigError("flow: needs the package opencv-python; install the 'eval' extra of ltd") from error
        self._cv2: Any = cv2  # its stubs lack this class
        self._search = self._cv2.DISOpticalFlow_create(self._cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def __call__(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Compute flow.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8, 2 frames of 16 x 16 pixels or more.

        Returns:
            Forward ``(b, t - 1, h, w, 2)`` float32, the step in pixels (x, y) from each frame to the next, and
            backward, the same from each next frame back.

        Raises:
            ValueError: If the clips are smaller.
        """
        check_clips(clips)
        b, t, h, w = clips.shape[:4]
        if t < 2 or min(h, w) < _SMALLEST_SIDE:
            raise ValueError(
                f"flow needs 2 frames of {_SMALLEST_SIDE} x {_SMALLEST_SIDE} or more, got {t} of {h} x {w}"
            )
        forward, backward = torch.empty(b, t - 1, h, w, 2), torch.empty(b, t - 1, h, w, 2)
        for index, clip in enumerate(clips):
            grey = [self._cv2.cvtColor(frame.contiguous().numpy(), self._cv2.COLOR_RGB2GRAY) for frame in clip.cpu()]
            for k, (now, after) in enumerate(pairwise(grey)):
                forward[index, k] = torch.from_numpy(self._search.calc(now, after, None))
                backward[index, k] = torch.from_numpy(self._search.calc(after, now, None))
        return forward, backward
