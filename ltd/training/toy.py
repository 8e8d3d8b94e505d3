"""Synthetic data for a first look: a run without shards of its own makes a few tiny ones in its directory."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ltd.config import ConfigError
from ltd.data.synthetic import make_toy_shards
from ltd.parallel.layout import Layout
from ltd.training.run import RunConfig

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=RunConfig)


@dataclass(frozen=True, kw_only=True)
class ToyDataConfig:
    """Moving shapes with captions, made from the run's seed when ``data.shards`` is null."""

    #: Training clips and as many stills.
    num_samples: int = 64
    #: Held-out clips and as many stills.
    num_heldout: int = 16
    #: Frames of each clip.
    num_frames: int = 9
    #: Side of the square frames, in pixels.
    size: int = 32

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_heldout", "num_frames", "size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")


def with_data(run: R, toy: ToyDataConfig | None, layout: Layout) -> R:
    """Fill in the shards of a run that names none.

    Args:
        run: Configuration; returned as it is when it names shards.
        toy: What to make otherwise.
        layout: Processes; the main one writes.

    Returns:
        The run with ``data.shards`` (and ``evaluation.shards``, unless it names some) set.

    Raises:
        ConfigError: If there are neither shards nor toy data to make.
    """
    if run.data.sets:
        return run
    if toy is None:
        raise ConfigError("data.shards: is null, needed a folder, glob or list of tars (see tools/make_shards.py)")
    folder = Path(run.run_dir) / "toy_data"
    for split, count, offset in (("train", toy.num_samples, 0), ("heldout", toy.num_heldout, 1)):
        if layout.is_main and not (folder / split).is_dir():
            logger.warning("data.shards is null: making %d synthetic clips and stills in %s", count, folder / split)
            make_toy_shards(
                folder / split,
                num_videos=count,
                num_images=count,
                num_frames=toy.num_frames,
                height=toy.size,
                width=toy.size,
                seed=run.seed + offset,
            )
    layout.barrier()
    data = dataclasses.replace(run.data, shards=str(folder / "train"))
    heldout = run.evaluation.shards or str(folder / "heldout")
    return dataclasses.replace(run, data=data, evaluation=dataclasses.replace(run.evaluation, shards=heldout))
