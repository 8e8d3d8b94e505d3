"""Which samples make the global batch of each step: a pure function of the seed and the data.

Knows nothing of ranks, workers, files or history: ``Plan.step(k)`` is the same on every process and after any restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ltd.config import ConfigError
from ltd.rng import derive_seed
from ltd.shapes import VideoShape

_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What one training sample is cut to; one frame takes images, more frames take clips."""

    num_frames: int  #: Frames, >= 1; 1 takes images.
    height: int  #: Pixels, >= 1.
    width: int  #: Pixels, >= 1.
    fps: float | None = None  #: Frames per second to come near by skipping frames, > 0; None takes every frame.
    weight: float = 1.0  #: Share of the steps that draw this view, relative to the other views, > 0.

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed an integer of 1 or more")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ConfigError(f"fps: got {self.fps}, needed a rate in (0, 1000] or null")
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"weight: got {self.weight}, needed a positive number")

    @property
    def kind(self) -> str:
        """The kind of sample it takes: "image" or "video"."""
        return "image" if self.num_frames == 1 else "video"

    @property
    def shape(self) -> VideoShape:
        """Size of the cut in pixels."""
        return VideoShape(self.num_frames, self.height, self.width)

    def frame_step(self, source_fps: float) -> int:
        """Compute how many source frames one frame of the view advances.

        Args:
            source_fps: Frames per second of the source, 0 where unknown.

        Returns:
            The step that comes nearest to ``fps``, >= 1.
        """
        if self.fps is None or source_fps <= 0:
            return 1
        return max(1, round(source_fps / self.fps))

    def span(self, source_fps: float) -> int:
        """Compute how many source frames the view reaches over."""
        return (self.num_frames - 1) * self.frame_step(source_fps) + 1

    def __str__(self) -> str:
        return f"{self.shape}" + (f"@{self.fps:g}fps" if self.fps is not None else "")


@dataclass(frozen=True)
class PlannedBatch:
    """Global batch of one step, in global order."""

    step: int  #: Step, from 0.
    view: int  #: Number of the view in ``data.views``.
    entries: tuple[int, ...]  #: Sample ids, ``global_batch`` of them.
    draws: tuple[int, ...]  #: ``step * global_batch + position``.
    epochs: tuple[int, ...] = field(repr=False)  #: Epoch of the view that each entry belongs to.


def _raw(count: int, seed: int, *parts: int | str) -> np.ndarray:
    # The raw stream of a bit generator is fixed for all numpy versions, which the Generator methods are not.
    return np.random.Philox(key=derive_seed(seed, *parts)).random_raw(count)


def unit(seed: int, *parts: int | str) -> float:
    """Hash a seed and labels into a number uniform in [0, 1)."""
    return (derive_seed(seed, *parts) >> 10) * 2.0**-53


class Plan:
    """The sequence of global batches: each view runs through exact epochs of the samples that fit it.

    Args:
        eligible: For each view the ids of the samples that fit it, in index order; a view without any is never drawn.
        weights: Share of the steps of each view, any positive scale.
        global_batch: Samples per step.
        seed: Seed of the run.

    Raises:
        ConfigError: If a view has fewer samples than one global batch.
    """

    def __init__(
        self, eligible: Sequence[Sequence[int]], weights: Sequence[float], *, global_batch: int, seed: int
    ) -> None:
        for number, ids in enumerate(eligible):
            if 0 < len(ids) < global_batch:
                raise ConfigError(
                    f"data.global_batch: got {global_batch}, but data.views[{number}] has only {len(ids)} samples; "
                    f"needed at least one global batch: lower data.global_batch, drop the view or add data"
                )
        self.eligible = tuple(np.asarray(ids, dtype=np.int64) for ids in eligible)
        self.global_batch = global_batch
        self.seed = seed
        drawn = [weight if len(ids) else 0.0 for weight, ids in zip(weights, self.eligible, strict=True)]
        self._edges = np.cumsum(drawn) / np.sum(drawn)
        self._counts: list[np.ndarray] = [np.zeros(len(self.eligible), dtype=np.int64)]
        self._views = lru_cache(maxsize=4)(self._block_views)
        self._order = lru_cache(maxsize=2 * len(self.eligible) + 2)(self._epoch_order)

    def _block_views(self, block: int) -> np.ndarray:
        uniform = (_raw(_BLOCK, self.seed, "view", block) >> np.uint64(11)) * 2.0**-53
        return np.minimum(np.searchsorted(self._edges, uniform, side="right"), len(self.eligible) - 1)

    def _epoch_order(self, view: int, epoch: int) -> np.ndarray:
        ids = self.eligible[view]
        return ids[np.argsort(_raw(len(ids), self.seed, "epoch", view, epoch), kind="stable")]

    def _steps_before(self, step: int) -> tuple[int, int]:
        """Return the view of a step and how many earlier steps drew the same view."""
        block, offset = divmod(step, _BLOCK)
        while len(self._counts) <= block:
            drawn = np.bincount(self._views(len(self._counts) - 1), minlength=len(self.eligible))
            self._counts.append(self._counts[-1] + drawn)
        views = self._views(block)
        view = int(views[offset])
        return view, int(self._counts[block][view] + np.count_nonzero(views[:offset] == view))

    def step(self, step: int) -> PlannedBatch:
        """Plan the global batch of a step.

        Args:
            step: Step, from 0.

        Returns:
            The batch, equal for every caller with the same seed and data.
        """
        view, before = self._steps_before(step)
        first = before * self.global_batch
        places = [divmod(first + i, len(self.eligible[view])) for i in range(self.global_batch)]
        return PlannedBatch(
            step=step,
            view=view,
            entries=tuple(int(self._order(view, epoch)[place]) for epoch, place in places),
            draws=tuple(step * self.global_batch + i for i in range(self.global_batch)),
            epochs=tuple(epoch for epoch, _ in places),
        )


@dataclass(frozen=True)
class Placement:
    """Where in its source a sample is cut."""

    start: int  #: First source frame.
    step: int  #: Source frames per frame.
    crop: tuple[float, float]  #: Position of the crop in (height, width) as a share of the slack, in [0, 1].
    flip: bool  #: Whether to mirror left and right.


def random_placement(view: ViewConfig, *, frames: int, fps: float, seed: int, draw: int, flip: bool) -> Placement:
    """Choose window, crop and flip of a sample as a function of the seed and its draw.

    Args:
        view: What the sample is cut to.
        frames: Frames of the source.
        fps: Frames per second of the source, 0 where unknown.
        seed: Seed of the run.
        draw: Slot of the sample in the global sequence.
        flip: Whether half of the samples are mirrored.

    Returns:
        The placement.
    """
    slack = frames - view.span(fps)
    return Placement(
        start=int(unit(seed, draw, "window") * (slack + 1)),
        step=view.frame_step(fps),
        crop=(unit(seed, draw, "crop_h"), unit(seed, draw, "crop_w")),
        flip=flip and unit(seed, draw, "flip") < 0.5,
    )


def chain_keys(previous: str, keys: Sequence[str]) -> str:
    """Extend the running hash of sample keys by one global batch.

    Args:
        previous: Hash after the step before, "" at the start.
        keys: Keys of the global batch in global order.

    Returns:
        sha256 in hex.
    """
    text = "\n".join((previous, *keys)).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()
