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
from ltd.data.order import Drawn, Order, uniform, unit
from ltd.data.schedule import EpochSteps, Schedule, WeightedSteps
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
    entries: tuple[int, ...]  #: Sample ids.
    views: tuple[int, ...] = field(repr=False)  #: Number of the view each sample is cut to.
    draws: tuple[int, ...] = field(repr=False)  #: Slot of each sample in the run, ``step * stride + position``.
    epochs: tuple[int, ...] = field(repr=False)  #: Epoch of its strand that each sample belongs to.
    ends: tuple[int, ...] = field(repr=False)  #: Place after the last sample of each unit (a sample, or a pack).

    def unit_range(self, first: int, last: int) -> range:
        """List the places of the samples of the units ``first`` to ``last``, the last excluded."""
        return range(self.ends[first - 1] if first else 0, self.ends[last - 1] if last else 0)


@dataclass(frozen=True)
class StepKind:
    """What the global batch of one kind of step is drawn from."""

    orders: tuple[Order | None, ...]  #: One per data set; None where a data set has nothing of this kind.
    shares: tuple[float, ...]  #: Share of the units drawn from each data set, any positive scale.
    units: int  #: Units (samples, or packs) of the global batch.
    weight: float  #: Share of the steps of this kind, any positive scale, or steps of one epoch; 0 is never.
    size: int  #: Tokens or cells of the largest sample: the kind with the most runs first.
    views: int | np.ndarray  #: View of every sample, or of each by id.


class Plan:
    """The sequence of global batches.

    Args:
        kinds: The kinds of steps. A run begins with the one of the largest samples, and then the one of the most tokens
            a step if that is another, so that a run that does not fit into memory ends at once.
        seed: Seed of the run.
        by_epoch: Whether weights are steps of an epoch, and all kinds pass their epochs together; else shares.
    """

    def __init__(self, kinds: Sequence[StepKind], *, seed: int, by_epoch: bool = False) -> None:
        self.kinds, self.seed = tuple(kinds), seed
        orders = [order for kind in kinds for order in kind.orders if order is not None]
        #: Numbers of draws that a step may use, so that no two samples of a run share one.
        self.stride = max(kind.units for kind in kinds) * max(order.max_unit for order in orders)
        drawn = [number for number, kind in enumerate(kinds) if kind.weight > 0]
        largest = max(drawn, key=lambda n: (kinds[n].size, kinds[n].units))
        heaviest = max(drawn, key=lambda n: (kinds[n].size * kinds[n].units, n == largest))
        first = [largest] if heaviest == largest else [largest, heaviest]
        weights = [kind.weight for kind in kinds]
        self._schedule: Schedule = (EpochSteps if by_epoch else WeightedSteps)(weights, first, seed=seed)
        self._drawn: list[list[np.ndarray]] = [[np.zeros(len(kind.orders), dtype=np.int64)] for kind in kinds]
        self._sets = lru_cache(maxsize=4 * len(kinds))(self._block_sets)

    def _block_sets(self, number: int, block: int) -> np.ndarray:
        """Choose the data set of each of ``_BLOCK`` units of a kind."""
        kind = self.kinds[number]
        shares = np.array([s if o is not None else 0.0 for s, o in zip(kind.shares, kind.orders, strict=True)])
        edges = np.cumsum(shares) / shares.sum()
        return np.searchsorted(edges, uniform(_BLOCK, self.seed, "dataset", number, block), side="right")

    def _drawn_before(self, number: int, unit: int) -> np.ndarray:
        """Count the units of a kind that each data set gave before the ``unit``-th."""
        kind = self.kinds[number]
        present = [order is not None for order in kind.orders]
        if sum(present) <= 1:
            return np.array(present, dtype=np.int64) * unit
        block, offset = divmod(unit, _BLOCK)
        counts = self._drawn[number]
        while len(counts) <= block:
            counts.append(counts[-1] + np.bincount(self._sets(number, len(counts) - 1), minlength=len(present)))
        return counts[block] + np.bincount(self._sets(number, block)[:offset], minlength=len(present))

    def _draw(self, number: int, first: int) -> Drawn:
        """Draw the units of a step, by epoch and then by lane, so that few processes share a shard."""
        kind = self.kinds[number]
        begin, end = self._drawn_before(number, first), self._drawn_before(number, first + kind.units)
        parts = [
            order.take(int(low), int(high - low))
            for order, low, high in zip(kind.orders, begin, end, strict=True)
            if order is not None and high > low
        ]
        drawn = Drawn.join(parts) if len(parts) > 1 else parts[0]
        return drawn.pick(np.lexsort([drawn.lanes, drawn.epochs[drawn.ends - 1]]))

    def step(self, step: int) -> PlannedBatch:
        """Plan the global batch of a step.

        Args:
            step: Step, from 0.

        Returns:
            The batch, equal for every caller with the same seed and data.
        """
        number, before = self._schedule.before(step)
        kind = self.kinds[number]
        drawn = self._draw(number, int(before[number]) * kind.units)
        first = step * self.stride
        views = kind.views[drawn.ids] if isinstance(kind.views, np.ndarray) else np.full(len(drawn.ids), kind.views)
        return PlannedBatch(
            step=step,
            entries=tuple(drawn.ids.tolist()),
            views=tuple(views.tolist()),
            draws=tuple(range(first, first + len(drawn.ids))),
            epochs=tuple(drawn.epochs.tolist()),
            ends=tuple(drawn.ends.tolist()),
        )

    def progress(self, step: int) -> list[tuple[int, float]]:
        """Count what was drawn before a step.

        Args:
            step: Step, from 0.

        Returns:
            Per data set: units drawn, and epochs that all kinds of steps have passed (units drawn over units of an
            epoch, of the kind that is behind most).
        """
        _, steps = self._schedule.before(step)
        drawn = [self._drawn_before(n, int(steps[n]) * kind.units) for n, kind in enumerate(self.kinds)]
        found = []
        for number in range(len(self.kinds[0].orders)):
            orders = [kind.orders[number] if kind.weight > 0 else None for kind in self.kinds]
            epochs = [count[number] / o.num_units for count, o in zip(drawn, orders, strict=True) if o is not None]
            found.append((int(sum(count[number] for count in drawn)), float(min(epochs, default=0.0))))
        return found


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
