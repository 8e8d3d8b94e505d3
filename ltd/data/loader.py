"""Deal the planned global batches to one process and load them.

Knows two integers, ``global_rank`` and ``world_size``; which samples a step holds is decided in ``ltd.data.plan``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

from ltd.config import ConfigError, digest
from ltd.data.batch import BadSample, BadSampleError, Batch, Sample, StepInfo, collate
from ltd.data.plan import Placement, Plan, PlannedBatch, ViewConfig, chain_keys, random_placement
from ltd.data.sources import Source, match_views, open_source
from ltd.data.workers import Job, SampleTimeoutError, WorkerPool

logger = logging.getLogger(__name__)

#: Training stops when a process has read this many samples and every one of them was bad.
_ALL_BAD = 16


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples are and how they become batches."""

    shards: str | tuple[str, ...] | None = None  #: Tars: path, directory, glob or brace pattern; or a latent cache.
    global_batch: int = 8  #: Samples per optimizer step over all processes and accumulation, >= 1.
    views: tuple[ViewConfig, ...] = (ViewConfig(num_frames=1, height=256, width=256),)  #: What samples are cut to.
    caption_required: bool = True  #: Whether samples without a caption are left out.
    flip: bool = False  #: Whether half of the samples are mirrored (media only; a cache holds its own copies).
    decoder: Literal["decord", "pyav"] | None = None  #: Video decoder; null takes decord, or PyAV without decord.
    num_workers: int = 0  #: Threads that load ahead, >= 0; 0 loads each step when it is asked for.
    prefetch: int = 2  #: Steps that the threads load ahead, >= 1.
    prefetch_mb: int = 512  #: Pixels or latents loaded ahead take at most this many MiB, >= 1.
    timeout_s: float = 60.0  #: Seconds one sample may take to load, > 0; then it counts as bad.
    max_bad_fraction: float = 0.05  #: Share of bad samples among the last ``bad_window`` that stops training, [0, 1].
    bad_window: int = 1000  #: Samples of this process that ``max_bad_fraction`` looks back over, >= 1.

    def __post_init__(self) -> None:
        for name, low in (
            ("global_batch", 1),
            ("num_workers", 0),
            ("prefetch", 1),
            ("prefetch_mb", 1),
            ("bad_window", 1),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"data.{name}: got {getattr(self, name)}, needed an integer of {low} or more")
        if not self.timeout_s > 0:
            raise ConfigError(f"data.timeout_s: got {self.timeout_s}, needed more than 0 seconds")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction: got {self.max_bad_fraction}, needed a share in [0, 1]")
        if not self.views:
            raise ConfigError("data.views: got none, needed at least one view")


def micro_batch(global_batch: int, *, world_size: int, accumulation: int) -> int:
    """Divide the global batch.

    Args:
        global_batch: Samples per step.
        world_size: Processes.
        accumulation: Micro-batches per step and process.

    Returns:
        Samples per micro-batch.

    Raises:
        ConfigError: If it does not divide; gives the numbers and the nearest global batches.
    """
    parts = world_size * accumulation
    if global_batch % parts:
        lower = global_batch // parts * parts
        nearest = f"{lower} or {lower + parts}" if lower else f"{parts}"
        raise ConfigError(
            f"data.global_batch: got {global_batch}, needed a multiple of {parts} = {world_size} processes "
            f"(world size) x {accumulation} (parallel.accumulation); the nearest: {nearest}"
        )
    return global_batch // parts


def describe_bad(source: Source) -> None:
    """Log how many samples the index left out, by cause."""
    if source.bad:
        causes = ", ".join(f"{count} {cause}" for cause, count in Counter(b.cause for b in source.bad).most_common())
        logger.warning("data: %d samples are left out by the index: %s", len(source.bad), causes)


@dataclass
class _Pending:
    """One step on its way."""

    plan: PlannedBatch
    micro: list[list[tuple[int, Job[Sample]]]]  # per micro-batch: (position in the global batch, job)


class Loader:
    """Endless, resumable batches of one process; iterate for ``(list[Batch], StepInfo)`` per optimizer step.

    Args:
        config: The data section.
        source: Where samples come from.
        seed: Seed of the run.
        global_rank: This process.
        world_size: Processes.
        accumulation: Micro-batches per step.
        state: State of a ``StepInfo`` to go on after; None starts at step 0.

    Raises:
        ValueError: If ``global_rank`` is not in the world. A world that does not divide the batch, and data that cannot
            fill a view, give a ``ConfigError``.
    """

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        *,
        seed: int,
        global_rank: int,
        world_size: int,
        accumulation: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        if not 0 <= global_rank < world_size:
            raise ValueError(f"global_rank: got {global_rank}, needed 0 <= global_rank < world_size = {world_size}")
        self.config, self.source, self.seed = config, source, seed
        self._rank, self._world, self._accumulation = global_rank, world_size, accumulation
        self._micro = micro_batch(config.global_batch, world_size=world_size, accumulation=accumulation)
        report = logger.info if global_rank == 0 else logger.debug
        eligible = match_views(source, config.views, report)
        weights = [view.weight for view in config.views]
        self.plan = Plan(eligible, weights, global_batch=config.global_batch, seed=seed)
        if global_rank == 0:
            describe_bad(source)
        shapes = [[str(view), view.weight, len(ids)] for view, ids in zip(config.views, eligible, strict=True)]
        self._plan_id = digest(
            {"seed": seed, "data": source.digest, "views": shapes, "global_batch": config.global_batch}
        )
        self._step, self._keys_hash = 0, ""
        if state is not None:
            self._resume(state)
        self._recent: deque[bool] = deque(maxlen=config.bad_window)
        self._pool = WorkerPool(max(1, config.num_workers), timeout_s=config.timeout_s)
        self._queue: deque[_Pending] = deque()

    def _resume(self, state: dict[str, Any]) -> None:
        self._step, self._keys_hash = int(state["step"]), str(state["keys_hash"])
        if state.get("plan", self._plan_id) != self._plan_id:
            logger.warning(
                "data: samples, data.views, data.global_batch or seed differ from the checkpoint's; "
                "going on at step %d of the new order",
                self._step,
            )

    @property
    def state(self) -> dict[str, Any]:
        """Plain dict that continues after the last step handed out; equal on every process."""
        return {"step": self._step, "keys_hash": self._keys_hash, "plan": self._plan_id}

    def _placement(self, view: ViewConfig, entry_id: int, draw: int) -> Placement:
        entry = self.source.entries[entry_id]
        if not self.source.random_cuts:
            return Placement(0, 1, (0.5, 0.5), False)
        return random_placement(
            view, frames=entry.frames, fps=entry.fps, seed=self.seed, draw=draw, flip=self.config.flip
        )

    def _submit(self, step: int) -> _Pending:
        planned = self.plan.step(step)
        view = self.config.views[planned.view]
        micro = []
        for number in range(self._accumulation):
            first = (number * self._world + self._rank) * self._micro
            jobs = []
            for position in range(first, first + self._micro):
                entry_id = planned.entries[position]
                placement = self._placement(view, entry_id, planned.draws[position])
                work = partial(self.source.load, self.source.entries[entry_id], view, placement)
                jobs.append((position, self._pool.submit(work)))
            micro.append(jobs)
        return _Pending(planned, micro)

    def _depth(self) -> int:
        """Count the steps to keep in flight: bounded in steps and in bytes."""
        if self.config.num_workers == 0:
            return 1
        largest = max(view.shape.num_cells for view in self.config.views) * 3
        per_step = largest * self._micro * self._accumulation
        return 1 + max(1, min(self.config.prefetch, self.config.prefetch_mb * 2**20 // per_step))

    def _take(self, planned: PlannedBatch, position: int, job: Job[Sample], bad: list[BadSample]) -> Sample | None:
        entry = self.source.entries[planned.entries[position]]
        try:
            sample = self._pool.wait(job)
        except SampleTimeoutError as error:
            cause, message = "timeout", str(error)
        except BadSampleError as error:
            cause, message = error.cause, str(error)
        except OSError as error:
            cause, message = "unreadable", str(error)
        except Exception as error:  # no sample, whatever a decoder makes of it, may stop training
            cause, message = "undecodable", f"{type(error).__name__}: {error}"
        else:
            self._recent.append(False)
            return sample
        self._recent.append(True)
        bad.append(
            BadSample(
                key=entry.key,
                shard=self.source.shard_of(entry),
                cause=cause,
                message=message,
                draw=planned.draws[position],
            )
        )
        return None

    def _collect(self, pending: _Pending, bad: list[BadSample]) -> list[Batch]:
        planned, batches = pending.plan, []
        view = self.config.views[planned.view]
        for jobs in pending.micro:
            entries = [self.source.entries[planned.entries[position]] for position, _ in jobs]
            samples = [self._take(planned, position, job, bad) for position, job in jobs]
            batches.append(
                collate(
                    samples,
                    blank=self.source.blank(entries[0], view),
                    keys=[entry.key for entry in entries],
                    draws=[planned.draws[position] for position, _ in jobs],
                    kind=view.kind,
                )
            )
        return batches

    def _too_many_bad(self, bad: list[BadSample]) -> str | None:
        count, limit = sum(self._recent), self.config.max_bad_fraction * self.config.bad_window
        hopeless = len(self._recent) >= _ALL_BAD and count == len(self._recent) and self.config.max_bad_fraction < 1
        if not bad or (count <= limit and not hopeless):
            return None
        causes = dict(Counter(record.cause for record in bad))
        return (
            f"data.max_bad_fraction: got {count} bad samples among the last {len(self._recent)} of process "
            f"{self._rank}, needed at most {limit:g} = data.max_bad_fraction {self.config.max_bad_fraction:g} x "
            f"data.bad_window {self.config.bad_window}, and not all of {_ALL_BAD} (this step: {causes}); "
            f"the last: {bad[-1].shard}, key {bad[-1].key!r}: {bad[-1].message}"
        )

    def __iter__(self) -> Iterator[tuple[list[Batch], StepInfo]]:
        while True:
            yield self._next()

    def _next(self) -> tuple[list[Batch], StepInfo]:
        begin = time.monotonic()
        while len(self._queue) < self._depth():
            self._queue.append(self._submit(self._step + len(self._queue)))
        pending = self._queue.popleft()
        # Samples that the index left out are reported once, by one process, with the first step of the run.
        first = self._step == 0 and self._rank == 0
        bad: list[BadSample] = list(self.source.bad) if first else []
        batches = self._collect(pending, bad)
        keys = [self.source.entries[entry_id].key for entry_id in pending.plan.entries]
        self._keys_hash = chain_keys(self._keys_hash, keys)
        self._step += 1
        info = StepInfo(
            step=pending.plan.step,
            state=self.state,
            keys_hash=self._keys_hash,
            bad=tuple(bad),
            data_s=time.monotonic() - begin,
            too_many_bad=self._too_many_bad(bad),
        )
        return batches, info

    def close(self) -> None:
        """Let the loading threads end."""
        self._pool.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def build_loader(
    config: DataConfig,
    *,
    seed: int,
    global_rank: int,
    world_size: int,
    accumulation: int = 1,
    state: dict[str, Any] | None = None,
) -> Loader:
    """Build the training loader of one process.

    Args:
        config: The data section.
        seed: Seed of the run.
        global_rank: This process.
        world_size: Processes.
        accumulation: Micro-batches per optimizer step.
        state: State of a ``StepInfo`` to go on after; None starts at step 0.

    Returns:
        The loader. ``data.shards`` that hold nothing usable and numbers that do not divide give a ``ConfigError``.
    """
    micro_batch(config.global_batch, world_size=world_size, accumulation=accumulation)
    source = open_source(config.shards, caption_required=config.caption_required, backend=config.decoder)
    if config.flip and not source.random_cuts:
        raise ConfigError("data.flip: true, but a latent cache holds its own mirrored copies; set flip when caching")
    return Loader(
        config,
        source,
        seed=seed,
        global_rank=global_rank,
        world_size=world_size,
        accumulation=accumulation,
        state=state,
    )
