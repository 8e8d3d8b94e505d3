"""A fixed pass over held-out data: every sample, the same cuts, in the same order, for any number of processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from ltd.data.arrange import arrange
from ltd.data.batch import Batch, collate
from ltd.data.config import DataConfig
from ltd.data.fetch import Fetcher
from ltd.data.mixture import open_sources
from ltd.data.plan import Placement, ViewConfig
from ltd.data.sources import Items, Source
from ltd.data.windows import window_starts
from ltd.data.workers import WorkerPool

logger = logging.getLogger(__name__)
T = TypeVar("T")


def _cuts(source: Source, view: ViewConfig, ids: list[int], windows_per_clip: int) -> list[tuple[int, Placement]]:
    cuts = []
    for entry in ids:
        if not source.random_cuts:
            cuts.append((entry, Placement(0, 1, (0.5, 0.5), False)))
            continue
        fps = float(source.entries.columns["fps"][entry])
        frames = int(source.entries.columns["frames"][entry])
        for start in window_starts(frames, view.span(fps), count=windows_per_clip):
            cuts.append((entry, Placement(start, view.frame_step(fps), (0.5, 0.5), False)))
    return cuts


def _spread(items: list[T], limit: int | None) -> list[T]:
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def evaluation_batches(
    config: DataConfig,
    *,
    batch_size: int,
    global_rank: int = 0,
    world_size: int = 1,
    windows_per_clip: int = 1,
    max_samples: int | None = None,
) -> Iterator[Batch]:
    """Pass once over every sample, cut at the centre, view by view.

    Args:
        config: Data section whose ``shards`` hold the held-out data, tars or cache; views without a sample are passed
            over.
        batch_size: Samples per batch and process.
        global_rank: This process.
        world_size: Processes; all get the same number of batches of the same shapes, filled up with weight 0.
        windows_per_clip: Windows per clip, evenly spread; 1 is the centre. A cache's windows are taken as they are.
        max_samples: At most this many cuts per view, evenly spread; None takes all.

    Yields:
        Batches; ``draws`` number the cuts of the whole pass, so that random numbers keyed by them do not depend on
        the number of processes.

    Raises:
        ConfigError: If no view fits any sample.
    """
    source = open_sources(config)
    arrangement = arrange(config, source, fill=False)
    pool = WorkerPool(max(1, config.num_workers), timeout_s=config.timeout_s)
    fetcher = Fetcher(source, pool)
    first_draw = 0
    try:
        for view, ids in zip(arrangement.views, arrangement.ids, strict=True):
            chosen = _spread(ids.tolist(), max_samples)  # first, so that no list is as long as the data
            cuts = _spread(_cuts(source, view, chosen, windows_per_clip), max_samples)
            entries = np.array([entry for entry, _ in cuts], dtype=np.int64)
            draws = range(first_draw, first_draw + len(cuts))
            items = Items(entries, source.entries.keys.pick(entries), draws, None, [place for _, place in cuts])
            first_draw += len(cuts)
            yield from dealt_batches(
                fetcher, view, items, batch_size=batch_size, global_rank=global_rank, world_size=world_size
            )
    finally:
        pool.close()


def dealt_batches(
    fetcher: Fetcher, view: ViewConfig, items: Items, *, batch_size: int, global_rank: int, world_size: int
) -> Iterator[Batch]:
    """Load a process's batches of samples of one size: the same batches for any number of processes.

    Args:
        fetcher: Loads them.
        view: What they are cut to.
        items: All samples.
        batch_size: Samples per batch.
        global_rank: This process.
        world_size: Processes; all get the same number of batches, filled up with weight 0.

    Yields:
        Batches.
    """
    stride = batch_size * world_size
    mine = range(global_rank * batch_size, (global_rank + 1) * batch_size)
    for begin in range(0, len(items), stride):
        yield _batch(fetcher, view, items.pick(range(begin, min(begin + stride, len(items)))), mine)


def _batch(fetcher: Fetcher, view: ViewConfig, row: Items, mine: range) -> Batch:
    """Load one process's part of a row; what the last row lacks is filled up with weight 0."""
    own = row.pick([place for place in mine if place < len(row)])
    padding = len(mine) - len(own)
    blank = (
        collate(
            [None] * padding,
            blank=fetcher.source.blank(int(row.entries[0]), view),
            keys=[""] * padding,
            draws=[row.draws[0]] * padding,
            kind=view.kind,
        )
        if padding
        else None
    )
    if not len(own):
        assert blank is not None
        return blank
    batch, bad = fetcher.collect(fetcher.submit(own, view))
    for record in bad:
        logger.warning("evaluation sample %r of %s is left out: %s", record.key, record.shard, record.message)
    return Batch.join([batch, blank]) if blank is not None else batch
