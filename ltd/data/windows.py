"""A fixed list of cuts of a data set: what a latent cache holds and what evaluation sees. Knows no randomness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ltd.data.decode import Backend
from ltd.data.index import Entry, Index
from ltd.data.plan import Placement, ViewConfig
from ltd.data.sources import read_frames


@dataclass(frozen=True)
class Window:
    """One cut of one sample, at the centre of the picture."""

    position: int  #: Place in the list.
    key: str  #: Unique in the list: the sample's key with start, size and flip.
    entry: Entry  #: The sample.
    view: ViewConfig  #: What it is cut to.
    placement: Placement  #: Where it is cut.

    @property
    def fps(self) -> float:
        """Frames per second of the cut; 0 for images and where unknown."""
        return self.entry.fps / self.placement.step


def window_starts(frames: int, span: int, *, count: int | None = None, step: int | None = None) -> list[int]:
    """Spread windows over a clip.

    Args:
        frames: Frames of the clip.
        span: Frames that a window reaches over.
        count: At most this many windows, evenly spread; 1 is the centre. None takes all that ``step`` gives.
        step: Frames between starts; None takes ``span``, windows that do not overlap.

    Returns:
        First frames, ascending; empty if the clip is shorter than a window.
    """
    slack = frames - span
    if slack < 0:
        return []
    step = step or span
    fitting = slack // step + 1
    if count is not None and count < fitting:
        return [round((i + 0.5) * slack / count) for i in range(count)]
    first = (slack - (fitting - 1) * step) // 2
    return [first + i * step for i in range(fitting)]


def enumerate_windows(
    index: Index,
    views: Sequence[ViewConfig],
    *,
    windows_per_clip: int | None = None,
    window_step: int | None = None,
    flip: bool = False,
) -> tuple[Window, ...]:
    """List the cuts of every sample for every view that it fits.

    Args:
        index: The tars.
        views: What to cut samples to.
        windows_per_clip: At most this many windows of one clip; None takes all that ``window_step`` gives.
        window_step: Source frames between windows; None cuts windows that do not overlap.
        flip: Whether a mirrored copy of each follows it.

    Returns:
        The windows: view by view, in index order, by start.
    """
    windows: list[Window] = []
    for view in views:
        for entry in index.entries:
            if entry.kind != view.kind:
                continue
            span = view.span(entry.fps)
            for start in window_starts(entry.frames, span, count=windows_per_clip, step=window_step):
                for mirrored in (False, True) if flip else (False,):
                    placement = Placement(start, view.frame_step(entry.fps), (0.5, 0.5), mirrored)
                    key = f"{entry.key}@{start}:{view}" + (":flip" if mirrored else "")
                    windows.append(Window(len(windows), key, entry, view, placement))
    return tuple(windows)


def read_window(index: Index, window: Window, *, backend: Backend | None = None) -> np.ndarray:
    """Read the frames of a window.

    Args:
        index: The tars that the window was listed from.
        window: The window.
        backend: Video decoder; None takes the preferred one.

    Returns:
        uint8 ``(t, h, w, 3)``, RGB.
    """
    return read_frames(index, window.entry, window.view, window.placement, backend=backend)
