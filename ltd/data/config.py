"""The data section of a run: where the samples are and how they become batches. Opens nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ltd.config import ConfigError
from ltd.data.batching import BatchingConfig, FixedConfig
from ltd.data.plan import ViewConfig
from ltd.data.store import StoreConfig


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One of several data sets that are mixed."""

    shards: str | tuple[str, ...]  #: Tars: paths, URLs, directories, globs or brace patterns; or a latent cache.
    weight: float = 1.0  #: Share of the samples drawn from it, relative to the other data sets, > 0.
    name: str | None = None  #: Name in the metrics; null numbers it.

    def __post_init__(self) -> None:
        if not self.shards:
            raise ConfigError("data.datasets: shards: got nothing, needed tars or a latent cache")
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"data.datasets: weight: got {self.weight}, needed a positive number")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples are and how they become batches."""

    #: Tars: path, URL, directory, glob or brace pattern; or a latent cache.
    shards: str | tuple[str, ...] | None = None
    datasets: tuple[DatasetConfig, ...] = ()  #: Instead of ``shards``: several data sets, mixed by weight.
    #: ``epochs``: every sample once, then all again in another order; ``replacement``: independent draws, without end.
    mode: Literal["epochs", "replacement"] = "epochs"
    open_shards: int = 32  #: Shards read side by side; more mix a batch better, fewer need a smaller node cache. >= 1.
    global_batch: int = 8  #: Samples per optimizer step over all processes and accumulation, >= 1; for fixed batching.
    views: tuple[ViewConfig, ...] = (
        ViewConfig(num_frames=1, height=256, width=256),
    )  #: What samples are cut to; fixed.
    batching: BatchingConfig = field(default_factory=FixedConfig)  #: One size per step, buckets, or packs.
    licence: str | None = None  #: Licence of the data, for the card of what is exported; null = not recorded.
    caption_required: bool = True  #: Whether samples without a caption are left out.
    #: Names of the classes by number: a file with one name per line, or the names. Null: what the samples say.
    classes: str | tuple[str, ...] | None = None
    flip: bool = False  #: Whether half of the samples are mirrored (media only; a cache holds its own copies).
    read_features: bool = False  #: Whether a cache's features of a vision network are read too; ``alignment`` needs it.
    decoder: Literal["decord", "pyav"] | None = None  #: Video decoder; null takes decord, or PyAV without decord.
    store: StoreConfig = field(default_factory=StoreConfig)  #: How remote shards are read and kept.
    num_workers: int = 0  #: Threads that load ahead, >= 0; 0 loads each step when it is asked for.
    prefetch: int = 2  #: Steps that the threads load ahead, >= 1.
    prefetch_mb: int = 512  #: Bytes of media, pixels or latents loaded ahead take at most this many MiB, >= 1.
    timeout_s: float = 120.0  #: Seconds one sample may take to load, > 0; then it counts as bad.
    max_bad_fraction: float = 0.05  #: Share of bad samples among the last ``bad_window`` that stops training, [0, 1].
    bad_window: int = 1000  #: Samples of this process that ``max_bad_fraction`` looks back over, >= 1.

    def __post_init__(self) -> None:
        for name, low in (
            ("open_shards", 1),
            ("global_batch", 1),
            ("num_workers", 0),
            ("prefetch", 1),
            ("prefetch_mb", 1),
            ("bad_window", 1),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"data.{name}: got {getattr(self, name)}, needed an integer of {low} or more")
        if not self.timeout_s > 0:
            raise ConfigError(f"data.timeout_s: got {self.timeout_s}, needed more than 0 seconds")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction: got {self.max_bad_fraction}, needed a share in [0, 1]")
        if not self.views:
            raise ConfigError("data.views: got none, needed at least one view")
        if self.shards and self.datasets:
            raise ConfigError("data.datasets: got data.shards too; give one of them")
        names = [dataset.name for dataset in self.datasets if dataset.name is not None]
        if len(set(names)) < len(names):
            raise ConfigError(f"data.datasets: got the same name twice among {', '.join(names)}")

    @property
    def sets(self) -> tuple[DatasetConfig, ...]:
        """The data sets; one of weight 1 where ``shards`` is given; none where nothing is."""
        return self.datasets or ((DatasetConfig(shards=self.shards),) if self.shards else ())


def micro_batch(units: int, *, world_size: int, accumulation: int, name: str = "data.global_batch") -> int:
    """Divide the global batch.

    Args:
        units: Samples (or packs) per step.
        world_size: Processes.
        accumulation: Micro-batches per step and process.
        name: Field that sets ``units``, for the message.

    Returns:
        Units per micro-batch.

    Raises:
        ConfigError: If it does not divide; gives the numbers and the nearest global batches.
    """
    parts = world_size * accumulation
    if units % parts:
        lower = units // parts * parts
        nearest = f"{lower} or {lower + parts}" if lower else f"{parts}"
        raise ConfigError(
            f"{name}: got {units}, needed a multiple of {parts} = {world_size} processes "
            f"(world size) x {accumulation} (parallel.accumulation); the nearest: {nearest}"
        )
    return units // parts
