"""Real clips that samples are held against: windows of one size, drawn once, the same for any number of processes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ltd.config import ConfigError, digest
from ltd.data.batch import BadSampleError, Batch
from ltd.data.config import DataConfig
from ltd.data.evaluation import dealt_batches
from ltd.data.fetch import Fetcher
from ltd.data.latents import RULES
from ltd.data.media import MediaSource
from ltd.data.mixture import open_sources
from ltd.data.plan import Placement, ViewConfig
from ltd.data.sources import Items
from ltd.data.windows import place_windows
from ltd.data.workers import WorkerPool
from ltd.rng import generator

#: Clips whose bytes are part of the hash, about.
_LOOKED = 16


class RealClips:
    """Windows drawn from media, as few of one clip as there are enough of; each is cut at the centre of the picture.

    Args:
        config: Data section whose ``shards`` or ``datasets`` hold media.
        view: Size of the windows.
        needed: Windows to draw; fewer where there are not as many (``len`` tells).
        seed: Seed of the draw.

    Raises:
        ConfigError: If the data are a latent cache, which holds no pixels.
    """

    def __init__(self, config: DataConfig, view: ViewConfig, *, needed: int, seed: int) -> None:
        self.view, self._config = view, config
        self._source = open_sources(config)
        if not self._source.random_cuts:
            raise ConfigError("is a latent cache, which holds no pixels; give the tars that it was made from")
        ids = np.flatnonzero(self._source.fits(view)[0])
        per_clip, samples, starts = 1, *place_windows(self._source.entries, view, ids, count=1)
        while len(samples) < needed:
            before, per_clip = len(samples), 2 * per_clip
            samples, starts = place_windows(self._source.entries, view, ids, count=per_clip)
            if len(samples) == before:
                break
        chosen = torch.randperm(len(samples), generator=generator(seed, "real clips", str(view)))[:needed].numpy()
        self._samples, self._starts = samples[chosen], starts[chosen]

    def __len__(self) -> int:
        return len(self._samples)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the data and of what is cut out of them; the same wherever the data lie.

        Keys and sizes in bytes of all windows' clips, and the bytes of a few: equal keys alone say little.
        """
        entries = self._source.entries
        backends = [source.backend for source in self._source.sources if isinstance(source, MediaSource)]
        columns = (entries.keys.pick(self._samples), self._samples.tolist(), self._starts.tolist())
        cuts = [list(cut) for cut in zip(*columns, entries.columns["size"][self._samples].tolist(), strict=True)]
        looked = range(0, len(self), max(1, len(self) // _LOOKED))
        contents = [self._content(int(self._samples[number])) for number in looked]
        return digest([self._source.digest, str(self.view), str(self.view.fps), RULES, backends, cuts, contents])

    def _content(self, sample: int) -> str:
        source, entry = self._source.locate(sample)
        assert isinstance(source, MediaSource)  # nothing else has random cuts
        row = source.entries[entry]
        try:
            return hashlib.sha256(source.index.read(row, row.media)).hexdigest()
        except BadSampleError as error:
            return error.cause

    def told(self, number: int, caption: float) -> tuple[str, int]:
        """Read what a denoiser is told of a window.

        Args:
            number: Of the window.
            caption: Chooses among its captions, in [0, 1).

        Returns:
            Caption, "" where there is none, and class number, -1 where there is none.

        Raises:
            BadSampleError: If the caption cannot be read.
        """
        source, entry = self._source.locate(int(self._samples[number]))
        assert isinstance(source, MediaSource)  # nothing else has random cuts
        return source.told(entry, caption)

    def batches(
        self, *, batch_size: int, global_rank: int, world_size: int, numbers: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Load a process's share.

        Args:
            batch_size: Windows per batch.
            global_rank: This process.
            world_size: Processes; all get the same number of batches.
            numbers: Windows to load, in this order; None loads all.

        Yields:
            Batches; ``draws`` are the numbers of the windows, those that cannot be read have weight 0.
        """
        columns, view = self._source.entries.columns, self.view
        places = [
            Placement(int(start), view.frame_step(float(columns["fps"][sample])), (0.5, 0.5), False)
            for sample, start in zip(self._samples, self._starts, strict=True)
        ]
        keys = self._source.entries.keys.pick(self._samples)
        items = Items(self._samples, keys, range(len(self)), None, places)
        items = items if numbers is None else items.pick(numbers)
        pool = WorkerPool(max(1, self._config.num_workers), timeout_s=self._config.timeout_s)
        try:
            yield from dealt_batches(
                Fetcher(self._source, pool),
                view,
                items,
                batch_size=batch_size,
                global_rank=global_rank,
                world_size=world_size,
            )
        finally:
            pool.close()
