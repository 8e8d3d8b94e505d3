"""Several data sets as one source, and how each is opened: tars, or a latent cache."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ltd.config import ConfigError, digest
from ltd.data.batch import Batch, Sample
from ltd.data.cached import CacheSource
from ltd.data.config import DataConfig
from ltd.data.decode import Backend
from ltd.data.entries import Entries
from ltd.data.index import Index, find_shards
from ltd.data.labels import read_classes
from ltd.data.latents import LatentCache, is_cache
from ltd.data.media import MediaSource
from ltd.data.plan import Placement, ViewConfig
from ltd.data.sources import Items, Source
from ltd.data.store import Store, is_remote


class MixedSource:
    """Several sources of one kind, one after the other.

    Args:
        sources: Media sources, or caches.

    Raises:
        ConfigError: If they are of both kinds.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        if len({source.random_cuts for source in sources}) > 1:
            raise ConfigError("data.datasets: got media and latent caches together, needed one kind")
        self.sources = tuple(sources)
        self.random_cuts = sources[0].random_cuts
        self.bad = [record for source in sources for record in source.bad]
        self.entries = Entries.concatenate([source.entries for source in sources])
        ends = np.cumsum([len(source.entries) for source in sources]).tolist()
        self.starts = [0, *ends[:-1]]

    def locate(self, entry: int) -> tuple[Source, int]:
        """Find the source of a sample, and its number there."""
        number = bisect.bisect_right(self.starts, entry) - 1
        return self.sources[number], entry - self.starts[number]

    @property
    def digest(self) -> str:
        """Hash of the sources' hashes."""
        return digest([source.digest for source in self.sources])

    def fits(self, view: ViewConfig) -> tuple[np.ndarray, Counter[str]]:
        """Tell which samples can serve a view, and count the reasons why others cannot."""
        masks, reasons = zip(*(source.fits(view) for source in self.sources), strict=True)
        return np.concatenate(masks), sum(reasons, Counter[str]())

    def _split(self, items: Items) -> list[tuple[Source, np.ndarray, Items]]:
        """Sort items by source: the source, their places, and the items with ids of its own."""
        if len(self.sources) == 1:
            return [(self.sources[0], np.arange(len(items)), items)]
        numbers = np.searchsorted(self.starts, items.entries, side="right") - 1
        parts = []
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            own = items.pick(places.tolist())
            parts.append((self.sources[number], places, replace(own, entries=own.entries - self.starts[number])))
        return parts

    def load(self, entry: int, view: ViewConfig, placement: Placement, caption: float) -> Sample:
        """Load one sample from its source."""
        source, own = self.locate(entry)
        return source.load(own, view, placement, caption)

    def load_batch(self, items: Items, view: ViewConfig) -> Batch:
        """Load windows of one size from their caches and put them in the order asked for."""
        parts = self._split(items)
        batches = [source.load_batch(own, view) for source, _, own in parts]
        if len(batches) == 1:
            return batches[0]
        places = np.concatenate([places for _, places, _ in parts])
        return Batch.join(batches).select(np.argsort(places).tolist())

    def num_bytes(self, items: Items, view: ViewConfig) -> int:
        """Tell the bytes that samples take."""
        return sum(source.num_bytes(own, view) for source, _, own in self._split(items))

    def blank(self, entry: int, view: ViewConfig) -> Sample:
        """Make the sample of zeros that stands in for a failed one."""
        source, own = self.locate(entry)
        return source.blank(own, view)

    def shard_of(self, entry: int) -> str:
        """Name the file or directory a sample lies in."""
        source, own = self.locate(entry)
        return source.shard_of(own)


def open_source(
    shards: str | Sequence[str] | None,
    *,
    caption_required: bool,
    backend: Backend | None = None,
    store: Store | None = None,
    features: bool = False,
    classes: Sequence[str] | None = None,
) -> Source:
    """Open what ``data.shards`` points at: tars, or one latent cache.

    Args:
        shards: Paths, URLs, directories, globs or brace patterns; or the directory of a latent cache.
        caption_required: Whether samples without a caption are left out.
        backend: Video decoder for tars; None takes the preferred one.
        store: Where tars lie; None makes one.
        features: Whether a cache's features of a vision network are read too.
        classes: Names of the classes by number; None takes what the samples say.

    Returns:
        The source.

    Raises:
        ConfigError: If it points at nothing usable.
    """
    if not shards:
        raise ConfigError("data.shards: got nothing; needed tars made by tools/make_shards.py, or a latent cache")
    paths = [shards] if isinstance(shards, str) else list(shards)
    if any(not is_remote(path) and is_cache(Path(path)) for path in paths):
        if len(paths) > 1:
            raise ConfigError(
                f"data.shards: got {len(paths)} paths, one of them a latent cache; needed one cache alone, "
                "or one entry of data.datasets for each"
            )
        cache = LatentCache(paths[0])
        return CacheSource(cache, caption_required=caption_required, features=features, classes=classes)
    store = store or Store()
    index = Index(find_shards(shards, store), store)
    return MediaSource(index, caption_required=caption_required, backend=backend, classes=classes)


def open_sources(config: DataConfig) -> MixedSource:
    """Open every data set of a data section.

    Args:
        config: The data section.

    Returns:
        The data sets, one after the other.

    Raises:
        ConfigError: If one of them holds nothing usable, or none is given.
    """
    if not config.sets:
        raise ConfigError(
            "data.shards: got nothing; needed tars made by tools/make_shards.py, or a latent cache "
            "(or several of them as data.datasets)"
        )
    store, classes = Store(config.store), read_classes(config.classes)
    sources = []
    for number, dataset in enumerate(config.sets):
        try:
            source = open_source(
                dataset.shards,
                caption_required=config.caption_required,
                backend=config.decoder,
                store=store,
                features=config.read_features,
                classes=classes,
            )
        except ConfigError as error:
            if not config.datasets:
                raise
            raise ConfigError(str(error).replace("data.shards", f"data.datasets[{number}].shards", 1)) from None
        sources.append(source)
    mixed = MixedSource(sources)
    if config.flip and not mixed.random_cuts:
        raise ConfigError("data.flip: true, but a latent cache holds its own mirrored copies; set flip when caching")
    return mixed
