"""Deal the planned global batches to one process and load them.

Knows two integers, ``global_rank`` and ``world_size``; which samples a step holds is decided in ``ltd.data.plan``.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from ltd.config import digest, to_dict
from ltd.data.arrange import arrange, build_plan, describe
from ltd.data.batch import BadSample, Batch, MicroBatch, PackedBatch, StepInfo
from ltd.data.config import DataConfig, micro_batch
from ltd.data.fetch import Fetcher, Group
from ltd.data.mixture import MixedSource, open_sources
from ltd.data.order import unit
from ltd.data.plan import PlannedBatch, ViewConfig, chain_keys, random_placement
from ltd.data.sources import Items
from ltd.data.workers import WorkerPool

logger = logging.getLogger(__name__)

#: Training stops when a process has read this many samples and every one of them was bad.
_ALL_BAD = 16


@dataclass
class _Pending:
    """One step on its way."""

    plan: PlannedBatch
    keys: list[str]  # of the global batch
    micro: list[list[Group]]  # per micro-batch one group per sample size
    num_bytes: int


class BadWindow:
    """Share of bad samples among the last ones of one process.

    Args:
        config: Limit and length of the window.
        global_rank: This process, for the message.
    """

    def __init__(self, config: DataConfig, global_rank: int) -> None:
        self.config, self.global_rank = config, global_rank
        self._steps: deque[tuple[int, int]] = deque()  # samples, and how many of them were bad

    def add(self, good: int, bad: list[BadSample]) -> str | None:
        """Count the samples of one step.

        Args:
            good: Samples that were loaded.
            bad: Samples that failed.

        Returns:
            Why training must stop, None where it need not.
        """
        config, steps = self.config, self._steps
        steps.append((good + len(bad), len(bad)))
        while sum(samples for samples, _ in steps) - steps[0][0] >= config.bad_window:
            steps.popleft()
        total, count = sum(samples for samples, _ in steps), sum(failed for _, failed in steps)
        limit = config.max_bad_fraction * max(config.bad_window, total)
        hopeless = total >= _ALL_BAD and count == total and config.max_bad_fraction < 1
        if not bad or (count <= limit and not hopeless):
            return None
        causes = dict(Counter(record.cause for record in bad))
        return (
            f"data.max_bad_fraction: got {count} bad samples among the last {total} of process "
            f"{self.global_rank}, needed at most {limit:g} = data.max_bad_fraction {config.max_bad_fraction:g} x "
            f"{max(config.bad_window, total)} (data.bad_window), and not all of {_ALL_BAD} (this step: {causes}); "
            f"the last: {bad[-1].shard}, key {bad[-1].key!r}: {bad[-1].message}"
        )


class Loader:
    """Endless, resumable batches of one process; iterate for ``(list of micro-batches, StepInfo)`` per optimizer step.

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
        source: MixedSource,
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
        self.arrangement = arrange(config, source)
        if global_rank == 0:
            describe(config, source, self.arrangement, logger.info)
        self.plan = build_plan(config, source, self.arrangement, seed=seed)
        self._check_units()
        shapes = [[str(v), v.weight, len(ids)] for v, ids in zip(self.views, self.arrangement.ids, strict=True)]
        mixture = [dataset.weight for dataset in config.sets]
        where = hashlib.sha256(source.entries.columns["shard"].tobytes()).hexdigest()
        order = [config.mode, config.open_shards, mixture, self.arrangement.units, to_dict(config.batching), where]
        self._plan_id = digest({"seed": seed, "data": source.digest, "views": shapes, "order": order})
        self._step, self._keys_hash = 0, ""
        if state is not None:
            self._resume(state)
        self._bad = BadWindow(config, global_rank)
        self._pool = WorkerPool(max(1, config.num_workers), timeout_s=config.timeout_s)
        self._fetcher = Fetcher(source, self._pool, ahead=config.num_workers > 0)
        self._queue: deque[_Pending] = deque()

    @property
    def views(self) -> tuple[ViewConfig, ...]:
        """What samples are cut to."""
        return self.arrangement.views

    def _check_units(self) -> None:
        fields = {"fixed": "data.global_batch", "buckets": "data.batching.multiple", "packed": "data.batching.packs"}
        name = fields[self.config.batching.kind]
        for units in sorted({kind.units for kind in self.plan.kinds}):
            micro_batch(units, world_size=self._world, accumulation=self._accumulation, name=name)

    def _resume(self, state: dict[str, Any]) -> None:
        self._step, self._keys_hash = int(state["step"]), str(state["keys_hash"])
        if state.get("plan", self._plan_id) != self._plan_id:
            logger.warning(
                "data: samples, data.views, data.batching, data.global_batch or seed differ from the checkpoint's; "
                "going on at step %d of the new order",
                self._step,
            )

    @property
    def state(self) -> dict[str, Any]:
        """Plain dict that continues after the last step handed out; equal on every process."""
        return {"step": self._step, "keys_hash": self._keys_hash, "plan": self._plan_id}

    def _items(self, planned: PlannedBatch, places: Sequence[int], keys: Sequence[str]) -> Items:
        """Say how the samples at some places of the global batch are cut and captioned."""
        columns, seed = self.source.entries.columns, self.seed
        entries = np.array([planned.entries[place] for place in places], dtype=np.int64)
        draws = [planned.draws[place] for place in places]
        several = columns["captions"][entries] > 1
        captions = None
        if several.any():
            pairs = zip(draws, several, strict=True)
            captions = np.array([unit(seed, draw, "caption") if many else 0.0 for draw, many in pairs])
        own = [keys[place] for place in places]
        if not self.source.random_cuts:
            return Items(entries, own, draws, captions)
        rows = zip(places, draws, columns["frames"][entries].tolist(), columns["fps"][entries].tolist(), strict=True)
        placements = [
            random_placement(
                self.views[planned.views[place]], frames=frames, fps=fps, seed=seed, draw=draw, flip=self.config.flip
            )
            for place, draw, frames, fps in rows
        ]
        return Items(entries, own, draws, captions, placements)

    def _submit(self, step: int) -> _Pending:
        planned = self.plan.step(step)
        keys = self.source.entries.keys.pick(np.array(planned.entries, dtype=np.int64))
        each = len(planned.ends) // (self._world * self._accumulation)
        micro, num_bytes = [], 0
        for number in range(self._accumulation):
            first = (number * self._world + self._rank) * each
            by_view: dict[int, list[int]] = {}
            for place in planned.unit_range(first, first + each):
                by_view.setdefault(planned.views[place], []).append(place)
            groups = [
                self._fetcher.submit(self._items(planned, places, keys), self.views[view])
                for view, places in by_view.items()
            ]
            num_bytes += sum(self._fetcher.num_bytes(group) for group in groups)
            micro.append(groups)
        return _Pending(planned, keys, micro, num_bytes)

    def _fill_queue(self) -> None:
        """Keep steps in flight, bounded in steps and in bytes; without worker threads, only the one asked for."""
        depth = 1 + self.config.prefetch if self.config.num_workers else 1
        limit = self.config.prefetch_mb * 2**20
        while not self._queue or (
            len(self._queue) < depth and sum(pending.num_bytes for pending in self._queue) < limit
        ):
            self._queue.append(self._submit(self._step + len(self._queue)))

    def _collect(self, groups: list[Group], bad: list[BadSample]) -> MicroBatch:
        batches: list[Batch] = []
        for group in groups:
            batch, failed = self._fetcher.collect(group)
            batches.append(batch)
            bad += failed
        return PackedBatch(tuple(batches)) if self.config.batching.kind == "packed" else batches[0]

    def _metrics(self, planned: PlannedBatch) -> dict[str, float]:
        """Compute what the plan alone tells of a step: the same on every process."""
        tokens = np.array([self.arrangement.tokens[view] for view in planned.views], dtype=np.float64)
        costs = np.add.reduceat(tokens, np.concatenate([[0], planned.ends[:-1]]).astype(np.int64))
        ranks = costs.reshape(self._accumulation, self._world, -1).sum(axis=(0, 2))
        batching, total = self.config.batching, float(tokens.sum())
        budget = {"fixed": total, "packed": len(costs) * getattr(batching, "tokens", 0)}.get(
            batching.kind, getattr(batching, "tokens", 0)
        )
        metrics = {
            "data/samples": float(len(planned.entries)),
            "data/padding_share": 1 - total / budget,
            "data/rank_imbalance": float(ranks.max() / ranks.mean() - 1),
        }
        counters = self.plan.progress(planned.step + 1)
        what = "epochs" if self.config.mode == "epochs" else "epochs_drawn"
        metrics[f"data/{what}"] = min(epochs for _, epochs in counters)
        metrics["data/units_seen"] = float(sum(units for units, _ in counters))
        if len(counters) > 1:
            for number, (dataset, (_, epochs)) in enumerate(zip(self.config.sets, counters, strict=True)):
                metrics[f"data/{what}_{dataset.name or number}"] = epochs
        return metrics

    def __iter__(self) -> Iterator[tuple[list[MicroBatch], StepInfo]]:
        while True:
            yield self._next()

    def _next(self) -> tuple[list[MicroBatch], StepInfo]:
        if self._pool.closed:
            raise RuntimeError("the loader is closed")
        begin = time.monotonic()
        self._fill_queue()
        pending = self._queue.popleft()
        failed: list[BadSample] = []
        batches = [self._collect(groups, failed) for groups in pending.micro]
        good = sum(len(batch) for batch in batches) - len(failed)
        # Samples that the index left out are reported once, by one process, with the first step of the run.
        left_out = self.source.bad if self._step == 0 and self._rank == 0 else []
        self._keys_hash = chain_keys(self._keys_hash, pending.keys)
        self._step += 1
        info = StepInfo(
            step=pending.plan.step,
            state=self.state,
            keys_hash=self._keys_hash,
            bad=(*left_out, *failed),
            data_s=time.monotonic() - begin,
            metrics=self._metrics(pending.plan),
            too_many_bad=self._bad.add(good, failed),
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
        The loader. Data that hold nothing usable and numbers that do not divide give a ``ConfigError``.
    """
    if config.batching.kind == "fixed":  # before anything is opened
        micro_batch(config.global_batch, world_size=world_size, accumulation=accumulation)
    return Loader(
        config,
        open_sources(config),
        seed=seed,
        global_rank=global_rank,
        world_size=world_size,
        accumulation=accumulation,
        state=state,
    )
