"""One optimizer step over the global batch: losses and weights summed, the update, and what is done when it is wrong.

A stage says what a step is (``prepare``, ``terms``); this says how it becomes one update of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.data import MicroBatch, StepInfo
from ltd.parallel import sequence
from ltd.parallel.interface import DiscardedStepError
from ltd.training.guards import GuardError, Incident
from ltd.training.optim import learning_rate
from ltd.training.session import Session


class Stage(Protocol):
    """What one step is."""

    #: Name of the main loss: ``loss/<name>`` in the metrics.
    name: str

    def prepare(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Turn this process's samples into what the model trains on.

        Args:
            batch: This process's part of a micro-batch.

        Returns:
            Tensors with the sample axis first, one of them ``weight`` (b,) and one ``draws`` (b,).
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


class RewindError(RuntimeError):
    """A step that must not be taken while ``rewind`` is the policy: the run goes on from its last checkpoint."""

    def __init__(self, incident: Incident, step: int, keys: list[str]) -> None:
        super().__init__(f"step {step}: {incident.message}")
        self.incident, self.step, self.keys = incident, step, keys


@dataclass
class StepResult:
    """What a step gave, the same on all processes."""

    #: Mean over the global batch by term.
    means: dict[str, float]
    #: Tokens of the global batch.
    tokens: int
    #: Seconds that each process waited for its data.
    waits_s: list[float]
    #: Sums over processes of the flags that the caller gave.
    flags: list[float]
    lr: float
    #: Global norm before clipping; nan where the step was left out before its gradient was known.
    grad_norm: float = math.nan
    #: Why the step was left out, if it was.
    skipped: Incident | None = None


@dataclass
class _Sums:
    """What the backward passes of a step leave behind."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    #: (draws, loss) of each backward pass, on the device; read only when something is wrong.
    losses: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def take_step(
    session: Session,
    stage: Stage,
    micro_batches: Sequence[MicroBatch],
    info: StepInfo,
    *,
    flags: Sequence[float] = (),
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """Run forward and backward over the step's micro-batches, and update weights and averages.

    A loss or gradient that is not finite on any process, or a spike, stops all of them before the update; then
    ``guards`` decides.

    Args:
        session: Processes, engine, averages and guards.
        stage: What one step is.
        micro_batches: This process's part of the global batch.
        info: Keys and bad samples of the step.
        flags: Numbers of this process that are summed on the way, without a collective of their own.
        before_update: Called after the last backward pass, when the engine's gradients are complete.

    Returns:
        What the step gave.

    Raises:
        GuardError: If the step is wrong and the policy is ``stop``; names the samples.
        RewindError: If the step is wrong and the policy is ``rewind``.
    """
    guards = session.guards
    micro_batches = [guards.mask(batch) for batch in micro_batches]
    total_weight, waits_s = _weigh(session, micro_batches, info)
    sums = _backward(session, stage, micro_batches, total_weight, info.step + 1)
    if before_update is not None:
        before_update()
    means, tokens, summed = _reduce(session, sums, 1.0 / max(total_weight, 1.0), flags)
    # A step whose samples all failed changes nothing.
    rate = learning_rate(session.run.optim, info.step, session.run.steps) if tokens else 0.0
    result = StepResult(means, tokens, waits_s, summed, rate)
    session.beat.enter("optimizer", info.step + 1)
    incident = guards.judge(means, "loss")
    if incident is not None:
        session.engine.discard()
    else:
        try:
            result.grad_norm = session.engine.step(rate, limit=guards.gradient_limit())
        except DiscardedStepError as error:
            result.grad_norm = error.norm
            incident = guards.judge_gradient(error.norm)
    if incident is not None:
        result.skipped = incident
        _discard(session, incident, micro_batches, info, sums)
    else:
        session.ema.update(info.step)
        guards.applied(means["loss"], result.grad_norm)
    return result


def _weigh(session: Session, micro_batches: Sequence[MicroBatch], info: StepInfo) -> tuple[float, list[float]]:
    """Sum the samples' weights over all processes; also the seconds that each waited for its data."""
    layout = session.layout
    waits_s = [info.data_s if rank == layout.global_rank else 0.0 for rank in range(layout.world_size)]
    mine = torch.tensor([sum(float(batch.weight.sum()) for batch in micro_batches), float(len(info.bad)), *waits_s])
    total_weight, num_bad, *waits_s = layout.sum_(mine.to(layout.device)).tolist()
    if num_bad:
        _record_bad(session, info)  # raises on all processes if one of them has too many
    return total_weight, waits_s


def _backward(
    session: Session, stage: Stage, micro_batches: Sequence[MicroBatch], total_weight: float, step: int
) -> _Sums:
    layout, sums, scale = session.layout, _Sums(), 1.0 / max(total_weight, 1.0)
    for batch in micro_batches:
        session.beat.enter("forward", step)
        for tensors in sequence.exchange(stage.prepare(batch.to(layout.device)), layout):
            session.beat.enter("forward", step)
            terms = stage.terms(tensors)
            sums.tokens += stage.num_tokens(tensors) if total_weight else 0
            weight = tensors["weight"].float()
            session.beat.enter("backward", step)
            session.engine.backward((terms["loss"] * weight).sum() * scale)
            sums.losses.append((tensors["draws"], terms["loss"].detach()))
            for name, value in terms.items():
                sums.terms[name] = sums.terms.get(name, 0.0) + (value.detach().double() * weight).sum()
    return sums


def _reduce(
    session: Session, sums: _Sums, scale: float, flags: Sequence[float]
) -> tuple[dict[str, float], int, list[float]]:
    layout = session.layout
    packed = torch.stack(list(sums.terms.values()))
    packed = torch.cat([packed, packed.new_tensor([float(sums.tokens), *flags])])
    reduced = layout.sum_(packed)
    num_terms = len(sums.terms)
    # The members of a sequence group each compute the whole group's samples.
    reduced[: num_terms + 1] /= layout.sequence
    reduced[:num_terms] *= scale
    values = reduced.tolist()
    return dict(zip(sums.terms, values, strict=False)), int(values[num_terms]), values[num_terms + 1 :]


def _discard(
    session: Session, incident: Incident, micro_batches: Sequence[MicroBatch], info: StepInfo, sums: _Sums
) -> None:
    """Name the samples at fault and do what the policy says; all processes see the same numbers, so all get here."""
    step = info.step + 1
    keys = _keys_at_fault(session, micro_batches, sums)
    match incident.policy:
        case "rewind":
            session.guards.exclude(keys)
            raise RewindError(incident, step, keys)
        case "skip":
            session.guards.exclude(keys)
            session.record_incident(step, incident, keys)
        case "stop":
            session.record_incident(step, incident, keys)
            shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
            raise GuardError(
                f"step {step}: {incident.message}; stopped before the optimizer step (guards: stop, skip or rewind). "
                f"Samples of the batch: {shown}"
            )


def _keys_at_fault(session: Session, micro_batches: Sequence[MicroBatch], sums: _Sums) -> list[str]:
    """List the samples whose own loss is not finite; all of the batch where no loss says which."""
    mine = {draw: key for batch in micro_batches for draw, key in zip(batch.draws, batch.keys, strict=True)}
    broken = {int(draw) for draws, loss in sums.losses for draw in draws[~torch.isfinite(loss)].tolist()}
    gathered = session.layout.gather_objects((mine, broken))
    keys = {draw: key for known, _ in gathered for draw, key in known.items()}
    at_fault = set().union(*(found for _, found in gathered)) or set(keys)
    return [keys[draw] for draw in sorted(at_fault & set(keys))]


def _record_bad(session: Session, info: StepInfo) -> None:
    """Count bad samples by cause and list them; called on all ranks together."""
    records = [item for part in session.layout.gather_objects(info.bad) for item in part]
    session.tracker.quarantine(info.step + 1, [record.to_dict() for record in records])
    fatal = [text for text in session.layout.gather_objects(info.too_many_bad) if text is not None]
    if fatal:
        raise ConfigError(fatal[0])
