"""Saving: training stops for a copy of this process's shards into host memory, a thread writes them, the loop agrees.

A save goes through two phases, ``write`` (every process its shard) and ``commit`` (the main process: manifest, rename,
``RUN/latest``). The threads make no collectives: each process says in the loop's own all-reduce whether it is still
busy, and all move on together once none is.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import errno
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ltd import storage
from ltd.parallel.ema import Ema
from ltd.parallel.interface import Engine, flat
from ltd.parallel.layout import Layout, name_processes
from ltd.storage import ShardImage, Slice, StorageWriteError

logger = logging.getLogger(__name__)

#: What the groups of a discriminator start with, so that exports and averages know nothing of it.
CRITIC = "critic."

#: Looks after which the processes that still write are named, and again after as many more.
_LOOKS_TO_TELL = 30
#: Seconds between two looks of a process that waits for a save to end; each look is a collective.
_LOOK_S = 1.0


@dataclass
class _Flight:
    """A save on its way."""

    step: int
    path: Path
    manifest: dict[str, Any]
    phase: Literal["write", "commit"]
    #: What this process's thread is doing; gives a text where it failed. None where it has nothing to do.
    job: Future[str | None] | None


class Saver:
    """Write the checkpoints of a run; made and called by all processes alike.

    At most one save is on its way. Leftovers of killed saves are removed at construction.

    Args:
        run_dir: Directory of the run.
        engine: Engine whose masters, optimizer state and buffers are written.
        ema: Averaged weights, if there are any.
        layout: This process's position.
        keep_last: Older checkpoints beyond this number are removed; None keeps all.
        keep_every: Checkpoints whose step is a multiple are never removed; None for no such rule.
        background: Whether ``save`` returns after the copy; otherwise it returns when all is on disk.
        critic: Engine of a discriminator, saved beside the model in groups of its own.
    """

    def __init__(
        self,
        run_dir: str | Path,
        engine: Engine,
        ema: Ema | None,
        layout: Layout,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        background: bool = True,
        critic: Engine | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        #: Seconds that the last ``save`` kept training waiting, and that this process's last write took.
        self.blocked_s = 0.0
        self.write_s = 0.0
        self._engine, self._ema, self._layout, self._critic = engine, ema, layout, critic
        self._keep_last, self._keep_every, self._background = keep_last, keep_every, background
        self._image: ShardImage | None = None
        self._flight: _Flight | None = None
        self._reported: tuple[int, str] | None = None
        self._removal: Future[str | None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-write")
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-remove")
        if layout.is_main:
            storage.remove_incomplete(run_dir)

    def save(self, step: int, extra: dict[str, Any]) -> Path:
        """Begin the checkpoint of a step, after the one on its way has ended; called by all processes.

        Args:
            step: Training steps done.
            extra: Plain values for the manifest (data position, tracker id, ...); the main process's are written.

        Returns:
            Directory that the checkpoint will have.

        Raises:
            StorageWriteError: If it, or the save before it, failed on any process.
            RuntimeError: If the processes do not all save this step.
        """
        began = time.perf_counter()
        self._finish_flight()
        path = storage.checkpoint_path(self.run_dir, step)
        slices = shard_slices(self._engine, self._ema, self._layout)
        if self._critic is not None:
            own = shard_slices(self._critic, None, self._layout)
            slices += [dataclasses.replace(item, group=CRITIC + item.group) for item in own]
        self._agree_to_start(step, path, self._prepare(path, slices))
        assert self._image is not None
        on_gpu = self._layout.device.type == "cuda"
        self._image.fill(slices, at_write=not self._background and not on_gpu)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        job = self._writer.submit(self._attempt, lambda: self._write(path))
        self._flight = _Flight(step, path, self._manifest(step, extra), "write", job)
        if not self._background:
            self._finish_flight()
        self.blocked_s = time.perf_counter() - began
        return path

    def pending(self) -> tuple[float, float]:
        """Say whether this process is still writing, and whether it failed, as numbers for a sum over processes."""
        flight = self._flight
        if flight is None:
            return 0.0, 0.0
        self._reported = (flight.step, flight.phase)
        if flight.job is None:
            return 0.0, 0.0
        if not flight.job.done():
            return 1.0, 0.0
        return 0.0, float(flight.job.result() is not None)

    def settle(self, pending_sum: float, failed_sum: float) -> None:
        """Move the save on its way forward; called by all processes with the sums of what ``pending`` gave.

        Args:
            pending_sum: Processes that are still writing.
            failed_sum: Processes that failed.

        Raises:
            StorageWriteError: On all processes, if one failed and none is writing any more.
        """
        flight = self._flight
        # Sums that were made before this save began, or in its earlier phase, say nothing about it.
        if flight is None or self._reported != (flight.step, flight.phase) or pending_sum > 0:
            return
        self._reported = None
        if failed_sum > 0:
            self._flight = None
            self._fail(flight.path, None if flight.job is None else flight.job.result())
        elif flight.phase == "write":
            flight.phase, flight.job = "commit", None
            if self._layout.is_main:
                flight.job = self._writer.submit(self._attempt, lambda: self._commit(flight))
        else:
            self._flight = None
            logger.info("checkpoint of step %d is whole: %s", flight.step, flight.path)

    def wait(self) -> None:
        """Wait until the save on its way is on disk and older checkpoints are removed; called by all processes.

        Raises:
            StorageWriteError: On all processes, if one failed.
        """
        self._finish_flight()
        if self._removal is not None:
            self._removal.result()

    def close(self) -> None:
        """End this process's threads, without a word to the others; a save that is not committed yet is abandoned."""
        for pool in (self._writer, self._remover):
            pool.shutdown(cancel_futures=True)
        self._flight = None

    def _finish_flight(self) -> None:
        # Looks are short collectives, so that a write that takes longer than the time-out does not end the run.
        looks = 0
        while self._flight is not None:
            looks += 1
            if looks % _LOOKS_TO_TELL == 0:
                self._tell_who_writes(looks * _LOOK_S)
            if self._flight.job is not None:
                concurrent.futures.wait([self._flight.job], timeout=_LOOK_S)
            numbers = torch.tensor(self.pending(), dtype=torch.float64, device=self._layout.device)
            self.settle(*self._layout.sum_(numbers).tolist())

    def _tell_who_writes(self, waited_s: float) -> None:
        flight = self._flight
        assert flight is not None
        busy = self._layout.gather_objects(flight.job is not None and not flight.job.done())
        writing = [rank for rank, writes in enumerate(busy) if writes]
        if self._layout.is_main and writing:
            logger.warning(
                "save of step %d: %s still writing after %.0f s; if it never ends, look at the file system of %s",
                flight.step,
                name_processes(writing),
                waited_s,
                flight.path.parent,
            )

    def _prepare(self, path: Path, slices: list[Slice]) -> str | None:
        """Make the directory and, once, the memory; says what failed."""

        def action() -> None:
            if self._layout.is_main:
                storage.begin_directory(path)
            if self._image is None:
                self._image = ShardImage(slices, pin=self._layout.device.type == "cuda")

        return self._attempt(action)

    def _agree_to_start(self, step: int, path: Path, failure: str | None) -> None:
        """Start only where all processes save the same step and are ready to."""
        size = self._layout.world_size
        numbers = torch.tensor([step, step * step, failure is not None], device=self._layout.device)
        try:
            steps, squares, failed = self._layout.sum_(numbers).tolist()
        except RuntimeError as error:
            raise RuntimeError(
                f"save of step {step}: not every process took part; all must call save() after the same step ({error})"
            ) from error
        # Equal numbers, and no others, have this sum of squares.
        if size * squares != steps * steps:
            found = self._layout.gather_objects(step)
            if self._layout.is_main:
                storage.abort_directory(path)
            by_process = ", ".join(f"process {rank}: {number}" for rank, number in enumerate(found))
            raise RuntimeError(f"save: all processes must save the same step, got {by_process}")
        if failed:
            self._fail(path, failure)

    def _manifest(self, step: int, extra: dict[str, Any]) -> dict[str, Any]:
        return copy.deepcopy(extra) | {
            "step": step,
            "optimizer_step": self._engine.applied_steps,
            "world_size": self._layout.world_size,
            "critic_step": None if self._critic is None else self._critic.applied_steps,
            "engine": self._engine.resolved_config(),
            "ema": [] if self._ema is None else self._ema.groups,
        }

    def _write(self, path: Path) -> None:
        assert self._image is not None
        began = time.perf_counter()
        storage.write_image(storage.incomplete_path(path), _shard_name(self._layout.global_rank), self._image)
        self.write_s = time.perf_counter() - began

    def _commit(self, flight: _Flight) -> None:
        incomplete = storage.incomplete_path(flight.path)
        names = [_shard_name(rank) for rank in range(self._layout.world_size)]
        storage.write_manifest(incomplete, flight.manifest, shard_names=names)
        storage.commit_directory(flight.path)
        storage.write_latest(self.run_dir, flight.path)
        old = storage.expired(self.run_dir, flight.path, keep_last=self._keep_last, keep_every=self._keep_every)
        self._removal = self._remover.submit(_remove_all, old)

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """Do a part of a save; a failure becomes a text, because all processes must hear of it first."""
        try:
            action()
        except OSError as error:
            return f"process {self._layout.global_rank}: {error}"
        except Exception as error:
            return f"process {self._layout.global_rank}: {type(error).__name__}: {error}"
        return None

    def _fail(self, path: Path, failure: str | None) -> None:
        """Raise on all processes what failed on some of them."""
        found = [text for text in self._layout.gather_objects(failure) if text is not None]
        if self._layout.is_main:
            storage.abort_directory(path)
        full = any(os.strerror(number) in text for text in found for number in (errno.ENOSPC, errno.EDQUOT))
        raise StorageWriteError(
            f"checkpoint {path} was not written, older ones are whole; {'free some space and ' if full else ''}run the "
            f"same command to resume: {'; '.join(found)}"
        )


def shard_slices(engine: Engine, ema: Ema | None, layout: Layout) -> list[Slice]:
    """List what this process writes: masters, optimizer state, averages, frozen weights; the main process buffers too.

    Args:
        engine: Engine of the model.
        ema: Averaged weights, if there are any.
        layout: This process's position.

    Returns:
        Slices, as views where memory formats allow.
    """
    slices = [item for shard in engine.master_shards() if shard.owner for item in shard.slices()]
    if ema is not None:
        slices += ema.slices()
    if layout.is_main:
        buffers = {name: b for name, b in kept_buffers(engine).items() if name not in engine.frozen.names}
        slices += [Slice("buffer", name, tuple(b.shape), 0, flat(b)) for name, b in buffers.items()]
    return slices + engine.frozen.slices()


def kept_buffers(engine: Engine) -> dict[str, Tensor]:
    """List what a checkpoint keeps besides trained tensors: persistent buffers and frozen parameters."""
    kept = engine.module.state_dict().keys()
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    return {name: b for name, b in engine.module.named_buffers() if name in kept} | frozen


def _shard_name(global_rank: int) -> str:
    return f"rank_{global_rank:05d}"


def _remove_all(paths: list[Path]) -> None:
    for path in paths:
        try:
            storage.remove_checkpoint(path)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s (%s)", path, error)
