"""Sampling as a job over processes: requests in, one file each out, finished ones skipped, failed ones listed.

Batches are a function of the requests and the batch size alone. Processes, or sequence groups of them, only share the
batches out, and what a sample is made beside never depends on how many they are or on what was finished before: so the
files are the same, byte for byte. Only a batch that fails as a whole is made again one by one. No process waits for
another while it works; they meet before the first batch and after the last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.denoisers import Conditioning, Dit, Parametrized
from ltd.inference.generate import Generator, Request, batches
from ltd.inference.halo import decode_strips
from ltd.inference.known import Tail
from ltd.inference.media import video_to_pixels
from ltd.inference.sample_folder import SampleFolder
from ltd.inference.segments import check_segments, make_segments, segment_length
from ltd.parallel.halo import strips
from ltd.parallel.heartbeat import Heartbeat
from ltd.parallel.layout import Layout
from ltd.parallel.sequence import shard
from ltd.progress import Progress
from ltd.storage import StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")
#: A request with its number in the list of all.
Numbered = tuple[int, Request]
#: Seconds between looks at how far the other processes are.
_LOOK_S = 5.0
#: Frames that a sequence group decodes at a time.
_FRAMES_PER_CHUNK = 16
#: What errors say, that are not of a type of their own, where memory was too small for a batch.
_NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
_NOT_FINITE = "not finite: lower --guidance, take more --steps, or --precision fp32"


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    """What to make and where to; the same on all processes."""

    requests: tuple[Request, ...]
    out: Path
    #: Seed of the noise.
    seed: int
    #: Most requests in a batch; a batch has one shape.
    batch_size: int
    #: All that the samples depend on; a folder that was begun with another one is begun anew.
    identity: Mapping[str, str]
    #: What every row of samples.jsonl says besides its request.
    columns: Mapping[str, Any]
    #: Segments of every video, each beginning with the end of the one before.
    segments: int = 1
    #: Latent frames (in patches) of that end.
    overlap: int = 1
    #: Whether prompts that the text encoder cannot read whole are cut; else they are refused.
    cut_prompts: bool = False

    def batches(self) -> list[list[Numbered]]:
        """Cut the requests into batches, in order."""
        numbers = iter(range(len(self.requests)))
        return [[(next(numbers), request) for request in batch] for batch in batches(self.requests, self.batch_size)]


def run_job(job: SampleJob, load: Callable[[], Generator], layout: Layout, beat: Heartbeat) -> dict[int, str]:
    """Make the missing samples of a job; called by all processes.

    Args:
        job: What to make.
        load: Makes this process's generator; called where there is something to do.
        layout: This process's position; each of its sequence groups makes batches of its own.
        beat: Told what this process is doing.

    Returns:
        By number, why a sample could not be made; the same on all processes.

    Raises:
        ConfigError: On the main process, if something is wrong that concerns all samples; before any is made.
    """
    folder = SampleFolder(job.out, job.requests, job.columns)
    beat.enter("start", 0)
    found = agree(layout, lambda: folder.missing(job.identity) if layout.is_main else [])
    missing = set(layout.broadcast_object(found))
    pending = [batch for batch in job.batches() if any(number in missing for number, _ in batch)]
    share = pending[layout.global_rank // layout.sequence :: layout.world_size // layout.sequence]
    beat.enter("load", 0)
    kinds = {(request.shape, request.given): request for batch in pending for _, request in batch}
    generator = agree(layout, lambda: _prepare(load, job, kinds.values(), layout) if share else None)
    # Only now is anything cleared away: a mistake in the arguments costs no samples.
    agree(layout, lambda: folder.begin(job.identity) if layout.is_main else None)
    failures: dict[int, str] = {}
    if generator is not None:
        with _Shown(job, folder, generator.sampler.steps, shown=layout.is_main) as shown:
            maker = _Maker(job, folder, generator, layout, beat, shown)
            failures = maker.make(share, missing)
    beat.enter("wait", 0)
    # Not a barrier: objects travel between hosts' memories, where a process that died is noticed at once.
    gathered = {number: why for reported in layout.gather_objects(failures) for number, why in reported.items()}
    beat.enter("finish", 0)
    failed = agree(layout, lambda: folder.finish(gathered) if layout.is_main else {})
    failed = layout.broadcast_object(failed)
    logger.info("%d of %d samples in %s", len(job.requests) - len(failed), len(job.requests), job.out)
    if failed:
        first, why = next(iter(failed.items()))
        logger.warning(
            "%d of %d samples failed; see %s; run the same command again to retry them; the first: %d, %s",
            *(len(failed), len(job.requests), job.out / "failed.jsonl", first, why),
        )
    return failed


def agree(layout: Layout, work: Callable[[], T]) -> T:
    """Do what a user's mistake may stop, and end on all processes alike if it does on one, with one message in all.

    Args:
        layout: This process's position; all processes call this.
        work: What to do; communicates with no other process.

    Returns:
        What it gave.

    Raises:
        ConfigError: On the main process, if it failed on another.
        SystemExit: On the others, with code 0: what there is to say, and the exit code, are the main process's.
    """
    problem: ConfigError | StorageError | OSError | None = None
    result: T | None = None
    try:
        result = work()
    except (ConfigError, StorageError, OSError) as error:
        problem = error
    problems = layout.gather_objects(None if problem is None else str(problem))
    if all(text is None for text in problems):
        return result  # type: ignore[return-value]
    if not layout.is_main:
        raise SystemExit(0)
    if problem is not None:
        raise problem
    rank, text = next((rank, text) for rank, text in enumerate(problems) if text is not None)
    raise ConfigError(f"{text} (on process {rank})")


def _prepare(load: Callable[[], Generator], job: SampleJob, kinds: Iterable[Request], layout: Layout) -> Generator:
    """Load the generator, check what it is to make, and share its tokens out over the sequence group."""
    generator = load()
    if not job.cut_prompts:
        generator.check_prompts(request.prompt for request in job.requests)
    for request in sorted(kinds, key=str):
        shape = request.shape
        try:
            generator.check(shape, request.given)
            check_segments(generator, request, job.segments, job.overlap)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"--shapes: {shape}: {error}") from None
        if generator.tiling is None:
            rows = generator.autoencoder.compression.latent(shape).height
            with strips(generator.autoencoder, rows, layout):  # says what it has to say on entering
                pass
    for model in (generator.denoiser, generator.guide):
        if model is not None:
            shard(_network(model), layout)
    return generator


def _network(model: Dit | Parametrized) -> Dit:
    return model.network if isinstance(model, Parametrized) else model


class _Maker:
    """Makes batches, one after the other.

    Args:
        job: What to make.
        folder: Where samples go.
        generator: Its denoiser is shared over the sequence group.
        layout: This process's position.
        beat: Told what this process is doing.
        shown: Told how far it is.
    """

    def __init__(
        self,
        job: SampleJob,
        folder: SampleFolder,
        generator: Generator,
        layout: Layout,
        beat: Heartbeat,
        shown: _Shown,
    ) -> None:
        self.job, self.folder, self.generator, self.shown = job, folder, generator, shown
        self.layout, self.beat = layout, beat
        self.failures: dict[int, str] = {}
        self.missing: set[int] = set()
        self.count = 0

    def make(self, share: Sequence[list[Numbered]], missing: set[int]) -> dict[int, str]:
        """Make this sequence group's batches.

        Args:
            share: The batches.
            missing: Numbers of the samples, of all batches, that are not there.

        Returns:
            By number, why a sample could not be made; on one member of the group.
        """
        self.missing = set(missing)
        for batch in share:
            self._make(batch)
        return self.failures

    def _make(self, batch: list[Numbered]) -> None:
        problem = self._try(batch)
        if problem is not None and len(batch) > 1:
            logger.warning("a batch of %d failed, its samples are made one by one: %s", len(batch), problem)
            for number, request in batch:
                if number in self.missing:
                    self._make([(number, request)])
        elif problem is not None:
            self._fail(batch[0][0], problem)

    def _try(self, batch: list[Numbered]) -> str | None:
        """Make a batch, alike on all members of the group; says what was wrong if its samples can go on apart."""
        requests = [request for _, request in batch]
        problem, conditions = "", None
        self.count += 1
        self.shown.begin(sum(number in self.missing for number, _ in batch))
        self.beat.enter("text", self.count)
        try:
            conditions = self.generator.condition(requests)
        except Exception as error:
            if not _concerns_samples(error):
                raise
            problem = _describe(error)
        flag = torch.tensor([float(bool(problem))], device=self.layout.device)
        if any(bool(part.item()) for part in self.layout.gather_sequence(flag)):
            return problem or "the text failed on another process of the sequence group"
        assert conditions is not None
        try:
            if self.job.segments > 1:
                self._make_long(batch, conditions)
                return None
            latents = self.generator.draw_latents(
                requests, conditions, seed=self.job.seed, progress=lambda step, _: self._progress(step)
            )
            self.beat.enter("decode", self.count)
            video = self._decode(latents)
        except Exception as error:
            # Members of a group are in the middle of what they do together: one cannot leave it and go on.
            if self.layout.sequence > 1 or not _concerns_samples(error):
                raise
            return _describe(error)
        self.beat.enter("write", self.count)
        self._write(batch, video)
        return None

    def _make_long(self, batch: list[Numbered], conditions: tuple[Conditioning, Conditioning]) -> None:
        """Make the missing samples of a batch segment by segment; their frames go to the files as they come."""
        generator, job = self.generator, self.job
        requests = [request for _, request in batch]

        def draw(tail: Tail | None) -> Tensor:
            steps = 0 if tail is None else tail.segment * generator.sampler.steps
            latents = generator.draw_latents(
                *(requests, conditions),
                seed=job.seed,
                progress=lambda step, _: self._progress(steps + step),
                tail=tail,
            )
            self.beat.enter("decode", self.count)
            return generator.decode(latents)

        rows = {row: number for row, (number, _) in enumerate(batch) if number in self.missing}
        files = {row: self.folder.open(number) for row, number in rows.items()}
        right = torch.ones(len(batch), dtype=torch.bool)
        for pixels, finite in make_segments(draw, job.segments, job.overlap, segment_length(generator, job.overlap)):
            right &= finite
            for row, file in files.items():
                for frame in pixels[row].numpy():
                    file.add(frame)
        self.beat.enter("write", self.count)
        for row, number in rows.items():
            if not bool(right[row]):
                self._fail(number, _NOT_FINITE)
                continue
            self.folder.close(number, files[row])
            self.missing.discard(number)
            self.shown.finish()

    def _decode(self, latents: Tensor) -> Tensor | None:
        """Decode on one process; by strips of rows in a sequence group, whose first member gets the video."""
        generator, layout = self.generator, self.layout
        if layout.sequence == 1:
            return generator.decode(latents)
        if generator.tiling is not None:
            return generator.decode(latents) if layout.sequence_rank == 0 else None
        frames = max(_FRAMES_PER_CHUNK, generator.autoencoder.compression.t)
        return decode_strips(generator.autoencoder, latents, layout, frames_per_chunk=frames)

    def _write(self, batch: list[Numbered], video: Tensor | None) -> None:
        """Write the missing samples of a batch; one whose pixels are not finite fails, those beside it do not."""
        for row, (number, _) in enumerate(batch):
            if number not in self.missing:
                continue
            if video is not None and not bool(video[row].isfinite().all()):
                self._fail(number, _NOT_FINITE)
                continue
            if video is not None:
                self.folder.write(number, video_to_pixels(video[row : row + 1])[0].cpu().numpy())
            self.missing.discard(number)
            self.shown.finish()

    def _fail(self, number: int, why: str) -> None:
        self.missing.discard(number)
        self.shown.finish()
        if self.layout.sequence_rank == 0:
            logger.error("sample %d (%s) failed: %s", number, self.job.requests[number].title, why)
            self.failures[number] = why

    def _progress(self, step: int) -> None:
        self.beat.enter("sample", self.count)
        self.shown.show(step)


class _Shown:
    """Progress of all processes, as files show it, with the solver steps of the batch at hand.

    A sample counts as its solver steps and one more, for what comes after them.

    Args:
        job: Its requests are counted.
        folder: Where the samples of all processes appear.
        steps: Solver steps of a segment of a sample.
        shown: Whether this process shows anything, and keeps samples.jsonl at what there is.
    """

    def __init__(self, job: SampleJob, folder: SampleFolder, steps: int, *, shown: bool) -> None:
        self.folder, self.shown, self.total = folder, shown, len(job.requests)
        self.cost = steps * job.segments + 1
        self.finished, self.at_hand, self.step = len(folder.look()), 0, 0
        self.bar = Progress(
            self.total * self.cost, "sample", unit="steps", done=self.finished * self.cost, enabled=shown
        )

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def begin(self, size: int) -> None:
        """Note that so many missing samples are at hand."""
        self.at_hand, self.step = size, 0

    def finish(self) -> None:
        """Count a sample at hand that is made, or has failed."""
        self.finished, self.at_hand = self.finished + 1, self.at_hand - 1
        self.show()

    def show(self, step: int | None = None) -> None:
        """Show how far all are; ``step``: solver steps done of the samples at hand."""
        self.step = self.step if step is None else step
        if not self.shown:
            return
        before = len(self.folder.look(every_s=math.inf))
        there = len(self.folder.look(every_s=_LOOK_S))
        if there != before:
            self.folder.write_rows()
        finished = max(self.finished, there)
        done = min(finished * self.cost + self.step * self.at_hand, self.total * self.cost)
        self.bar.update(max(0, done - self.bar.done), f"{finished}/{self.total} samples")


def _concerns_samples(error: Exception) -> bool:
    """Tell what one batch or sample is at fault for from mistakes that concern all, and from bugs."""
    if isinstance(error, ConfigError):
        return False
    if isinstance(error, ValueError | ArithmeticError | MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _NO_MEMORY)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
