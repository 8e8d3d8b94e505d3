"""A fixed pass over held-out data: every sample, the same cuts, in the same order, for any number of processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError, Batch, Sample, collate
from ltd.data.index import Entry
from ltd.data.loader import DataConfig
from ltd.data.plan import Placement, ViewConfig
from ltd.data.sources import Source, match_views, open_source
from ltd.data.windows import window_starts
from ltd.data.workers import Job, SampleTimeoutError, WorkerPool

logger = logging.getLogger(__name__)
_Cut = tuple[int, Entry, Placement]


def _cuts(source: Source, view: ViewConfig, ids: list[int], windows_per_clip: int) -> list[tuple[Entry, Placement]]:
    cuts = []
    for entry in (source.entries[i] for i in ids):
        if not source.random_cuts:
            cuts.append((entry, Placement(0, 1, (0.5, 0.5), False)))
            continue
        span = view.span(entry.fps)
        for start in window_starts(entry.frames, span, count=windows_per_clip):
            cuts.append((entry, Placement(start, view.frame_step(entry.fps), (0.5, 0.5), False)))
    return cuts


def _spread(items: list[tuple[Entry, Placement]], limit: int | None) -> list[tuple[Entry, Placement]]:
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _load(source: Source, pool: WorkerPool, entry: Entry, job: Job[Sample]) -> Sample | None:
    try:
        return pool.wait(job)
    except (SampleTimeoutError, BadSampleError, OSError, ValueError, RuntimeError) as error:
        logger.warning("held-out sample %r of %s is left out: %s", entry.key, source.shard_of(entry), error)
        return None


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
    source = open_source(config.shards, caption_required=config.caption_required, backend=config.decoder)
    pool = WorkerPool(max(1, config.num_workers), timeout_s=config.timeout_s)
    first_draw, fitting = 0, 0
    try:
        for view in config.views:
            ids = [i for i, entry in enumerate(source.entries) if source.misfit(entry, view) is None]
            cuts = _spread(_cuts(source, view, ids, windows_per_clip), max_samples)
            fitting += len(cuts)
            numbered = [(first_draw + i, entry, placement) for i, (entry, placement) in enumerate(cuts)]
            first_draw += len(cuts)
            for begin in range(0, len(numbered), batch_size * world_size):
                row = numbered[begin : begin + batch_size * world_size]
                yield _batch(source, pool, view, row, slice(global_rank * batch_size, (global_rank + 1) * batch_size))
    finally:
        pool.close()
    if not fitting:
        match_views(source, config.views, logger.info)  # raises with the counts
        raise ConfigError("data.views: no held-out sample fits any view")


def _batch(source: Source, pool: WorkerPool, view: ViewConfig, row: list[_Cut], mine: slice) -> Batch:
    own = row[mine]
    jobs = [(entry, pool.submit(partial(source.load, entry, view, placement))) for _, entry, placement in own]
    samples = [_load(source, pool, entry, job) for entry, job in jobs]
    padding = mine.stop - mine.start - len(own)
    return collate(
        samples + [None] * padding,
        blank=source.blank(row[0][1], view),
        keys=[entry.key for _, entry, _ in own] + [""] * padding,
        draws=[draw for draw, _, _ in own] + [row[0][0]] * padding,
        kind=view.kind,
    )
