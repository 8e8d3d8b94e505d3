"""A fixed list of cuts of a data set: what a latent cache holds and what evaluation sees. Knows no randomness.

The rules by which cuts are placed are named in ``ltd.data.latents.RULES``; caches made by other rules are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from ltd.data.batching import frame_steps
from ltd.data.decode import Backend
from ltd.data.entries import KINDS, Entries, Entry
from ltd.data.index import Index
from ltd.data.media import decode_cut, geometry_of
from ltd.data.plan import Placement, ViewConfig


@dataclass(frozen=True)
class Window:
    """One cut of one sample, at the centre of the picture."""

    position: int  #: Place in the whole list.
    key: str  #: Unique in the list: the sample's key with start, size and flip.
    entry: Entry  #: The sample.
    view: ViewConfig  #: What it is cut to.
    placement: Placement  #: Where it is cut.

    @property
    def fps(self) -> float:
        """Frames per second of the cut; 0 for images and where unknown."""
        return self.entry.fps / self.placement.step

    @property
    def geometry(self) -> tuple[float, float, float, float]:
        """Size of the source, and what the cut leaves out above and left of it."""
        return geometry_of(self.entry, self.view, self.placement)


class Windows(Sequence[Window]):
    """A list of cuts as columns: millions of them in memory without one Python object each.

    Args:
        entries: The samples.
        views: What they are cut to.
        places: int64 ``(n, 4)``: sample, view, first frame, and 1 where mirrored.
        positions: int64 ``(n,)``, place of each in the whole list; None numbers them.
    """

    def __init__(
        self,
        entries: Entries,
        views: Sequence[ViewConfig],
        places: np.ndarray,
        positions: np.ndarray | None = None,
    ) -> None:
        self.entries, self.views, self.places = entries, tuple(views), places
        self.positions = np.arange(len(places), dtype=np.int64) if positions is None else positions

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Window: ...
    @overload
    def __getitem__(self, place: slice) -> Windows: ...
    def __getitem__(self, place: int | slice) -> Window | Windows:
        if isinstance(place, slice):
            return Windows(self.entries, self.views, self.places[place], self.positions[place])
        number, view_number, start, mirrored = self.places[place].tolist()
        entry, view = self.entries[number], self.views[view_number]
        placement = Placement(start, view.frame_step(entry.fps), (0.5, 0.5), bool(mirrored))
        key = f"{entry.key}@{start}:{view}" + (":flip" if mirrored else "")
        return Window(int(self.positions[place]), key, entry, view, placement)

    def take(self, places: np.ndarray) -> Windows:
        """Pick windows by place, or by a mask; they keep their positions."""
        return Windows(self.entries, self.views, self.places[places], self.positions[places])

    def by_view(self) -> Iterator[Windows]:
        """Yield the windows of each view that has some."""
        for number in range(len(self.views)):
            mask = self.places[:, 1] == number
            if mask.any():
                yield self.take(mask)


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
    samples: Sequence[np.ndarray] | None = None,
    windows_per_clip: int | None = None,
    window_step: int | None = None,
    flip: bool = False,
) -> Windows:
    """List the cuts of every sample for every view that it fits.

    Args:
        index: The tars.
        views: What to cut samples to.
        samples: int64 ``(n,)`` for each view, the samples cut to it; None takes all.
        windows_per_clip: At most this many windows of one clip; None takes all that ``window_step`` gives.
        window_step: Source frames between windows; None cuts windows that do not overlap.
        flip: Whether a mirrored copy of each follows it.

    Returns:
        The windows: view by view, in index order, by start.
    """
    parts = []
    for number, view in enumerate(views):
        given = None if samples is None else samples[number]
        cut, starts = place_windows(index.entries, view, given, count=windows_per_clip, step=window_step)
        part = np.stack([cut, np.full_like(cut, number), starts, np.zeros_like(cut)], axis=1)
        if flip:
            part = np.repeat(part, 2, axis=0)
            part[1::2, 3] = 1
        parts.append(part)
    return Windows(index.entries, views, np.concatenate(parts) if parts else np.zeros((0, 4), dtype=np.int64))


def place_windows(
    entries: Entries, view: ViewConfig, given: np.ndarray | None, *, count: int | None, step: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Say where the windows of one view lie.

    Args:
        entries: The samples.
        view: What to cut samples to.
        given: int64 ``(m,)``, the samples to cut; None takes all of its kind.
        count: As ``windows_per_clip`` of ``enumerate_windows``.
        step: As ``window_step`` of ``enumerate_windows``.

    Returns:
        Sample and first frame of each window, both int64 ``(n,)``.
    """
    columns = entries.columns
    samples = np.arange(len(entries)) if given is None else given
    samples = samples[columns["kind"][samples] == KINDS.index(view.kind)]  # type: ignore[arg-type]
    spans = (view.num_frames - 1) * frame_steps(columns["fps"][samples], view.fps) + 1
    lengths = np.stack([columns["frames"][samples].astype(np.int64), spans], axis=1)
    distinct, inverse = np.unique(lengths, axis=0, return_inverse=True)
    lists = [window_starts(frames, span, count=count, step=step) for frames, span in distinct.tolist()]
    inverse = inverse.reshape(-1)
    counts = np.array([len(starts) for starts in lists], dtype=np.int64)
    begins = (np.cumsum(counts) - counts)[inverse]
    counts = counts[inverse]
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    flat = np.array([start for starts in lists for start in starts], dtype=np.int64)
    return np.repeat(samples, counts).astype(np.int64), flat[np.repeat(begins, counts) + inside]


def load_window(
    index: Index, window: Window, *, backend: Backend | None = None
) -> tuple[np.ndarray, tuple[tuple[str, float], ...]]:
    """Read the frames and the captions of a window.

    Args:
        index: The tars that the window was listed from.
        window: The window.
        backend: Video decoder; None takes the preferred one.

    Returns:
        uint8 ``(t, h, w, 3)``, RGB; the weighted captions, () for none.
    """
    data, captions = index.load(window.entry)
    return decode_cut(data, window.entry, window.view, window.placement, backend=backend), captions
