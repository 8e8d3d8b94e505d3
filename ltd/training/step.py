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
from ltd.planning import Workload
from ltd.training.guards import GuardError, Incident
from ltd.training.optim import learning_rate
from ltd.training.session import Session, key_of
from ltd.training.work import Counts, Work


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

    def work(self) -> Work:
        """Count what the last call of ``terms`` amounted to; waits for no device."""
        ...

    def encoder_flops(self) -> float:
        """Count the operations of frozen encoders in all calls of ``prepare`` so far, on this process."""
        ...

    def heldout(self) -> dict[str, float]:
        """Evaluate on held-out data; every rank calls it and gets the same numbers, named ``group/name``."""
        ...

    def begin(self, step: int) -> None:
        """Hear which step comes, counted from 1."""
        ...

    def critic_terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Compute the discriminator's loss of each sample, on what ``terms`` has just made of the same tensors.

        Args:
            tensors: What ``terms`` was given.

        Returns:
            Like ``terms``, under other names but for ``loss``; None in steps without a discriminator, then on all
            processes.
        """
        ...

    def end(self, *, applied: bool) -> None:
        """Hear whether the step was taken; called by all processes, and may make collectives."""
        ...


#: Takes a micro-batch, what it amounted to, and the loss of each of its samples ``(b,)``.
Note = Callable[[MicroBatch, Work, Tensor], None]


class RewindError(RuntimeError):
    """A step that must not be taken while ``rewind`` is the policy: the run goes on from its last checkpoint."""

    def __init__(self, incident: Incident, step: int, ids: list[str]) -> None:
        super().__init__(f"step {step}: {incident.message}")
        self.incident, self.step, self.ids = incident, step, ids


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
    #: What the step amounted to, over all processes.
    work: Workload
    #: Global norm before clipping; nan where the step was left out before its gradient was known.
    grad_norm: float = math.nan
    #: The same of the discriminator; nan in steps without one.
    critic_lr: float = 0.0
    critic_norm: float = math.nan
    #: Why the step was left out, if it was.
    skipped: Incident | None = None


@dataclass
class _Sums:
    """What the backward passes of a step leave behind."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    #: (draws, loss) of each backward pass, the loss on the device; read only when something is wrong.
    losses: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    #: Whether the discriminator had a loss.
    criticized: bool = False


def take_step(
    session: Session,
    stage: Stage,
    micro_batches: Sequence[MicroBatch],
    info: StepInfo,
    *,
    flags: Callable[[], Sequence[float]] = tuple,
    before_update: Callable[[], None] | None = None,
    note: Note | None = None,
) -> StepResult:
    """Run forward and backward over the step's micro-batches, and update weights and averages.

    A loss or gradient that is not finite on any process, or a spike, stops all of them before the update; then
    ``guards`` decides.

    Args:
        session: Processes, engine, averages and guards.
        stage: What one step is.
        micro_batches: This process's part of the global batch.
        info: Keys and bad samples of the step.
        flags: Gives numbers of this process that are summed after the last backward pass, without a collective of
            their own.
        before_update: Called after the last backward pass, when the engine's gradients are complete.
        note: Is given each micro-batch of this process, what it amounted to and the losses of its samples, on the
            device; must not wait for them.

    Returns:
        What the step gave.

    Raises:
        GuardError: If the step is wrong and the policy is ``stop``; names the samples.
        RewindError: If the step is wrong and the policy is ``rewind``.
    """
    guards = session.guards
    stage.begin(info.step + 1)
    micro_batches = [guards.mask(batch) for batch in micro_batches]
    total_weight, waits_s = _weigh(session, micro_batches, info)
    sums = _backward(session, stage, micro_batches, total_weight, info.step + 1, note)
    if before_update is not None:
        before_update()
    means, work, summed = _reduce(session, sums, total_weight, flags())
    tokens = int(work.tokens)
    rate = learning_rate(session.run.optim, info.step, session.run.steps) if tokens else 0.0
    result = StepResult(means, tokens, waits_s, summed, rate, work)
    if session.critic is not None and tokens:
        result.critic_lr = learning_rate(session.critic.optim, info.step, session.run.steps)
    session.beat.enter("optimizer", info.step + 1)
    incident = guards.judge(means, "loss")
    applied = tokens > 0 and incident is None
    if applied:
        incident = _update(session, sums, result)
        applied = incident is None
    else:
        session.engine.discard()
        if session.critic is not None and sums.criticized:
            session.critic.engine.discard()
    stage.end(applied=applied)
    if incident is not None:
        result.skipped = incident
        _discard(session, incident, micro_batches, info, sums)
    elif applied:  # a step whose samples all failed changes nothing
        session.ema.update(info.step)
        guards.applied(means["loss"], result.grad_norm)
    return result


def _update(session: Session, sums: _Sums, result: StepResult) -> Incident | None:
    """Update the discriminator, if it had a loss, and the weights; says why not, if not.

    A gradient of the model that must not be applied leaves the discriminator one step ahead: its own was sound.
    """
    guards, critic = session.guards, session.critic
    try:
        if critic is not None and sums.criticized:
            try:
                result.critic_norm = critic.engine.step(result.critic_lr)
            except DiscardedStepError:
                session.engine.discard()
                raise
        result.grad_norm = session.engine.step(result.lr, limit=guards.gradient_limit())
    except DiscardedStepError as error:
        result.grad_norm = error.norm
        return guards.judge_gradient(error.norm)
    return None


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
    session: Session,
    stage: Stage,
    micro_batches: Sequence[MicroBatch],
    total_weight: float,
    step: int,
    note: Note | None,
) -> _Sums:
    layout, sums, scale = session.layout, _Sums(), 1.0 / max(total_weight, 1.0)
    for batch in micro_batches:
        session.beat.enter("forward", step)
        before = stage.encoder_flops()
        prepared = stage.prepare(batch.to(layout.device))
        sums.counts.add_encoders(stage.encoder_flops() - before)
        for member, tensors in enumerate(sequence.exchange(prepared, layout)):
            session.beat.enter("forward", step)
            terms = stage.terms(tensors)
            work = stage.work()
            sums.counts.add(work)
            if note is not None and member == layout.sequence_rank:
                note(batch, work, terms["loss"].detach())
            weight = tensors["weight"].float()
            session.beat.enter("backward", step)
            session.engine.backward((terms["loss"] * weight).sum() * scale)
            sums.losses.append((tensors["draws"], terms["loss"].detach()))
            terms |= _criticize(session, stage, tensors, sums, scale)
            for name, value in terms.items():
                sums.terms[name] = sums.terms.get(name, 0.0) + (value.detach().double() * weight).sum()
    return sums


def _criticize(
    session: Session, stage: Stage, tensors: dict[str, Tensor], sums: _Sums, scale: float
) -> dict[str, Tensor]:
    """Run the discriminator's backward pass, if there is one in this step; gives its terms."""
    if session.critic is None:
        return {}
    terms = stage.critic_terms(tensors)
    if terms is None:
        return {}
    sums.criticized = True
    session.critic.engine.backward((terms.pop("loss") * tensors["weight"].float()).sum() * scale)
    return terms


def _reduce(
    session: Session, sums: _Sums, total_weight: float, flags: Sequence[float]
) -> tuple[dict[str, float], Workload, list[float]]:
    layout = session.layout
    packed = torch.stack(list(sums.terms.values()))
    counts = sums.counts.packed(packed)
    reduced = layout.sum_(torch.cat([packed, counts, packed.new_tensor(list(flags))]))
    num_terms, num_sums = len(packed), len(packed) + len(counts)
    # The members of a sequence group each compute the whole group's samples.
    reduced[:num_sums] /= layout.sequence
    reduced[:num_terms] *= 1.0 / max(total_weight, 1.0)
    values = reduced.tolist()
    work = sums.counts.workload(values[num_terms:num_sums], total_weight, layout.sequence)
    return dict(zip(sums.terms, values, strict=False)), work, values[num_sums:]


def _discard(
    session: Session, incident: Incident, micro_batches: Sequence[MicroBatch], info: StepInfo, sums: _Sums
) -> None:
    """Name the samples at fault and do what the policy says; all processes see the same numbers, so all get here."""
    step = info.step + 1
    ids = _at_fault(session, micro_batches, sums)
    match incident.policy:
        case "rewind":
            session.guards.exclude(ids)
            raise RewindError(incident, step, ids)
        case "skip":
            session.guards.exclude(ids)
            session.record_incident(step, incident, ids)
        case "stop":
            session.record_incident(step, incident, ids)
            shown = ", ".join(key_of(name) for name in ids[:8]) + (", ..." if len(ids) > 8 else "")
            raise GuardError(
                f"step {step}: {incident.message}; stopped before the optimizer step (guards: stop, skip or rewind). "
                f"Samples of the batch: {shown}"
            )


def _at_fault(session: Session, micro_batches: Sequence[MicroBatch], sums: _Sums) -> list[str]:
    """List the samples whose own loss is not finite; all of the batch where no loss says which."""
    mine = {draw: key for batch in micro_batches for draw, key in zip(batch.draws, batch.ids, strict=True)}
    broken = {int(draw) for draws, loss in sums.losses for draw in draws[~torch.isfinite(loss).cpu()].tolist()}
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
