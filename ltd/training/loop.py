"""The loop of every stage: it decides when something happens, never what a tensor means.

A stage says what one step is (``ltd.training.step``); the loop fetches batches, logs, evaluates, saves, goes back, and
stops all processes together.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Any, TypeAlias, TypeVar

from ltd import storage
from ltd.data import StepInfo
from ltd.parallel.heartbeat import Heartbeat, explain_loss
from ltd.parallel.layout import Layout
from ltd.progress import Progress
from ltd.training.accounting import Accounting, bucket_of
from ltd.training.data_wait import DataWait
from ltd.training.guards import GuardError
from ltd.training.ledger import Ledger
from ltd.training.run import RunConfig
from ltd.training.session import Session
from ltd.training.step import RewindError, Stage, StepResult, take_step

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=RunConfig)
#: Builds where a run stands; told whether to look at what the stages behind that read too.
Starter: TypeAlias = Callable[[R, Layout, Heartbeat, bool], "tuple[Session, Stage] | None"]


class StopSignal:
    """Remember a SIGTERM until the end of the step."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def every(step: int, interval: int) -> bool:
    """Say whether something done each ``interval`` steps (0: never) is due after ``step`` steps."""
    return interval > 0 and step % interval == 0


def fit(session: Session, stage: Stage, stop: StopSignal) -> bool:
    """Train until the stage of the run has its steps, logging, evaluating and saving on the way.

    Args:
        session: Run, processes, engine, data and trackers.
        stage: What one step is.
        stop: Whether SIGTERM came, since the run began.

    Returns:
        Whether the stage has all its steps; False if SIGTERM ended it early, after a checkpoint was written.

    Raises:
        GuardError: If a step must not be taken and ``guards`` say stop; a checkpoint of the steps before is written.
        ProcessLostError: If another process died or stopped answering.
    """
    with Progress(
        session.run.steps, stage.name, unit="steps", done=session.start_step, enabled=session.layout.is_main
    ) as progress:
        while True:
            try:
                with _Loop(session, stage, stop, progress) as loop:
                    return loop.run()
            except RewindError as error:
                session.rewind(error.incident, error.step, error.ids)
                progress.update(session.start_step - error.step + 1, "rewound")
            except RuntimeError as error:
                # Here, where a launcher's SIGTERM does not end this process before it has said whom it lost.
                explain_loss(session.layout, session.beat, error)
                raise


def train(run: R, layout: Layout, beat: Heartbeat, start: Starter[R]) -> bool:
    """Take a run through its stages, from where it stands.

    Args:
        run: The run.
        layout: Its processes.
        beat: Their heartbeat.
        start: Builds the session and the stage of where the run stands; None when it has all its steps.

    Returns:
        Whether the run has all its steps; False if SIGTERM ended it early, after a checkpoint was written.
    """
    ahead = True  # once: what later stages read is not opened again at each boundary
    with StopSignal() as stop:  # over all stages: a signal at a boundary stops the next one
        while (started := start(run, layout, beat, ahead)) is not None:
            ahead = False
            with started[0] as session:
                following = session.until
                if following <= session.start_step:
                    raise AssertionError(f"a stage from step {session.start_step} ends at {following}")
                if not fit(*started, stop):
                    return False
            # The engines of this stage go before those of the next are built.
            del started, session
            gc.collect()
            if following == run.steps:
                break
            logger.info("the stage from step %d begins", following)
            # What refuses to write over checkpoints has written this run's own.
            run = replace(run, resume="auto") if run.resume == "never" else run
    return True


class _Loop:
    """Steps from where the session stands to the end, or to the first that must be gone back from."""

    def __init__(self, session: Session, stage: Stage, stop: StopSignal, progress: Progress) -> None:
        self.session, self.stage, self.stop, self.progress = session, stage, stop, progress
        self.data_wait = DataWait(session.run.data)
        #: State of the loader after the last step that was taken; None before the first.
        self.data_state: dict[str, Any] | None = None
        #: Seconds that the save after the step before kept training waiting.
        self.save_blocked_s = 0.0
        run = session.run
        several = run.data.batching.kind != "packed" and len({view.shape for view in session.loader.views}) > 1
        self.accounting = Accounting(run.accounting, session.layout, run.parallel, run.run_dir, several=several)
        self.ledger: Ledger | None = None
        if run.accounting.ledger_every:
            first = session.start_step + 1
            self.ledger = Ledger(
                run.accounting, session.layout, session.loader, run.data, run_dir=run.run_dir, start_step=first
            )

    def __enter__(self) -> _Loop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ledger is not None:
            self.ledger.close()

    def run(self) -> bool:
        session, run = self.session, self.session.run
        batches = iter(session.loader)
        for done in range(session.start_step + 1, session.until + 1):
            began = time.perf_counter()
            session.beat.enter("data", done)
            micro_batches, info = next(batches)
            data_s = time.perf_counter() - began
            try:
                note = None if self.ledger is None else self.ledger.note
                with self.accounting.watching(done, session.until):
                    result = take_step(session, self.stage, micro_batches, info, flags=self._flags, note=note)
            except GuardError:
                self._save_before(done)
                raise
            stopping, pending, failed, *measured = result.flags
            session.saver.settle(pending, failed)
            self.data_state = info.state
            step_s = time.perf_counter() - began
            wait_s = max(result.waits_s)
            self.accounting.add(bucket_of(micro_batches[0]), result.work, step_s, measured, wait_s=wait_s)
            self._log(done, result, info, step_s, data_s)
            saves = every(done, run.checkpoint.every) or done == session.until or bool(stopping)
            self._write_ledger(done, due=saves or every(done, run.accounting.ledger_every))
            if saves:
                session.save(done, info.state)
                self.save_blocked_s = session.saver.blocked_s
            if stopping and done < run.steps:
                session.saver.wait()
                logger.warning(
                    "stopped by SIGTERM after step %d, checkpoint written; run the same command to resume", done
                )
                return False
        session.saver.wait()
        if session.until < run.steps and session.layout.any(self.stop.received):
            logger.warning("stopped by SIGTERM after step %d; run the same command to resume", session.until)
            return False
        return True

    def _flags(self) -> list[float]:
        return [float(self.stop.received), *self.session.saver.pending(), *self.accounting.flags()]

    def _write_ledger(self, done: int, *, due: bool) -> None:
        """Take the losses of a step that was taken into the ledger, and write its row if it is time."""
        if self.ledger is not None:
            self.ledger.commit()
            if due:
                self.ledger.write(done)

    def _log(self, done: int, result: StepResult, info: StepInfo, step_s: float, data_s: float) -> None:
        session, stage = self.session, self.stage
        row: dict[str, Any] = {
            f"loss/{stage.name if name == 'loss' else name}": value for name, value in result.means.items()
        }
        row |= {"optim/grad_norm": result.grad_norm, "optim/lr": result.lr}
        if not math.isnan(result.critic_norm):
            row |= {"optim/critic_grad_norm": result.critic_norm, "optim/critic_lr": result.critic_lr}
        row |= {"time/step_s": step_s, "time/data_s": data_s, "time/save_blocked_s": self.save_blocked_s}
        row |= self.data_wait.add(result.waits_s, step_s)
        row |= info.metrics
        if session.compiled.modules:
            row["perf/compiled_graphs"] = session.compiled.num_graphs()
        if session.guards.num_discarded:
            row["guards/discarded"] = session.guards.num_discarded
        evaluated = _evaluate(session, stage, done)
        row |= evaluated
        if evaluated or result.skipped or every(done, session.run.log_every) or done == session.run.steps:
            row |= self.accounting.row()
            session.tracker.log(done, {**row, "data/keys_hash": info.keys_hash})
        if every(done, session.run.tracking.histograms_every):
            session.log_histograms(done)
        self.save_blocked_s = 0.0
        self.progress.update(1, f"loss {result.means['loss']:.4f}")

    def _save_before(self, step: int) -> None:
        """Keep the steps before one that must not be taken, unless a checkpoint has them."""
        session = self.session
        session.saver.wait()
        path = storage.checkpoint_path(session.run.run_dir, step - 1)
        if self.data_state is not None and not session.layout.broadcast_object(path.is_dir()):
            if self.ledger is not None:
                self.ledger.write(step - 1)
            session.save(step - 1, self.data_state)
            session.saver.wait()


def _evaluate(session: Session, stage: Stage, done: int) -> dict[str, float]:
    """Evaluate what is due after a step; gives the figures and the seconds they took, nothing where nothing is due."""
    began = time.perf_counter()
    calls: list[Callable[[], dict[str, float]]] = [stage.heldout] if _heldout_due(session, done) else []
    calls += [
        functools.partial(evaluator.run, done)
        for evaluator in session.evaluators
        if every(done, evaluator.every) or (evaluator.every and done == session.run.steps)
    ]
    row: dict[str, float] = {}
    for call in calls:
        session.beat.enter("evaluate", done)
        row |= call()
    return row | ({"time/evaluate_s": time.perf_counter() - began} if calls else {})


def _heldout_due(session: Session, done: int) -> bool:
    interval = session.run.evaluation.every
    return (
        interval > 0
        and session.run.evaluation.shards is not None
        and (every(done, interval) or done in (1, session.run.steps))
    )
