"""A run under way: where it starts, what it builds, what it says at start, what it saves, how it goes back.

The order of building: module (without values, on the meta device, where a checkpoint brings them), activation
checkpointing, sequence sharding (these by the stage), compilation, engine, averages, checkpoint. Knows no model and no
loss; a stage brings those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from ltd import config as config_io
from ltd import storage
from ltd.data import Loader, build_loader
from ltd.parallel import checkpoint as checkpoints
from ltd.parallel import preflight
from ltd.parallel.checkpoint import Saver
from ltd.parallel.compilation import Compiled, compile_blocks
from ltd.parallel.ema import Ema
from ltd.parallel.engine import build_engine
from ltd.parallel.heartbeat import Heartbeat, open_watched
from ltd.parallel.histograms import bin_edges, shard_histograms
from ltd.parallel.interface import Engine
from ltd.parallel.layout import Layout
from ltd.rng import derive_seed
from ltd.tracking.histogram import Histogram
from ltd.tracking.tracker import Tracker
from ltd.training.fork import inherited_counts
from ltd.training.guards import GuardError, Guards, Incident
from ltd.training.later_stages import Need, check_later_stages
from ltd.training.optim import OptimConfig, learning_rate
from ltd.training.run import RunConfig, check_heldout
from ltd.training.start import Start

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Critic:
    """A discriminator that is trained beside the model, on an engine of its own."""

    engine: Engine
    optim: OptimConfig


class Evaluator(Protocol):
    """Evaluates a run on a schedule; the loop calls it on all processes."""

    @property
    def every(self) -> int:
        """Steps between evaluations, and at the last step; 0 is never."""
        ...

    def run(self, step: int) -> dict[str, float]:
        """Evaluate after ``step`` steps; returns metrics, the same on all processes."""
        ...


@dataclass
class Session:
    """Everything a loop needs besides the stage."""

    #: What holds in this stage of the run.
    run: RunConfig
    #: The whole run, with its stages.
    base: RunConfig
    #: Steps done at the end of the stage.
    until: int
    layout: Layout
    beat: Heartbeat
    compiled: Compiled
    engine: Engine
    ema: Ema
    saver: Saver
    guards: Guards
    loader: Loader
    tracker: Tracker
    #: Optimizer steps done before the loader's next batch.
    start_step: int
    #: What the model depends on besides its weights (hashes, statistics), as the checkpoint has it; saved with each.
    lineage: dict[str, Any]
    #: Checkpoints of other runs that it started from, oldest first; saved with each.
    ancestors: list[dict[str, Any]] = field(default_factory=list)
    #: The checkpoint that a fork began from; None for other runs.
    origin: Path | None = None
    critic: Critic | None = None
    #: What is evaluated on schedules of its own, besides the stage's held-out loss.
    evaluators: list[Evaluator] = field(default_factory=list)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.saver.close()
        self.loader.close()
        self.tracker.finish()

    def save(self, step: int, data_state: dict[str, Any]) -> None:
        """Begin to save a checkpoint after ``step`` optimizer steps; every rank calls this.

        Args:
            step: Optimizer steps done.
            data_state: State of the loader after that step.
        """
        self.beat.enter("save", step)
        extra = {
            "data": data_state,
            "tracker": self.tracker.state(),
            "guards": self.guards.state(),
            "config": config_io.to_dict(self.base),
            "lineage": self.lineage,
            "ancestors": self.ancestors,
        }
        self.saver.save(step, extra)

    def log_histograms(self, step: int) -> None:
        """Log histograms of the weights, and of Adam's first moment, after a step; called by all processes."""
        kinds = ("master", "exp_avg") if self.run.optim.kind == "adamw" else ("master",)
        counts = shard_histograms(self.engine, self.layout, kinds)
        edges = bin_edges()
        self.tracker.log_histograms(step, {f"histogram/{name}": Histogram(edges, row) for name, row in counts.items()})

    def record_incident(self, step: int, incident: Incident, ids: list[str], **details: Any) -> None:
        """List the samples of a step that was not taken in the quarantine file, under the row of ``step``."""
        record: dict[str, Any] = {"cause": incident.cause, "message": incident.message, "policy": incident.policy}
        record |= {"keys": [key_of(name) for name in ids], "shards": [self._shard_of(name) for name in ids]}
        self.tracker.quarantine(step, [record | details])
        logger.warning("step %d: %s; policy %s, %d samples", step, incident.message, incident.policy, len(ids))

    def rewind(self, incident: Incident, step: int, ids: list[str]) -> None:
        """Go back to the last checkpoint; what the guards exclude stays excluded. Called by all processes.

        Args:
            incident: Why.
            step: Step that was not taken.
            ids: Samples at fault.

        Raises:
            GuardError: If there is no checkpoint yet.
        """
        self.beat.enter("save", step)
        self.saver.wait()
        found = self.layout.broadcast_object(storage.latest_checkpoint(self.run.run_dir) or self.origin)
        if found is None:
            raise GuardError(
                f"step {step}: {incident.message}; guards say rewind, but there is no checkpoint to go back to yet; "
                f"lower checkpoint.every. Samples: {', '.join(key_of(name) for name in ids[:8])}"
            )
        self.loader.close()
        self.tracker.finish()
        critic = None if self.critic is None else self.critic.engine
        manifest = checkpoints.load(found, self.engine, self.ema, self.layout, critic=critic)
        self.guards.restore(manifest.get("guards", {}))
        self.start_step = int(manifest["step"])
        self.loader = _build_loader(self.run, self.layout, manifest)
        state = manifest.get("tracker")
        if found == self.origin:
            state = inherited_counts(state) | {"wandb_id": self.tracker.state()["wandb_id"]}
        self.tracker = _build_tracker(self.run, self.layout, self.start_step, state, self.ancestors)
        # Under the last step that stays: rows behind it are written anew, here and at a later rewind.
        message = f"step {step}: {incident.message}; went back to step {self.start_step}"
        self.record_incident(self.start_step, replace(incident, message=message), ids, to=self.start_step)

    def _shard_of(self, name: str) -> str:
        entry = name.partition(":")[0]
        return self.loader.source.shard_of(int(entry)) if entry.isdigit() else ""


def key_of(name: str) -> str:
    """Take the key out of a sample's id (``Batch.ids``)."""
    entry, _, key = name.partition(":")
    return key if entry.isdigit() else name


def open_layout(run: RunConfig) -> AbstractContextManager[tuple[Layout, Heartbeat]]:
    """Join the process group of a run and watch over it; see ``open_watched``."""
    return open_watched(run.parallel)


def start_session(
    start: Start,
    layout: Layout,
    beat: Heartbeat,
    build_module: Callable[[bool], nn.Module],
    critic: tuple[Callable[[], nn.Module], OptimConfig] | None = None,
    accept: Callable[[dict[str, Any]], None] | None = None,
    *,
    needs: Callable[[Any], Iterator[Need]] | None,
) -> Session:
    """Write the configuration, build the module, engine, EMA and loader, and restore them from a checkpoint.

    Args:
        start: Where it begins; the ``data.shards`` of its run are set.
        layout: Processes of the run.
        beat: Their heartbeat.
        build_module: Makes the module; told whether its values count (no checkpoint replaces them).
        critic: Makes a discriminator that is trained beside the module; and its optimiser.
        accept: Is given the lineage of the checkpoint, before anything of the run is replaced, and may refuse it.
        needs: Lists what a stage of the run reads besides its samples, for ``check_later_stages``; None looks at none.

    Returns:
        The session.

    Raises:
        ConfigError: If the checkpoint is of another model, ``evaluation.shards`` holds nothing usable, or what a later
            stage reads is missing or does not fit.
    """
    run = start.run
    beat.enter("start", 0)
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    check_heldout(run, layout)
    if accept is not None:
        accept(start.manifest.get("lineage", {}))
    if run.evaluation.every and run.evaluation.shards is None:
        logger.warning("evaluation.shards is null: nothing is evaluated in training")
    if start.checkpoint is None:  # a run that goes on replaces its configuration only once its checkpoint is accepted
        _save_config(start.base, layout)
    loader = _build_loader(run, layout, start.manifest)
    _preflight(run, layout, loader)
    if needs is not None:
        check_later_stages(start, layout, needs, beat.again)
    torch.manual_seed(derive_seed(run.seed, "initialization"))
    module = build_module(start.checkpoint is None)
    compiled = compile_blocks(module, run.parallel)
    if compiled.modules:
        logger.info("compiled with torch.compile at their first call: %s", ", ".join(compiled.modules))
    _announce(run, layout, module, loader)
    engine = _build_engine(run, layout, module, run.optim)
    ema = Ema(engine, run.ema)
    beside = None if critic is None else _build_critic(run, layout, *critic)
    if start.checkpoint is not None:
        _restore(start, start.checkpoint, layout, engine, ema, beside)
    if layout.is_main and run.parallel.engine == "deepspeed":
        storage.write_json(Path(run.run_dir) / "deepspeed.json", engine.resolved_config())
    return Session(
        run=run,
        base=start.base,
        until=start.until,
        layout=layout,
        beat=beat,
        compiled=compiled,
        engine=engine,
        ema=ema,
        saver=_build_saver(run, layout, engine, ema, beside),
        guards=Guards(run.guards, start.manifest.get("guards") if start.own or start.forked else None),
        loader=loader,
        tracker=_build_tracker(run, layout, start.step, _tracker_state(start), start.ancestors),
        start_step=start.step,
        lineage=dict(start.manifest.get("lineage", {})),
        ancestors=start.ancestors,
        origin=start.checkpoint if start.forked else None,
        critic=beside,
    )


def _restore(
    start: Start[Any], checkpoint: Path, layout: Layout, engine: Engine, ema: Ema, critic: Critic | None
) -> None:
    """Load the checkpoint, and then let the run directory say what now holds."""
    field = "fork" if start.forked else "resume"
    beside = None if critic is None else critic.engine
    checkpoints.load(checkpoint, engine, ema, layout, critic=beside, field=field)
    run_dir = Path(start.base.run_dir)
    if start.own and layout.is_main:
        storage.set_aside_newer(run_dir, checkpoint)
    if start.ancestors and layout.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        storage.write_json(run_dir / storage.LINEAGE, {"ancestors": start.ancestors})
    _save_config(start.base, layout)


def _build_critic(run: RunConfig, layout: Layout, build: Callable[[], nn.Module], optim: OptimConfig) -> Critic:
    torch.manual_seed(derive_seed(run.seed, "discriminator"))
    module = build()
    count = sum(p.numel() for p in module.parameters()) / 1e6
    logger.info("%s: %.2fM trained parameters beside the model", type(module).__name__, count)
    return Critic(_build_engine(run, layout, module, optim), optim)


def _build_engine(run: RunConfig, layout: Layout, module: nn.Module, optim: OptimConfig) -> Engine:
    return build_engine(
        module,
        config=run.parallel,
        optim=optim.settings(),
        layout=layout,
        num_backwards=run.parallel.accumulation * run.parallel.sequence,
    )


def _save_config(run: RunConfig, layout: Layout) -> None:
    if layout.is_main:
        config_io.save(run, Path(run.run_dir) / "config.yaml")
    layout.barrier()


def _build_loader(run: RunConfig, layout: Layout, manifest: dict[str, Any]) -> Loader:
    return build_loader(
        run.data,
        seed=run.seed,
        global_rank=layout.global_rank,
        world_size=layout.world_size,
        accumulation=run.parallel.accumulation,
        state=manifest.get("data"),
    )


def _build_saver(run: RunConfig, layout: Layout, engine: Engine, ema: Ema, critic: Critic | None) -> Saver:
    keep = run.checkpoint
    return Saver(
        run.run_dir,
        engine,
        ema,
        layout,
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        background=keep.background,
        critic=None if critic is None else critic.engine,
    )


def _tracker_state(start: Start[Any]) -> dict[str, Any] | None:
    state = start.manifest.get("tracker")
    return inherited_counts(state) if start.forked else state if start.own else None


def _build_tracker(
    run: RunConfig, layout: Layout, start_step: int, state: dict[str, Any] | None, ancestors: list[dict[str, Any]]
) -> Tracker:
    return Tracker(
        run.run_dir,
        run.tracking,
        is_main=layout.is_main,
        run_config={**config_io.to_dict(run), "ancestors": ancestors},
        start_step=start_step + 1,
        state=state,
    )


def _preflight(run: RunConfig, layout: Layout, loader: Loader) -> None:
    """Compare what all processes must agree on, and measure their hosts."""
    if not run.parallel.preflight or layout.world_size == 1:
        return
    digests = {
        "configuration": config_io.digest(config_io.to_dict(run)),
        "shard list": loader.state["plan"],
    }
    found = preflight.check(layout, digests, storage_dir=Path(run.run_dir))
    logger.info("%s", ", ".join(f"{name} {value:.3g}" for name, value in found.items()))


def _announce(run: RunConfig, layout: Layout, module: nn.Module, loader: Loader) -> None:
    """Say in words what the numbers of the configuration amount to."""
    if not layout.is_main:
        return
    parallel, optim = run.parallel, run.optim
    counts = [sum(p.numel() for p in module.parameters() if p.requires_grad is trained) for trained in (True, False)]
    frozen = f", {counts[1] / 1e6:.2f}M frozen" if counts[1] else ""
    logger.info("%s: %.2fM trained parameters%s", type(module).__name__, counts[0] / 1e6, frozen)
    engine = f"deepspeed, ZeRO {parallel.zero}" if parallel.engine == "deepspeed" else "torch"
    for units in sorted({kind.units for kind in loader.plan.kinds}):
        logger.info(
            "global batch %d %s = %d per process x %d processes x %d accumulation; sequence groups of %d; %s, %s",
            units,
            "packs" if run.data.batching.kind == "packed" else "samples",
            units // (layout.world_size * parallel.accumulation),
            layout.world_size,
            parallel.accumulation,
            parallel.sequence,
            engine,
            parallel.precision,
        )
    if parallel.precision == "bf16" and layout.device.type == "cpu" and not preflight.has_fast_bf16():
        logger.warning(
            "parallel.precision: bf16, for which this processor has no instructions: products take many times as long "
            "as in fp32; set it to fp32"
        )
    for dataset, (units_seen, epochs) in zip(run.data.sets, loader.plan.progress(run.steps), strict=True):
        what = "epochs" if run.data.mode == "epochs" else "times its size, with replacement,"
        logger.info("%d steps see %.4g %s of %s (%d units)", run.steps, epochs, what, dataset.shards, units_seen)
    last = learning_rate(optim, run.steps - 1, run.steps)
    logger.info(
        "learning rate: %d warm-up steps to %.3g (never scaled by batch or world), %s to %.3g",
        optim.warmup_steps,
        optim.lr,
        optim.schedule,
        last,
    )
