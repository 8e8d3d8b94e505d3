"""What every training run has in common: its configuration, and its held-out data. Knows no model and no loss."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from ltd.config import ConfigError
from ltd.data import Batch, DataConfig, evaluation_batches
from ltd.data.arrange import arrange
from ltd.data.mixture import MixedSource, open_sources
from ltd.parallel.config import ParallelConfig
from ltd.parallel.ema import EmaConfig
from ltd.parallel.layout import Layout
from ltd.shapes import Compression, num_tokens
from ltd.tracking.tracker import TrackingConfig
from ltd.training.accounting import AccountingConfig
from ltd.training.guards import GuardConfig
from ltd.training.optim import OptimConfig
from ltd.training.stages import StageConfig, check_stages

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay. The last step, and SIGTERM, always write one."""

    #: Steps between checkpoints; 0 writes none but the last.
    every: int = 1000
    #: Newest checkpoints kept; null keeps all.
    keep_last: int | None = 3
    #: Checkpoints of every so many steps are kept for good; null keeps none beside the newest.
    keep_every: int | None = None
    #: Write while training goes on, which then waits for a copy in host memory only; false waits for the disk.
    background: bool = True

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"every: must be at least 0, got {self.every}")
        if self.keep_last is not None and self.keep_last < 1:
            raise ConfigError(f"keep_last: must be at least 1 or null, got {self.keep_last}")
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(f"keep_every: must be at least 1 or null, got {self.keep_every}")


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
    #: ``RUN@STEP``: start from that checkpoint of another run, with all of its state (RUN: from its latest). Once the
    #: run has checkpoints of its own, it goes on from those.
    fork: str | None = None
    #: CPU threads of each process; null leaves PyTorch's choice.
    num_threads: int | None = None
    #: Fields that change at a step; the checkpoint at each boundary is always written.
    stages: tuple[StageConfig, ...] = ()
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    accounting: AccountingConfig = field(default_factory=AccountingConfig)

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
        if self.optim.cooldown_from is not None and self.optim.cooldown_from >= self.steps:
            raise ConfigError(
                f"optim.cooldown_from: got {self.optim.cooldown_from}, needed less than steps = {self.steps}"
            )
        check_stages(self, self.stages, self.steps)


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


def named_shards(run: RunConfig) -> dict[str, str | tuple[str, ...]]:
    """List the data that a run trains on, and then those held out, by the field that names them."""
    named = {f"data.datasets[{number}].shards": each.shards for number, each in enumerate(run.data.datasets)}
    named |= {} if run.data.datasets or run.data.shards is None else {"data.shards": run.data.shards}
    return named | ({} if run.evaluation.shards is None else {"evaluation.shards": run.evaluation.shards})


def check_heldout(run: RunConfig, layout: Layout) -> None:
    """Open the held-out data before the first step, so that no run ends at its first evaluation.

    Args:
        run: The run; one that evaluates nothing is not looked at.
        layout: Its processes; the main one looks.

    Raises:
        ConfigError: If ``evaluation.shards`` holds nothing that fits the views of ``data``; on all processes.
    """
    if not run.evaluation.every or run.evaluation.shards is None:
        return

    def look() -> None:
        open_heldout(run)

    layout.decide(look)


def open_heldout(run: RunConfig) -> MixedSource:
    """Open the held-out data.

    Args:
        run: The run, whose ``evaluation.shards`` is set.

    Returns:
        The samples; some view of ``data`` has one of them.

    Raises:
        ConfigError: If there is none; names ``evaluation.shards``.
    """
    data = _heldout_data(run)
    try:
        source = open_sources(data)
        arrange(data, source, fill=False)
    except ConfigError as error:
        message = str(error).replace("data.shards", "evaluation.shards")
        named = message.startswith("evaluation.shards")
        raise ConfigError(message if named else f"evaluation.shards: {message}") from None
    return source


def heldout_batches(run: RunConfig, layout: Layout) -> Iterator[Batch]:
    """Pass once over the held-out data; all processes get the same number of batches of the same shapes.

    Args:
        run: The run; ``evaluation`` and the views of ``data`` are read.
        layout: This process's position.

    Returns:
        Batches on the CPU.
    """
    return evaluation_batches(
        _heldout_data(run),
        batch_size=run.evaluation.batch_size,
        global_rank=layout.global_rank,
        world_size=layout.world_size,
        windows_per_clip=run.evaluation.windows_per_clip,
    )


def _heldout_data(run: RunConfig) -> DataConfig:
    return dataclasses.replace(run.data, shards=run.evaluation.shards, datasets=(), read_features=False)
