"""Where samples come from: media in tars, or windows in a latent cache, behind one interface.

A source knows its samples and how to load one; it knows nothing of steps, ranks or order.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ltd.config import ConfigError
from ltd.data.batch import BadSample, Sample
from ltd.data.decode import Backend, choose_backend, decode_clip, decode_image
from ltd.data.index import Entry, Index, find_shards
from ltd.data.latents import LatentCache, is_cache
from ltd.data.plan import Placement, ViewConfig
from ltd.data.transforms import cover

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Samples that can be planned and loaded."""

    entries: list[Entry]  #: The samples, in a fixed order.
    bad: list[BadSample]  #: Samples that are left out of every view, with the cause.
    random_cuts: bool  #: Whether window, crop and flip are chosen per draw (False: they are baked in).

    @property
    def digest(self) -> str:
        """Hash of what the samples are, independent of their place."""

    def misfit(self, entry: Entry, view: ViewConfig) -> str | None:
        """Say why a sample cannot serve a view, None where it can."""

    def load(self, entry: Entry, view: ViewConfig, placement: Placement) -> Sample:
        """Load one sample; raises on any damage."""

    def blank(self, entry: Entry, view: ViewConfig) -> Sample:
        """Make the sample of zeros that stands in for a failed one."""

    def shard_of(self, entry: Entry) -> str:
        """Name the file or directory a sample lies in."""


class MediaSource:
    """Media in indexed tars.

    Args:
        index: The tars.
        caption_required: Whether samples without a caption are left out.
        backend: Video decoder; None takes the preferred one that is installed.

    Raises:
        ConfigError: If captions are required and no sample has one.
    """

    random_cuts = True

    def __init__(self, index: Index, *, caption_required: bool, backend: Backend | None = None) -> None:
        self.index = index
        self.backend = choose_backend(backend) if any(e.kind == "video" for e in index.entries) else None
        self.bad = list(index.bad)
        self.entries: list[Entry] = []
        for entry in index.entries:
            if caption_required and not entry.caption_chars:
                message = "no caption (data.caption_required is true)"
                shard = index.shards[entry.shard]
                self.bad.append(BadSample(key=entry.key, shard=shard, cause="no_caption", message=message))
            else:
                self.entries.append(entry)
        if not self.entries:
            raise ConfigError(
                f"data.caption_required: true, but none of the {len(index.entries)} samples of data.shards has a "
                "caption; add .txt members or set data.caption_required=false"
            )

    @property
    def digest(self) -> str:
        """Hash of the samples' keys and sizes."""
        return self.index.digest

    def misfit(self, entry: Entry, view: ViewConfig) -> str | None:
        """Say why a sample cannot serve a view.

        Args:
            entry: The sample.
            view: The view.

        Returns:
            The cause, None where it fits.
        """
        if entry.kind != view.kind:
            return f"is no {view.kind}"
        span = view.span(entry.fps)
        if entry.frames < span:
            return f"shorter than {span} frames"
        return None

    def load(self, entry: Entry, view: ViewConfig, placement: Placement) -> Sample:
        """Decode one sample.

        Args:
            entry: The sample.
            view: What to cut it to.
            placement: Where to cut it.

        Returns:
            The sample, with ``pixels``.
        """
        caption = self.index.caption(entry)
        frames = read_frames(self.index, entry, view, placement, backend=self.backend)
        return Sample(caption=caption, fps=entry.fps / placement.step, pixels=frames)

    def blank(self, entry: Entry, view: ViewConfig) -> Sample:
        """Make black frames of the view's size.

        Args:
            entry: Not looked at: media of every sample are cut to the view.
            view: The view.

        Returns:
            The sample.
        """
        return Sample(pixels=np.zeros((view.num_frames, view.height, view.width, 3), dtype=np.uint8))

    def shard_of(self, entry: Entry) -> str:
        """Name the tar of a sample."""
        return self.index.shards[entry.shard]


def read_frames(
    index: Index, entry: Entry, view: ViewConfig, placement: Placement, *, backend: Backend | None = None
) -> np.ndarray:
    """Read the frames of one cut from its tar.

    Args:
        index: The tars.
        entry: The sample.
        view: What to cut it to.
        placement: Where to cut it.
        backend: Video decoder; None takes the preferred one.

    Returns:
        uint8 ``(t, h, w, 3)``, RGB. Media that cannot be used give ``BadSampleError``.
    """
    data = index.read(entry, entry.media)
    if entry.kind == "image":
        frames = decode_image(data)
    else:
        frames = decode_clip(
            data, start=placement.start, num_frames=view.num_frames, stride=placement.step, backend=backend
        )
    return cover(frames, view.height, view.width, crop=placement.crop, flip=placement.flip)


class CacheSource:
    """Windows in a latent cache.

    Args:
        cache: The opened cache.
        caption_required: Whether windows without a caption are left out.

    Raises:
        ConfigError: If captions are required and no window has one.
    """

    random_cuts = False

    def __init__(self, cache: LatentCache, *, caption_required: bool) -> None:
        self.cache = cache
        self.bad: list[BadSample] = []
        self.entries: list[Entry] = []
        for entry in cache.entries:
            if caption_required and not entry.caption_chars:
                message = "no caption (data.caption_required is true)"
                self.bad.append(
                    BadSample(key=entry.key, shard=str(cache.directory), cause="no_caption", message=message)
                )
            else:
                self.entries.append(entry)
        if not self.entries:
            raise ConfigError(
                f"data.caption_required: true, but none of the {len(cache.entries)} cached windows has a caption; "
                "set data.caption_required=false"
            )

    @property
    def digest(self) -> str:
        """Hash of what was cached and how."""
        return str(self.cache.manifest["identity"])

    def misfit(self, entry: Entry, view: ViewConfig) -> str | None:
        """Say why a window cannot serve a view, by its size in pixels or in latent cells.

        Args:
            entry: The window.
            view: The view.

        Returns:
            The cause, None where it fits.
        """
        wanted = (view.num_frames, view.height, view.width)
        if wanted in ((entry.frames, entry.height, entry.width), self.cache.latent_shape(entry)):
            return None
        return f"cached at {entry.frames}x{entry.height}x{entry.width} pixels"

    def load(self, entry: Entry, view: ViewConfig, placement: Placement) -> Sample:
        """Read one window.

        Args:
            entry: The window.
            view: Not looked at: windows are cached at their size.
            placement: Not looked at: the cut is baked in.

        Returns:
            The sample, with ``mean``, ``logvar`` and, where cached, text.
        """
        return self.cache.read(entry)

    def blank(self, entry: Entry, view: ViewConfig) -> Sample:
        """Make zeros of the window's latent size.

        Args:
            entry: A window of the batch.
            view: Not looked at.

        Returns:
            The sample.
        """
        shape = (self.cache.channels, *self.cache.latent_shape(entry))
        text, mask = self.cache.blank_text()
        return Sample(mean=torch.zeros(shape), logvar=torch.zeros(shape), text=text, text_mask=mask)

    def shard_of(self, entry: Entry) -> str:
        """Name the cache directory."""
        return str(self.cache.directory)


def open_source(
    shards: str | Sequence[str] | None, *, caption_required: bool, backend: Backend | None = None
) -> Source:
    """Open what ``data.shards`` points at: tars, or one latent cache.

    Args:
        shards: Paths, directories, globs or brace patterns; or the directory of a latent cache.
        caption_required: Whether samples without a caption are left out.
        backend: Video decoder for tars; None takes the preferred one.

    Returns:
        The source.

    Raises:
        ConfigError: If it points at nothing usable.
    """
    if not shards:
        raise ConfigError("data.shards: got nothing; needed tars made by tools/make_shards.py, or a latent cache")
    paths = [shards] if isinstance(shards, str) else list(shards)
    if any(is_cache(Path(path)) for path in paths):
        if len(paths) > 1:
            raise ConfigError(
                f"data.shards: got {len(paths)} paths, one of them a latent cache; needed one cache alone"
            )
        return CacheSource(LatentCache(paths[0]), caption_required=caption_required)
    return MediaSource(Index(find_shards(shards)), caption_required=caption_required, backend=backend)


def match_views(source: Source, views: Sequence[ViewConfig], report: Callable[[str], None]) -> list[list[int]]:
    """Find the samples that fit each view.

    Args:
        source: The samples.
        views: The views.
        report: Called with one line of counts per view.

    Returns:
        Ids (positions in ``source.entries``) per view; a view that no sample fits is named in a warning and left empty.

    Raises:
        ConfigError: If no view has a sample; names the counts.
    """
    eligible: list[list[int]] = []
    empty: list[str] = []
    for number, view in enumerate(views):
        reasons: Counter[str] = Counter()
        ids: list[int] = []
        for position, entry in enumerate(source.entries):
            reason = source.misfit(entry, view)
            if reason is None:
                ids.append(position)
            else:
                reasons[reason] += 1
        left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(4)) or "none"
        eligible.append(ids)
        if ids:
            report(f"data.views[{number}] {view}: {len(ids)} of {len(source.entries)} samples (left out: {left_out})")
        else:
            empty.append(
                f"data.views[{number}]: got {view}, but none of the {len(source.entries)} samples fits "
                f"({left_out}); needed a view that the data can fill: change data.views or data.shards"
            )
    if len(empty) == len(views):
        raise ConfigError(empty[0])
    for text in empty:
        logger.warning("%s; it is left out", text)
    return eligible
