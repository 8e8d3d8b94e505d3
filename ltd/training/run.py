"""What every training run has in common: its configuration, its directory, where it resumes, what it says at start.

Knows no model and no loss; a stage brings those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ltd import config as config_io
from ltd.config import ConfigError
from ltd.data import Batch, DataConfig, Loader, build_loader, evaluation_batches
from ltd.parallel import checkpoint as checkpoints
from ltd.parallel.config import ParallelConfig
from ltd.parallel.ema import Ema, EmaConfig
from ltd.parallel.engine import build_engine
from ltd.parallel.interface import Engine
from ltd.parallel.layout import Layout
from ltd.rng import derive_seed
from ltd.shapes import Compression, num_tokens
from ltd.storage import StorageError, read_manifest, verify, write_json
from ltd.tracking.tracker import Tracker, TrackingConfig
from ltd.training.optim import OptimConfig, learning_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay. The last step, and SIGTERM, always write one."""

    #: Steps between checkpoints; 0 writes none but the last.
    every: int = 1000
    #: Newest checkpoints kept; null keeps all.
    keep_last: int | None = 3

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"every: must be at least 0, got {self.every}")
        if self.keep_last is not None and self.keep_last < 1:
            raise ConfigError(f"keep_last: must be at least 1 or null, got {self.keep_last}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss in training."""

    #: Steps between evaluations; 0 is never, else the first and the last step are evaluated too.
    every: int = 0
    #: Held-out shards or latent cache, written like ``data.shards``; null evaluates nothing, with a warning.
    shards: str | tuple[str, ...] | None = None
    #: Samples per process and forward pass.
    batch_size: int = 8
    #: Windows of each held-out clip (media only; a cache's windows are taken as they are).
    windows_per_clip: int = 1

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"every: must be at least 0, got {self.every}")
        for name in ("batch_size", "windows_per_clip"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fields that every training run has."""

    #: Directory of the run: configuration, metrics, checkpoints.
    run_dir: str
    #: Optimizer steps of the whole run.
    steps: int
    #: Seed of initialisation, data order and every sample's random numbers.
    seed: int = 0
    #: ``auto`` goes on from the latest checkpoint of ``run_dir`` if there is one; ``never`` refuses to write over one;
    #: a path (a run or checkpoint) is where a run without checkpoints of its own starts from.
    resume: str = "auto"
    #: Steps between rows of ``metrics.jsonl``.
    log_every: int = 1
    #: CPU threads of each process; null leaves PyTorch's choice.
    num_threads: int | None = None
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed: must be at least 0, got {self.seed}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads: must be at least 1 or null, got {self.num_threads}")
        if not self.run_dir:
            raise ConfigError("run_dir: is empty, needed a directory")


@dataclass
class Session:
    """Everything a loop needs besides the stage."""

    run: RunConfig
    layout: Layout
    engine: Engine
    ema: Ema
    loader: Loader
    tracker: Tracker
    #: Optimizer steps done before this process started.
    start_step: int
    #: What the model depends on besides its weights (hashes, statistics), as the checkpoint has it; saved with each.
    lineage: dict[str, Any]

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loader.close()
        self.tracker.finish()


@contextlib.contextmanager
def open_layout(run: RunConfig) -> Iterator[Layout]:
    """Join the process group; only the main process keeps logging what is not an error.

    Args:
        run: Configuration of the run.

    Yields:
        The layout, closed at the end.
    """
    layout = Layout.from_environment(run.parallel)
    if not layout.is_main:
        logging.getLogger("ltd").setLevel(logging.ERROR)
    try:
        yield layout
    finally:
        layout.close()


def start_session(run: RunConfig, layout: Layout, build_module: Callable[[bool], nn.Module]) -> Session | None:
    """Write the configuration, build the module, engine, EMA and loader, and restore them from a checkpoint.

    Args:
        run: Configuration of the run; its ``data.shards`` are set.
        layout: Processes of the run.
        build_module: Makes the module on the CPU; told whether its values count (no checkpoint replaces them).

    Returns:
        The session, or None when the run had already done its steps.

    Raises:
        ConfigError: If the checkpoint is of another model, or ``resume`` names none.
    """
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    start = _find_start(run)
    if start is None:
        return None
    if run.evaluation.every and run.evaluation.shards is None:
        logger.warning("evaluation.shards is null: nothing is evaluated in training")
    if start.checkpoint is None:  # a run that goes on replaces its configuration only once its checkpoint is accepted
        _save_config(run, layout)
    else:
        _verify(start.checkpoint, layout)
    loader = build_loader(
        run.data,
        seed=run.seed,
        global_rank=layout.global_rank,
        world_size=layout.world_size,
        accumulation=run.parallel.accumulation,
        state=start.manifest.get("data"),
    )
    torch.manual_seed(derive_seed(run.seed, "initialization"))
    module = build_module(start.checkpoint is None)
    _announce(run, layout, module, loader)
    engine = build_engine(
        module,
        config=run.parallel,
        optim=run.optim.settings(),
        layout=layout,
        num_backwards=run.parallel.accumulation * run.parallel.sequence,
    )
    ema = Ema(engine, run.ema)
    if start.checkpoint is not None:
        checkpoints.load(start.checkpoint, engine, ema)
        _save_config(run, layout)
    if layout.is_main and run.parallel.engine == "deepspeed":
        write_json(Path(run.run_dir) / "deepspeed.json", engine.resolved_config())
    tracker = Tracker(
        run.run_dir,
        run.tracking,
        is_main=layout.is_main,
        run_config=config_io.to_dict(run),
        start_step=start.step + 1,
        state=start.manifest.get("tracker") if start.own else None,
    )
    return Session(run, layout, engine, ema, loader, tracker, start.step, dict(start.manifest.get("lineage", {})))


@dataclass(frozen=True)
class _Start:
    """Where a run starts: nowhere, at its own latest checkpoint, or at another run's."""

    checkpoint: Path | None
    manifest: dict[str, Any]
    own: bool

    @property
    def step(self) -> int:
        return int(self.manifest.get("step", 0))


def _find_start(run: RunConfig) -> _Start | None:
    """Find the checkpoint to start from; None when the run has all its steps already."""
    run_dir = Path(run.run_dir)
    found = checkpoints.resolve(run.resume, run_dir)
    own = found is not None and found.parent.parent.resolve() == run_dir.resolve()
    start = _Start(found, read_manifest(found) if found else {}, own)
    before, now = start.manifest.get("config", {}).get("kind"), getattr(run, "kind", None)
    if found and before != now:
        raise ConfigError(f"run_dir: {found} is a checkpoint of kind {before!r}, this run is of kind {now!r}")
    if found and start.step >= run.steps:
        if not own:
            raise ConfigError(
                f"steps: got {run.steps}, but resume = {run.resume} has {start.step} already; raise steps"
            )
        logger.info("%s already has its %d steps; nothing to train (raise steps to go on)", run_dir, run.steps)
        return None
    _announce_resume(found, start.manifest, run)
    return start


def _save_config(run: RunConfig, layout: Layout) -> None:
    if layout.is_main:
        config_io.save(run, Path(run.run_dir) / "config.yaml")
    layout.barrier()


def _verify(checkpoint: Path, layout: Layout) -> None:
    """Check the checkpoint's checksums on the main process; all processes refuse a damaged one."""
    problem = None
    if layout.is_main:
        try:
            verify(checkpoint)
        except StorageError as error:
            problem = str(error)
    problem = layout.broadcast_object(problem)
    if problem is not None:
        raise StorageError(f"{problem}; give resume=PATH of an older checkpoint, or delete this one")


def check_views(data: DataConfig, compression: Compression, patch: tuple[int, int, int] = (1, 1, 1)) -> None:
    """Refuse sizes that an autoencoder cannot compress or a denoiser cannot cut into tokens.

    Args:
        data: The data section.
        compression: The autoencoder's.
        patch: Latent cells per token of the denoiser.

    Raises:
        ConfigError: If a size does not divide; names the view and the nearest sizes.
    """
    if data.batching.kind == "fixed":
        for number, view in enumerate(data.views):
            try:
                num_tokens(compression.latent(view.shape), patch)
            except ValueError as error:
                raise ConfigError(f"data.views[{number}]: {error}") from None
        return
    token = data.batching.token
    needed = (compression.t * patch[0], compression.h * patch[1], compression.w * patch[2])
    if patch[0] != 1 or any(size % unit for size, unit in zip(token, needed, strict=True)):
        raise ConfigError(
            f"data.batching.token: got {list(token)}, needed multiples of {list(needed)} = pixels per latent cell "
            f"{[compression.t, compression.h, compression.w]} x model.patch {list(patch)}, with patch[0] = 1"
        )


def heldout_batches(run: RunConfig, layout: Layout) -> Iterator[Batch]:
    """Pass once over the held-out data; all processes get the same number of batches of the same shapes.

    Args:
        run: The run; ``evaluation`` and the views of ``data`` are read.
        layout: This process's position.

    Returns:
        Batches on the CPU.
    """
    return evaluation_batches(
        dataclasses.replace(run.data, shards=run.evaluation.shards, datasets=()),
        batch_size=run.evaluation.batch_size,
        global_rank=layout.global_rank,
        world_size=layout.world_size,
        windows_per_clip=run.evaluation.windows_per_clip,
    )


def save_session(session: Session, step: int, data_state: dict[str, Any]) -> None:
    """Save a checkpoint after ``step`` optimizer steps; every rank calls this.

    Args:
        session: The session.
        step: Optimizer steps done.
        data_state: State of the loader after that step.
    """
    extra = {
        "data": data_state,
        "tracker": session.tracker.state(),
        "config": config_io.to_dict(session.run),
        "lineage": session.lineage,
    }
    checkpoints.save(
        session.run.run_dir,
        step,
        engine=session.engine,
        ema=session.ema,
        extra=extra,
        layout=session.layout,
        keep_last=session.run.checkpoint.keep_last,
    )


def _announce_resume(found: Path | None, manifest: dict[str, Any], run: RunConfig) -> None:
    if found is None:
        logger.info("starting anew in %s", run.run_dir)
        return
    logger.info("resuming from %s at step %d", found, manifest["step"])
    before, now = _flat(manifest["config"]), _flat(config_io.to_dict(run))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key != "resume":
            logger.warning("%s was %r in the checkpoint and is %r now", key, before.get(key), now.get(key))


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {key: value for name, item in tree.items() for key, value in _flat(item, f"{path}.{name}").items()}
    return {path.removeprefix("."): tree}


def _announce(run: RunConfig, layout: Layout, module: nn.Module, loader: Loader) -> None:
    """Say in words what the numbers of the configuration amount to."""
    if not layout.is_main:
        return
    parallel, optim = run.parallel, run.optim
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    logger.info("%s: %.2fM trained parameters", type(module).__name__, trained / 1e6)
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
