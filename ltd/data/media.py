"""Media in indexed tars as a source of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ltd.data.batch import Batch, Sample
from ltd.data.batching import frame_steps
from ltd.data.decode import Backend, choose_backend, decode_clip, decode_image
from ltd.data.entries import KINDS, Entry
from ltd.data.index import Index
from ltd.data.labels import numbers_of
from ltd.data.plan import Placement, ViewConfig
from ltd.data.sources import Items, choose_caption, choose_column, require_captions
from ltd.data.transforms import cut_geometry


class MediaSource:
    """Media in indexed tars.

    Args:
        index: The tars.
        caption_required: Whether samples without a caption are left out; none with one is a ``ConfigError``.
        backend: Video decoder; None takes the preferred one that is installed.
        classes: Names of the classes by number; None takes what the samples say.
    """

    random_cuts = True

    def __init__(
        self,
        index: Index,
        *,
        caption_required: bool,
        backend: Backend | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.index = index
        self.backend = choose_backend(backend) if (index.entries.columns["kind"] == 1).any() else None
        self.bad = list(index.bad)
        self.entries = index.entries
        if caption_required:
            self.entries = require_captions(self.entries, self.bad, index.shards)
        self._labels = numbers_of(self.entries, classes)

    @property
    def digest(self) -> str:
        """Hash of the samples' keys and sizes."""
        return self.entries.digest

    def fits(self, view: ViewConfig) -> tuple[np.ndarray, Counter[str]]:
        """Tell which samples can serve a view.

        Args:
            view: The view.

        Returns:
            Bool ``(n,)``; the reasons why others cannot, counted.
        """
        columns = self.entries.columns
        of_kind = columns["kind"] == KINDS.index(view.kind)  # type: ignore[arg-type]
        spans = (view.num_frames - 1) * frame_steps(columns["fps"], view.fps) + 1
        long_enough = columns["frames"] >= spans
        reasons = Counter({f"is no {view.kind}": int((~of_kind).sum())})
        short = of_kind & ~long_enough
        for span, count in zip(*np.unique(spans[short], return_counts=True), strict=True):
            reasons[f"shorter than {span} frames"] = int(count)
        return of_kind & long_enough, +reasons

    def load(self, entry: int, view: ViewConfig, placement: Placement, caption: float) -> Sample:
        """Decode one sample.

        Args:
            entry: The sample.
            view: What to cut it to.
            placement: Where to cut it.
            caption: Chooses among its captions, in [0, 1).

        Returns:
            The sample, with ``pixels``.
        """
        row = self.entries[entry]
        data, captions = self.index.load(row)
        frames = decode_cut(data, row, view, placement, backend=self.backend)
        return Sample(
            caption=choose_caption(captions, caption),
            caption_column=choose_column(captions, caption),
            fps=row.fps / placement.step,
            label=int(self._labels[entry]),
            geometry=geometry_of(row, view, placement),
            pixels=frames,
        )

    def told(self, entry: int, caption: float) -> tuple[str, int]:
        """Read what a denoiser is told of a sample, without its medium.

        Args:
            entry: The sample.
            caption: Chooses among its captions, in [0, 1).

        Returns:
            Caption, "" where there is none, and class number, -1 where there is none.
        """
        return choose_caption(self.index.captions(self.entries[entry]), caption), int(self._labels[entry])

    def load_batch(self, items: Items, view: ViewConfig) -> Batch:
        """Refuse: media are loaded one by one."""
        raise TypeError("media are loaded one by one")

    def num_bytes(self, items: Items, view: ViewConfig) -> int:
        """Count the bytes of the media and of their frames.

        Args:
            items: The samples.
            view: What they are cut to.

        Returns:
            Bytes.
        """
        return int(self.entries.columns["size"][items.entries, 0].sum()) + len(items) * view.shape.num_cells * 3

    def blank(self, entry: int, view: ViewConfig) -> Sample:
        """Make black frames of the view's size.

        Args:
            entry: Not looked at: media of every sample are cut to the view.
            view: The view.

        Returns:
            The sample.
        """
        return Sample(pixels=np.zeros((view.num_frames, view.height, view.width, 3), dtype=np.uint8))

    def shard_of(self, entry: int) -> str:
        """Name the tar of a sample."""
        return self.index.shards[int(self.entries.columns["shard"][entry])]


def geometry_of(entry: Entry, view: ViewConfig, placement: Placement) -> tuple[float, float, float, float]:
    """Say which part of its source a cut shows, as ``cut_geometry``."""
    source = (entry.height, entry.width)
    return cut_geometry(source, view.height, view.width, placement.crop, flip=placement.flip)


def decode_cut(
    data: bytes, entry: Entry, view: ViewConfig, placement: Placement, *, backend: Backend | None = None
) -> np.ndarray:
    """Decode one cut of a sample.

    Args:
        data: Bytes of its medium.
        entry: The sample.
        view: What to cut it to.
        placement: Where to cut it.
        backend: Video decoder; None takes the preferred one.

    Returns:
        uint8 ``(t, h, w, 3)``, RGB. Media that cannot be used give ``BadSampleError``.
    """
    size = {"height": view.height, "width": view.width, "crop": placement.crop}
    if entry.kind == "image":
        frames = decode_image(data, **size)  # type: ignore[arg-type]
    else:
        frames = decode_clip(
            data,
            start=placement.start,
            num_frames=view.num_frames,
            stride=placement.step,
            backend=backend,
            **size,  # type: ignore[arg-type]
        )
    return np.ascontiguousarray(frames[:, :, ::-1] if placement.flip else frames)
