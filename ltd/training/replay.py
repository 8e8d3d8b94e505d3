"""Take one step of a run again, from its checkpoint or from the start, and compare it with what the run wrote down.

A step is a function of the run's configuration, its number and a checkpoint before it, so this needs nothing that a run
does not keep anyway. Nothing is written into the run's directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltd import config as config_io
from ltd import storage
from ltd.config import ConfigError
from ltd.parallel import checkpoint
from ltd.parallel.heartbeat import Heartbeat
from ltd.parallel.layout import Layout
from ltd.parallel.preflight import code_digests, package_versions
from ltd.tracking.code_version import find_commit
from ltd.tracking.journal import plain, read_journal
from ltd.tracking.tracker import METRICS
from ltd.training import autoencoder, denoiser
from ltd.training.fork import resolve_fork
from ltd.training.guards import GuardError
from ltd.training.session import Session, open_layout
from ltd.training.stages import at_step
from ltd.training.step import RewindError, Stage, StepResult, take_step
from ltd.training.trace import Sample, Trace
from ltd.training.trace_recorder import Recorder

logger = logging.getLogger(__name__)

Run = autoencoder.AutoencoderRun | denoiser.DenoiserRun


@dataclass(frozen=True)
class Replay:
    """A step that was taken again; the same on all processes but for ``trace`` and ``is_main``."""

    step: int
    #: Step of the checkpoint that it started from; 0 is the run's beginning.
    start: int
    #: What the step gave, as a row of the metrics has it.
    row: dict[str, Any]
    #: The run's row of the step; None where it wrote none, or where this time the step was not taken.
    recorded: dict[str, Any] | None
    samples: list[Sample]
    #: Why the step was not taken, if so.
    incident: str | None
    is_main: bool
    #: On the main process, if asked for.
    trace: Trace | None

    def differences(self) -> dict[str, float]:
        """Compare the row with the run's: 0 where equal bit for bit, else shares of the larger number.

        Returns:
            By name of what both rows hold; empty without a row of the run.
        """
        recorded = self.recorded or {}
        return {name: _difference(recorded[name], self.row[name]) for name in self.row if name in recorded}


def load_run(run_dir: str | Path, overrides: Sequence[str]) -> Run:
    """Read a run's configuration.

    Args:
        run_dir: Directory of the run.
        overrides: ``dotted.key=value``, such as another layout.

    Returns:
        The configuration.

    Raises:
        ConfigError: If there is none, or a field does not fit.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: is no run directory, it has no config.yaml")
    run: Run = config_io.load(autoencoder.AutoencoderRun | denoiser.DenoiserRun, path, overrides)
    return run


def replay(run: Run, run_dir: str | Path, step: int, *, trace: bool = False) -> Replay:
    """Take one step of a run again; called by all processes of the launcher, in any layout.

    Args:
        run: What ``load_run`` gave.
        run_dir: Directory of the run; only read.
        step: Number of the step, from 1, as in ``metrics.jsonl``.
        trace: Whether to sketch inputs, module outputs and gradients.

    Returns:
        What came out. A step that the guards refuse comes out too, with ``incident``.

    Raises:
        ConfigError: If the run has no such step.
    """
    if not 1 <= step <= run.steps:
        raise ConfigError(f"--step: got {step}, the run has steps 1 to {run.steps}")
    with open_layout(run) as (layout, beat), tempfile.TemporaryDirectory(prefix="ltd-replay-") as scratch:
        before = [path for path in storage.checkpoints(run_dir) if storage.checkpoint_step(path) < step]
        found: Path | None = layout.broadcast_object(before[-1] if before else _origin(run, step))
        config, until = at_step(run, 0 if found is None else storage.checkpoint_step(found))
        if step > until:
            raise ConfigError(
                f"--step: got {step}, but the last checkpoint before it, {found}, is of the stage that ends at {until}"
            )
        config = _quiet(config, scratch, found)
        rewound: list[list[str]] = []
        while True:
            with _started(config, layout, beat) as (session, stage):
                for ids in rewound:
                    session.guards.exclude(ids)
                try:
                    return _take(session, stage, step, Path(run_dir), trace=trace)
                except RewindError as error:
                    # As the run did: the samples at fault weigh nothing, and the steps since are taken again.
                    logger.warning(
                        "%s; again from step %d without %d samples", error, session.start_step, len(error.ids)
                    )
                    rewound.append(error.ids)


def _origin(run: Run, step: int) -> Path | None:
    """Find the other run's checkpoint that a run started from, if it did."""
    if run.fork is not None:
        found: Path | None = resolve_fork(run.fork, run.run_dir)
    elif run.resume in ("auto", "never"):
        return None
    else:
        found = checkpoint.resolve(run.resume, Path(run.run_dir) / "none of its own")
    assert found is not None
    if storage.checkpoint_step(found) >= step:
        raise ConfigError(f"--step: got {step}, the run starts behind step {storage.checkpoint_step(found)} of {found}")
    return found


def _quiet(run: Run, scratch: str, checkpoint: Path | None) -> Run:
    """Turn a run's configuration into one that only takes steps, from a checkpoint or from nothing."""
    return dataclasses.replace(
        run,
        run_dir=scratch,
        resume="never" if checkpoint is None else str(checkpoint),
        fork=None,
        evaluation=dataclasses.replace(run.evaluation, every=0, shards=None),
        tracking=dataclasses.replace(run.tracking, wandb="disabled", tensorboard=False, histograms_every=0),
        parallel=dataclasses.replace(run.parallel, preflight=False),
    )


@contextlib.contextmanager
def _started(config: Run, layout: Layout, beat: Heartbeat) -> Iterator[tuple[Session, Stage]]:
    started: tuple[Session, Stage] | None
    match config:
        case autoencoder.AutoencoderRun():
            started = autoencoder.start(config, layout, beat)
        case denoiser.DenoiserRun():
            started = denoiser.start(config, layout, beat)
    assert started is not None, "the checkpoint lies before the last step"
    with started[0]:
        yield started


def _take(session: Session, stage: Stage, step: int, run_dir: Path, *, trace: bool) -> Replay:
    batches = iter(session.loader)
    for _ in range(session.start_step + 1, step):
        take_step(session, stage, *next(batches))
    micro_batches, info = next(batches)
    masked = [session.guards.mask(batch) for batch in micro_batches]
    recorder = Recorder(session, stage, modules=trace)
    result: StepResult | None = None
    incident = None
    with recorder.watching():
        try:
            result = take_step(session, recorder, micro_batches, info, before_update=recorder.collect_gradients)
        except (GuardError, RewindError) as error:
            incident = str(error)
    if result is not None and result.skipped is not None:
        incident = result.skipped.message
    row: dict[str, Any] = {"data/keys_hash": info.keys_hash}
    if result is not None:
        row |= {f"loss/{stage.name if name == 'loss' else name}": value for name, value in result.means.items()}
        row |= {"optim/grad_norm": result.grad_norm, "optim/lr": result.lr}
    samples = recorder.samples(masked, info)
    facts = _facts(session, step, row) if trace else {}
    return Replay(
        step=step,
        start=session.start_step,
        row=row,
        recorded=None if result is None else _recorded(run_dir, step),
        samples=samples,
        incident=incident,
        is_main=session.layout.is_main,
        trace=recorder.trace(samples, facts) if trace else None,
    )


def _facts(session: Session, step: int, row: dict[str, Any]) -> dict[str, Any]:
    """Say what a trace is of, and what it was made with."""
    config = config_io.to_dict(session.run)
    for name in ("run_dir", "resume", "fork"):  # of the replay, not of the run
        del config[name]
    layout = {"processes": session.layout.world_size, "device": session.layout.device.type, **config["parallel"]}
    return {
        "step": step,
        "start": session.start_step,
        "row": row,
        "layout": layout,
        "config": config,
        "packages": package_versions(),
        "code": {name: text for name, text in code_digests().items() if name.startswith("ltd/")},
        "commit": find_commit(),
    }


def _recorded(run_dir: Path, step: int) -> dict[str, Any] | None:
    rows = (row for row in read_journal(run_dir / METRICS) if row["step"] == step)
    return next(rows, None)


def _difference(a: Any, b: Any) -> float:
    a, b = plain(a), plain(b)
    if a == b:
        return 0.0
    if isinstance(a, str) or isinstance(b, str):
        return float("inf")  # hashes, or numbers that are not finite
    return float(abs(a - b) / max(abs(a), abs(b)))
