"""The loop of every stage: it decides when something happens, never what a tensor means.

A stage says what one step is (``prepare``, ``terms``, ``heldout``); the loop fetches batches, sums losses and weights
over the global batch, steps the engine, logs, evaluates, saves, and stops all processes together.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from types import FrameType, TracebackType
from typing import Protocol

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.data import MicroBatch, StepInfo
from ltd.parallel import sequence
from ltd.parallel.interface import NonFiniteError
from ltd.progress import Progress
from ltd.training.data_wait import DataWait
from ltd.training.optim import learning_rate
from ltd.training.run import Session, save_session

logger = logging.getLogger(__name__)


class Stage(Protocol):
    """What one step is."""

    #: Name of the main loss: ``loss/<name>`` in the metrics.
    name: str

    def prepare(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Turn this process's samples into what the model trains on.

        Args:
            batch: This process's part of a micro-batch.

        Returns:
            Tensors with the sample axis first, one of them ``weight`` (b,); of equal shapes on all ranks.
        """
        ...

    def terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of each sample.

        Args:
            tensors: What ``prepare`` made, of one member of the sequence group.

        Returns:
            Per-sample values (b,) in float32: ``loss``, which is differentiated, and any others, which are logged.
        """
        ...

    def num_tokens(self, tensors: dict[str, Tensor]) -> int:
        """Count the tokens (or latent cells) of a micro-batch, for the rate."""
        ...

    def heldout(self) -> dict[str, float]:
        """Evaluate on held-out data; every rank calls it and gets the same numbers, named ``group/name``."""
        ...


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


def fit(session: Session, stage: Stage) -> bool:
    """Train until the run has its steps, logging, evaluating and saving on the way.

    A loss or gradient that is not finite on any process stops all of them before the optimizer step.

    Args:
        session: Run, processes, engine, data and trackers.
        stage: What one step is.

    Returns:
        Whether the run has all its steps; False if SIGTERM ended it early, after a checkpoint was written.
    """
    run, layout = session.run, session.layout
    batches, data_wait = iter(session.loader), DataWait(run.data)
    with (
        StopSignal() as stop,
        Progress(run.steps, stage.name, unit="steps", done=session.start_step, enabled=layout.is_main) as progress,
    ):
        for step in range(session.start_step, run.steps):
            began = time.perf_counter()
            micro_batches, info = next(batches)
            data_s = time.perf_counter() - began
            means, tokens, waits_s, stopping = _accumulate(session, stage, micro_batches, info, stop)
            # A step whose samples all failed changes nothing.
            rate = learning_rate(run.optim, step, run.steps) if tokens else 0.0
            grad_norm = _step(session, rate, micro_batches, info)
            session.ema.update(step)
            done = step + 1
            step_s = time.perf_counter() - began
            row = {f"loss/{stage.name if name == 'loss' else name}": value for name, value in means.items()}
            row |= {"optim/grad_norm": grad_norm, "optim/lr": rate, "time/step_s": step_s, "time/data_s": data_s}
            row |= {"perf/tokens_per_s": tokens / step_s, **data_wait.add(waits_s, step_s), **info.metrics}
            evaluated = _evaluation_due(session, done)
            if evaluated:
                row |= stage.heldout()
            if evaluated or every(done, run.log_every) or done == run.steps:
                session.tracker.log(done, {**row, "data/keys_hash": info.keys_hash})
            progress.update(1, f"loss {means['loss']:.4f}")
            if every(done, run.checkpoint.every) or done == run.steps or stopping:
                save_session(session, done, info.state)
            if stopping and done < run.steps:
                logger.warning(
                    "stopped by SIGTERM after step %d, checkpoint written; run the same command to resume", done
                )
                return False
    return True


def _evaluation_due(session: Session, done: int) -> bool:
    interval = session.run.evaluation.every
    return (
        interval > 0
        and session.run.evaluation.shards is not None
        and (every(done, interval) or done in (1, session.run.steps))
    )


def _accumulate(
    session: Session, stage: Stage, micro_batches: list[MicroBatch], info: StepInfo, stop: StopSignal
) -> tuple[dict[str, float], int, list[float], bool]:
    """Run forward and backward over the step's micro-batches.

    Args:
        session: Processes and engine.
        stage: What one step is.
        micro_batches: This process's part of the global batch.
        info: Keys and bad samples of the step.
        stop: Whether this process was asked to stop.

    Returns:
        Means over the global batch by term, tokens of the global batch, seconds each process waited for its data,
        whether any process was asked to stop.

    Raises:
        NonFiniteError: If a mean is not finite.
    """
    layout = session.layout
    waits_s = [info.data_s if rank == layout.global_rank else 0.0 for rank in range(layout.world_size)]
    mine = torch.tensor([sum(float(batch.weight.sum()) for batch in micro_batches), float(len(info.bad)), *waits_s])
    total_weight, num_bad, *waits_s = layout.sum_(mine.to(layout.device)).tolist()
    if num_bad:
        _record_bad(session, info)  # raises on all processes if one of them has too many
    scale = 1.0 / max(total_weight, 1.0)
    sums: dict[str, Tensor] = {}
    tokens = 0
    for batch in micro_batches:
        for tensors in sequence.exchange(stage.prepare(batch.to(layout.device)), layout):
            terms = stage.terms(tensors)
            tokens += stage.num_tokens(tensors) if total_weight else 0
            weight = tensors["weight"].float()
            session.engine.backward((terms["loss"] * weight).sum() * scale)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + (value.detach().double() * weight).sum()
    packed = torch.stack([*sums.values(), torch.tensor(float(tokens), dtype=torch.float64, device=layout.device)])
    packed = torch.cat([packed, packed.new_tensor([float(stop.received)])])
    reduced = layout.sum_(packed)
    # The members of a sequence group each compute the whole group's samples.
    reduced[:-1] /= layout.sequence
    reduced[: len(sums)] *= scale
    values = reduced.tolist()
    means = dict(zip(sums, values, strict=False))
    for name, value in means.items():
        if not math.isfinite(value):
            raise _non_finite(session, f"loss term {name!r} is {value}", micro_batches, info)
    return means, int(values[-2]), waits_s, values[-1] > 0


def _step(session: Session, rate: float, micro_batches: list[MicroBatch], info: StepInfo) -> float:
    try:
        return session.engine.step(rate)
    except NonFiniteError as error:
        raise _non_finite(session, f"step {info.step + 1}: {error}", micro_batches, info) from None


def _non_finite(session: Session, what: str, micro_batches: list[MicroBatch], info: StepInfo) -> NonFiniteError:
    """Name the samples of the batch; all ranks see the same number, so all get here."""
    mine = [key for batch in micro_batches for key in batch.keys]
    keys = [key for part in session.layout.gather_objects(mine) for key in part]
    session.tracker.quarantine(info.step + 1, [{"cause": "non_finite", "message": what, "keys": keys}])
    shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
    return NonFiniteError(f"{what}; stopped before the optimizer step. Samples of the batch: {shown}")


def _record_bad(session: Session, info: StepInfo) -> None:
    """Count bad samples by cause and list them; called on all ranks together."""
    records = [item for part in session.layout.gather_objects(info.bad) for item in part]
    session.tracker.quarantine(info.step + 1, [record.to_dict() for record in records])
    fatal = [text for text in session.layout.gather_objects(info.too_many_bad) if text is not None]
    if fatal:
        raise ConfigError(fatal[0])
