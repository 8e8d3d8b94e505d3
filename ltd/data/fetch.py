"""Load samples in threads and make batches of them; a sample that fails keeps its slot at weight 0 and is recorded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ltd.data.batch import BadSample, BadSampleError, Batch, Sample, collate
from ltd.data.plan import ViewConfig
from ltd.data.sources import Items, Source
from ltd.data.workers import Job, SampleTimeoutError, WorkerPool


@dataclass
class Group:
    """Samples of one size on their way."""

    view: ViewConfig  #: What they are cut to.
    items: Items  #: The samples.
    jobs: list[Job[Sample]]  #: One per sample, of a source with random cuts.
    whole: Job[Batch] | None  #: One for all, of a cache; not queued where no threads load ahead.


class Fetcher:
    """Load groups of samples of one source.

    Args:
        source: Where samples come from.
        pool: Threads that load.
        ahead: Whether they load before ``collect``; windows of a cache are else read there, on the consumer's core.
    """

    def __init__(self, source: Source, pool: WorkerPool, *, ahead: bool = True) -> None:
        self.source, self.pool, self.ahead = source, pool, ahead

    def submit(self, items: Items, view: ViewConfig) -> Group:
        """Start loading.

        Args:
            items: Samples.
            view: What to cut them to.

        Returns:
            The group, for ``collect``.
        """
        source = self.source
        if source.random_cuts:
            captions = itertools.repeat(0.0) if items.captions is None else items.captions
            asked = zip(items.entries.tolist(), items.placements, captions, strict=False)
            jobs = [self.pool.submit(partial(source.load, e, view, place, float(c))) for e, place, c in asked]
            return Group(view, items, jobs, None)
        work = partial(source.load_batch, items, view)
        return Group(view, items, [], self.pool.submit(work) if self.ahead else Job(work))

    def num_bytes(self, group: Group) -> int:
        """Count the bytes that a group takes while it waits."""
        return self.source.num_bytes(group.items, group.view)

    def collect(self, group: Group) -> tuple[Batch, list[BadSample]]:
        """Wait for a group.

        Args:
            group: The group.

        Returns:
            The batch, and a record of each sample that failed.
        """
        if group.whole is not None:
            loaded = self._wait(group.whole)
            if isinstance(loaded, Batch):
                return loaded, []
            return self._collate(group, [None] * len(group.items)), [
                self._bad(group.items, place, loaded) for place in range(len(group.items))
            ]
        bad: list[BadSample] = []
        samples: list[Sample | None] = []
        for place, job in enumerate(group.jobs):
            found = self._wait(job)
            samples.append(found if isinstance(found, Sample) else None)
            if not isinstance(found, Sample):
                bad.append(self._bad(group.items, place, found))
        return self._collate(group, samples), bad

    def _wait(self, job: Job[Any]) -> Sample | Batch | tuple[str, str]:
        """Return what was loaded, or cause and message."""
        try:
            if not self.ahead and not job.done and job.started_s is None and not self.source.random_cuts:
                job.run()
            return self.pool.wait(job)
        except SampleTimeoutError as error:
            return "timeout", str(error)
        except BadSampleError as error:
            return error.cause, str(error)
        except OSError as error:
            return "unreadable", str(error)
        except Exception as error:  # no sample, whatever a decoder makes of it, may stop training
            return "undecodable", f"{type(error).__name__}: {error}"

    def _bad(self, items: Items, place: int, problem: Sample | Batch | tuple[str, str]) -> BadSample:
        assert isinstance(problem, tuple)
        shard = self.source.shard_of(int(items.entries[place]))
        return BadSample(
            key=items.keys[place], shard=shard, cause=problem[0], message=problem[1], draw=items.draws[place]
        )

    def _collate(self, group: Group, samples: Sequence[Sample | None]) -> Batch:
        return collate(
            samples,
            blank=self.source.blank(int(group.items.entries[0]), group.view),
            keys=group.items.keys,
            draws=group.items.draws,
            kind=group.view.kind,
            entries=group.items.entries.tolist(),
        )
