"""What moves in clips and what flickers: temporal warping error, and statistics of motion. Flow comes in as tensors.

A flow ``(..., h, w, 2)`` holds, for each pixel of one frame, the step in pixels to where it is in the other: x, then y.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: A forward and a backward flow contradict each other, or a motion boundary begins, above these: share of the squared
#: length, and squared pixels.
_CONTRADICTION, _BOUNDARY = (0.01, 0.5), (0.01, 0.002)
#: Largest flows that decide whether a pair of frames moves, as a share of the pixels.
_LARGEST = 0.05


def warp(frames: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Look up, for each pixel, where the flow says it is in other frames; bilinear.

    Args:
        frames: ``(n, h, w, c)`` the other frames.
        flow: ``(n, h, w, 2)`` steps in pixels, x then y.

    Returns:
        ``(n, h, w, c)`` float64, and ``(n, h, w)``, True where the place is inside of the frame.
    """
    height, width = frames.shape[1:3]
    flow = flow.double()
    x = torch.arange(width, dtype=torch.float64, device=flow.device) + flow[..., 0]
    y = torch.arange(height, dtype=torch.float64, device=flow.device)[:, None] + flow[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    x0, y0 = x.floor().clamp(max=max(width - 2, 0)), y.floor().clamp(max=max(height - 2, 0))
    dx, dy = (x - x0)[..., None], (y - y0)[..., None]
    left, top = x0.long(), y0.long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    n = torch.arange(len(frames), device=flow.device)[:, None, None]
    frames = frames.double()
    upper = frames[n, top, left] * (1 - dx) + frames[n, top, right] * dx
    lower = frames[n, bottom, left] * (1 - dx) + frames[n, bottom, right] * dx
    return upper * (1 - dy) + lower * dy, inside


def visible(forward: Tensor, backward: Tensor) -> Tensor:
    """Tell which pixels of the first frames can be held against the second: not occluded, not at a motion boundary.

    Reference: Ruder et al. (2016), arXiv 1604.08610, Eq. 5-6; Sundaram et al. (2010), doi 10.1007/978-3-642-15549-9_32.

    Args:
        forward: ``(n, h, w, 2)`` flow from the first frames to the second.
        backward: ``(n, h, w, 2)`` flow from the second to the first.

    Returns:
        ``(n, h, w)`` bool.
    """
    forward = forward.double()
    back, inside = warp(backward, forward)  # (n, h, w, 2)
    squared = forward.square().sum(dim=-1)
    error = (forward + back).square().sum(dim=-1)
    agree = error <= _CONTRADICTION[0] * (squared + back.square().sum(dim=-1)) + _CONTRADICTION[1]
    dx = F.pad((forward[:, :, 1:] - forward[:, :, :-1]).square().sum(dim=-1), (0, 1))
    dy = F.pad((forward[:, 1:] - forward[:, :-1]).square().sum(dim=-1), (0, 0, 0, 1))
    smooth = dx + dy <= _BOUNDARY[0] * squared + _BOUNDARY[1]
    return inside & agree & smooth


def warping_errors(clips: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """Compute each clip's temporal warping error; see ``WarpingError``.

    Args:
        clips: ``(b, t, h, w, c)`` pixels in 0..255, any type, 2 frames or more.
        forward: ``(b, t - 1, h, w, 2)`` flow from each frame to the next.
        backward: ``(b, t - 1, h, w, 2)`` flow from each next frame back.

    Returns:
        ``(b, 3)`` float64: 1 where some pixel could be followed, else 0; the error, 0 where none could; the share of
        pixels that were visible.

    Raises:
        ValueError: If the shapes do not fit or a flow is not finite.
    """
    _check(clips, forward, backward)
    rows = []
    for index, clip in enumerate(clips):  # one by one: float64 frames are large
        frames = clip.double() / 255
        seen = visible(forward[index], backward[index])  # (t - 1, h, w)
        moved, _ = warp(frames[1:], forward[index])
        errors = (moved - frames[:-1]).square().mean(dim=-1)  # (t - 1, h, w)
        counts = seen.sum(dim=(1, 2))
        error = 0.0
        if counts.any():
            error = float(((errors * seen).sum(dim=(1, 2))[counts > 0] / counts[counts > 0]).mean())
        rows.append([float(counts.any()), error, float(seen.double().mean())])
    return torch.tensor(rows, dtype=torch.float64).view(-1, 3)


class WarpingError:
    """Temporal warping error: how a frame differs from the next one, moved back along the flow, where it is visible.

    Zero where all change is motion; it grows with flicker. The mean squared difference of pixels in [0, 1] over
    channels and visible pixels, then over pairs of frames that have any, then over clips.

    Reference: Lai et al. (2018), arXiv 1808.00449, Eq. 9-10.
    """

    def __init__(self) -> None:
        self.num_clips = 0
        #: Clips of which some pixel could be followed: the others have no error.
        self.num_followed = 0
        self._sum = 0.0
        self._visible = 0.0

    def update(self, clips: Tensor, forward: Tensor, backward: Tensor) -> None:
        """Count clips; arguments and errors are those of ``warping_errors``."""
        self.count(warping_errors(clips, forward, backward))

    def count(self, rows: Tensor) -> None:
        """Count clips by their own numbers.

        Args:
            rows: ``(b, 3)`` of ``warping_errors``.
        """
        for followed, error, seen in rows.tolist():
            self.num_clips += 1
            self.num_followed += int(followed)
            self._sum += error
            self._visible += seen

    @property
    def value(self) -> float:
        """Mean over the clips that could be followed."""
        if _needed(self.num_clips) and not self.num_followed:
            raise ValueError(f"warping error: no pixel of {self.num_clips} clips can be followed to the next frame")
        return self._sum / self.num_followed

    @property
    def visible_share(self) -> float:
        """Share of the pixels that were visible, mean over clips."""
        return self._visible / _needed(self.num_clips)

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: plain numbers."""
        return {
            "num_clips": self.num_clips,
            "num_followed": self.num_followed,
            "sum": self._sum,
            "visible": self._visible,
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has counted."""
        self.num_clips += state["num_clips"]
        self.num_followed += state["num_followed"]
        self._sum += state["sum"]
        self._visible += state["visible"]


def motion_statistics(clips: Tensor, forward: Tensor) -> Tensor:
    """Compute how each clip moves and flickers; see ``MotionStatistics``.

    Args:
        clips: ``(b, t, h, w, c)`` pixels in 0..255, any type, 2 frames or more.
        forward: ``(b, t - 1, h, w, 2)`` flow from each frame to the next.

    Returns:
        ``(b, 3)`` float64: mean length of the flow in pixels per frame; 1 for a clip that moves, else 0; mean absolute
        difference of consecutive frames, as a share of 255.

    Raises:
        ValueError: If the shapes do not fit or a flow is not finite.
    """
    _check(clips, forward)
    height, width = clips.shape[2:4]
    lengths = forward.double().norm(dim=-1).flatten(2)  # (b, t - 1, h * w)
    largest = lengths.topk(max(1, int(_LARGEST * height * width)), dim=2).values.mean(dim=2)  # (b, t - 1)
    moving = (largest > 6 * min(height, width) / 256).sum(dim=1)
    dynamic = moving >= max(1, round(clips.shape[1] / 4))
    flicker = []
    for clip in clips:  # one by one: float64 frames are large
        frames = clip.double()
        flicker.append((frames[1:] - frames[:-1]).abs().mean() / 255)
    return torch.stack((lengths.mean(dim=(1, 2)).cpu(), dynamic.double().cpu(), torch.stack(flicker).cpu()), dim=1)


class MotionStatistics:
    """How much clips move and flicker; means over clips, inspired by VBench's measures of the same names.

    A pair of frames moves if its largest 5 % of flows are longer than 6 pixels on average, in frames of 256 pixels; a
    clip is dynamic if a quarter of its frames do so (one or more). Flicker is the mean absolute difference of
    consecutive frames, as a share of 255: one minus VBench's score, which holds for clips that should stand still.

    Reference: Huang et al. (2023), arXiv 2311.17982, Sec. 3.1 (dynamic degree by flow, temporal flickering).
    """

    def __init__(self) -> None:
        self.num_clips = 0
        self._magnitude = 0.0
        self._num_dynamic = 0
        self._flicker = 0.0

    def update(self, clips: Tensor, forward: Tensor) -> None:
        """Count clips; arguments and errors are those of ``motion_statistics``."""
        self.count(motion_statistics(clips, forward))

    def count(self, rows: Tensor) -> None:
        """Count clips by their own numbers.

        Args:
            rows: ``(b, 3)`` of ``motion_statistics``.
        """
        for magnitude, dynamic, flicker in rows.tolist():
            self.num_clips += 1
            self._magnitude += magnitude
            self._num_dynamic += int(dynamic)
            self._flicker += flicker

    @property
    def magnitude(self) -> float:
        """Mean length of the flow, in pixels per frame."""
        return self._magnitude / _needed(self.num_clips)

    @property
    def dynamic_degree(self) -> float:
        """Share of clips that move."""
        return self._num_dynamic / _needed(self.num_clips)

    @property
    def flicker(self) -> float:
        """Mean absolute difference of consecutive frames, 0 to 1."""
        return self._flicker / _needed(self.num_clips)

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: plain numbers."""
        return {
            "num_clips": self.num_clips,
            "magnitude": self._magnitude,
            "num_dynamic": self._num_dynamic,
            "flicker": self._flicker,
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has counted."""
        self.num_clips += state["num_clips"]
        self._magnitude += state["magnitude"]
        self._num_dynamic += state["num_dynamic"]
        self._flicker += state["flicker"]


def _needed(count: int) -> int:
    if count == 0:
        raise ValueError("nothing was counted yet: update or merge first")
    return count


def _check(clips: Tensor, *flows: Tensor) -> None:
    if clips.dim() != 5 or clips.shape[1] < 2:
        raise ValueError(f"motion needs clips (b, t, h, w, c) of 2 frames or more, got {tuple(clips.shape)}")
    b, t, h, w = clips.shape[:4]
    for flow in flows:
        if flow.shape != (b, t - 1, h, w, 2):
            raise ValueError(f"flow: got {tuple(flow.shape)}, needed {(b, t - 1, h, w, 2)} for these clips")
        bad = [i for i, one in enumerate(flow) if not math.isfinite(float(one.abs().sum()))]
        if bad:
            raise ValueError(f"flow: NaN or infinity in clips {', '.join(map(str, bad))} of this batch")
