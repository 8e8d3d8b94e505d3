"""How samples of different size become steps of equal cost: one size per step, buckets, or packs.

Turns a source and a configuration into views (what a sample is cut to), the samples of each, and the kinds of steps
that a plan draws. Decides from the data's own statistics and the seed alone, never from ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ltd.config import ConfigError
from ltd.data.entries import Entries
from ltd.data.order import PackOrder, SampleOrder, Strand
from ltd.data.packing import fill_packs
from ltd.data.plan import StepKind, ViewConfig
from ltd.shapes import Compression

_NO_VIEW = -1


def _check_token(token: tuple[int, int, int]) -> None:
    if min(token) < 1:
        raise ConfigError(f"data.batching.token: got {list(token)}, needed three positive sizes in pixels")


def tokens_of(view: ViewConfig, token: tuple[int, int, int]) -> int:
    """Count the tokens of a sample of a view; the first frame is a token frame of its own.

    Args:
        view: The view; its sides divide by the token's.
        token: Frames, rows and columns of pixels per token.

    Returns:
        Number of tokens.
    """
    return Compression(*token).latent(view.shape).num_cells


@dataclass(frozen=True, kw_only=True)
class FixedConfig:
    """``data.global_batch`` samples of one of ``data.views`` per step."""

    kind: Literal["fixed"] = "fixed"


@dataclass(frozen=True, kw_only=True)
class BucketsConfig:
    """Each sample goes to the bucket (length, resolution, aspect) it fits best; each step draws one bucket."""

    kind: Literal["buckets"] = "buckets"
    tokens: int  #: Token budget of the global batch: every bucket's batch is as large as fits, >= 1.
    token: tuple[int, int, int] = (4, 16, 16)  #: Frames, rows and columns of pixels per token of the denoiser.
    multiple: int = 8  #: Batches are multiples of this, which processes x accumulation must divide, >= 1.
    sides: tuple[int, ...] = (256,)  #: Resolutions: sides of squares of the same area, pixels.
    frames: tuple[int, ...] = (1,)  #: Lengths; 1 takes images.
    fps: float | None = None  #: Frames per second that clips come near by skipping frames; null takes every frame.
    max_aspects: int = 5  #: At most this many aspect ratios per length and resolution, chosen for the least crop, >= 1.
    max_upscale: float = 1.0  #: How much a sample may be enlarged to reach a resolution, >= 1.

    def __post_init__(self) -> None:
        _check_token(self.token)
        for name in ("tokens", "multiple", "max_aspects"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.batching.{name}: got {getattr(self, name)}, needed an integer of 1 or more")
        if not 1 <= self.max_upscale <= 16:
            raise ConfigError(f"data.batching.max_upscale: got {self.max_upscale}, needed a factor in [1, 16]")
        if not self.sides or min(self.sides) < max(self.token[1:]):
            raise ConfigError(
                f"data.batching.sides: got {list(self.sides)}, needed at least one, of {max(self.token[1:])} or more"
            )
        for frames in self.frames or (0,):
            if frames < 1 or (frames - 1) % self.token[0]:
                raise ConfigError(
                    f"data.batching.frames: got {list(self.frames)}, needed lengths of 1 + k * {self.token[0]} frames"
                )
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ConfigError(f"data.batching.fps: got {self.fps}, needed a rate in (0, 1000] or null")


@dataclass(frozen=True, kw_only=True)
class PackedConfig:
    """Samples keep their size and are laid end to end in packs of a token budget, with attention inside each only."""

    kind: Literal["packed"] = "packed"
    tokens: int  #: Token budget of one pack, >= 1.
    packs: int  #: Packs of the global batch; processes x accumulation must divide it, >= 1.
    token: tuple[int, int, int] = (4, 16, 16)  #: Frames, rows and columns of pixels per token of the denoiser.
    max_side: int = 256  #: Larger samples are scaled down to the area of a square of this side, pixels.
    max_frames: int = 1  #: Longer clips are cut to this many frames.
    fps: float | None = None  #: Frames per second that clips come near by skipping frames; null takes every frame.

    def __post_init__(self) -> None:
        _check_token(self.token)
        for name in ("tokens", "packs", "max_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.batching.{name}: got {getattr(self, name)}, needed an integer of 1 or more")
        if self.max_side < max(self.token[1:]):
            raise ConfigError(f"data.batching.max_side: got {self.max_side}, needed {max(self.token[1:])} or more")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ConfigError(f"data.batching.fps: got {self.fps}, needed a rate in (0, 1000] or null")


BatchingConfig = FixedConfig | BucketsConfig | PackedConfig


@dataclass(frozen=True)
class Arrangement:
    """Views and the samples cut to each."""

    views: tuple[ViewConfig, ...]  #: What samples are cut to.
    ids: tuple[np.ndarray, ...]  #: int64, samples of each view in index order; in buckets and packs a sample has one.
    tokens: tuple[int, ...]  #: Tokens (or, with fixed views, pixels) of one sample of each view.
    units: tuple[int, ...]  #: Samples of a global batch of each view; in packs the number of packs.
    left_out: Counter[str] = field(default_factory=Counter)  #: Samples that no view takes, by reason.
    misfits: tuple[Counter[str], ...] = ()  #: Per fixed view the samples that do not fit it, by reason.

    def view_of(self, count: int) -> np.ndarray:
        """Tell the view of each of ``count`` samples, int64 ``(count,)``; -1 where it has none."""
        views = np.full(count, _NO_VIEW, dtype=np.int64)
        for number, ids in enumerate(self.ids):
            views[ids] = number
        return views


def frame_steps(fps: np.ndarray, wanted: float | None) -> np.ndarray:
    """Compute how many source frames one frame advances, for many samples; see ``ViewConfig.frame_step``.

    Args:
        fps: float64 ``(n,)``, frames per second of the sources, 0 where unknown.
        wanted: Frames per second to come near; None takes every frame.

    Returns:
        int64 ``(n,)``, 1 or more.
    """
    if wanted is None:
        return np.ones(len(fps), dtype=np.int64)
    return np.where(fps > 0, np.maximum(1, np.round(fps / wanted)), 1).astype(np.int64)


def arrange_packs(config: PackedConfig, entries: Entries) -> Arrangement:
    """Give every sample a size of its own near its native one.

    Args:
        config: The packs.
        entries: The samples.

    Returns:
        One view per distinct size.
    """
    columns = entries.columns
    t, h, w = config.token
    height, width = columns["height"].astype(np.float64), columns["width"].astype(np.float64)
    scale = np.minimum(1.0, config.max_side / np.sqrt(height * width))
    # To the nearest token, so that little is cut off, but never beyond the source.
    rows = np.minimum(np.round(height * scale / h), height // h).astype(np.int64) * h
    cols = np.minimum(np.round(width * scale / w), width // w).astype(np.int64) * w
    available = (columns["frames"] - 1) // frame_steps(columns["fps"], config.fps) + 1
    frames = 1 + (np.minimum(available, config.max_frames) - 1) // t * t
    video = columns["kind"] == 1
    short, small = video & (frames == 1), (rows < h) | (cols < w)
    too_short = f"shorter than {1 + t} frames" if config.max_frames > t else "clips (data.batching.max_frames)"
    left_out = Counter({too_short: int(short.sum()), "smaller than a token": int((small & ~short).sum())})
    keep = np.flatnonzero(~short & ~small)
    shapes = np.stack([frames[keep], rows[keep], cols[keep]], axis=1)
    return _by_shape(config, shapes, keep, fps=config.fps, left_out=+left_out)


def arrange_cached(config: BucketsConfig | PackedConfig, entries: Entries, *, fill: bool = True) -> Arrangement:
    """Take the windows of a latent cache at the sizes they were cached at.

    Args:
        config: Buckets or packs.
        entries: The windows, with their sizes in pixels.
        fill: Whether each bucket must have the samples of one batch.

    Returns:
        One view per distinct size.
    """
    columns = entries.columns
    shapes = np.stack([columns[name].astype(np.int64) for name in ("frames", "height", "width")], axis=1)
    return _by_shape(config, shapes, np.arange(len(shapes)), fps=None, left_out=Counter(), fill=fill)


def _by_shape(
    config: BucketsConfig | PackedConfig,
    shapes: np.ndarray,
    keep: np.ndarray,
    *,
    fps: float | None,
    left_out: Counter[str],
    fill: bool = True,
) -> Arrangement:
    distinct, inverse = np.unique(shapes, axis=0, return_inverse=True)
    views = tuple(ViewConfig(num_frames=t, height=h, width=w, fps=fps) for t, h, w in distinct.tolist())
    try:
        tokens = tuple(tokens_of(view, config.token) for view in views)
    except ValueError as error:
        raise ConfigError(f"data.batching.token: got {list(config.token)}, but {error}") from None
    ids = tuple(keep[inverse.reshape(-1) == number] for number in range(len(views)))
    if config.kind == "packed":
        return Arrangement(views, ids, tokens, (config.packs,) * len(views), left_out)
    small = [number for number in range(len(views)) if fill and len(ids[number]) < config.multiple]
    for number in small:
        left_out[f"too few for one batch of {views[number]}"] += len(ids[number])
    kept = [number for number in range(len(views)) if number not in small]
    units = tuple(bucket_units(config, views[n], tokens[n], len(ids[n])) if fill else 1 for n in kept)
    return Arrangement(
        tuple(views[n] for n in kept), tuple(ids[n] for n in kept), tuple(tokens[n] for n in kept), units, left_out
    )


def bucket_units(config: BucketsConfig, view: ViewConfig, tokens: int, samples: int | None = None) -> int:
    """Compute the global batch of a bucket.

    Args:
        config: The buckets.
        view: The bucket, for the message.
        tokens: Tokens of one of its samples.
        samples: Samples of the bucket, which the batch must not exceed; None does not look at them.

    Returns:
        Samples per step: the largest multiple of ``config.multiple`` within the token budget (and the samples).

    Raises:
        ConfigError: If not even one multiple fits; says how many tokens would do.
    """
    units = config.tokens // (tokens * config.multiple) * config.multiple
    if units == 0:
        raise ConfigError(
            f"data.batching.tokens: got {config.tokens}, but a batch of {config.multiple} (data.batching.multiple) "
            f"samples of {view} has {config.multiple * tokens} tokens; raise tokens to that, or lower multiple"
        )
    return units if samples is None else max(1, min(units, samples // config.multiple * config.multiple))


def step_kinds(
    batching: BatchingConfig,
    arrangement: Arrangement,
    *,
    sets: Sequence[tuple[int, int, float]],
    strand: Callable[[np.ndarray, int], Strand],
) -> list[StepKind]:
    """Make the kinds of steps that a plan draws.

    Args:
        batching: How samples become steps.
        arrangement: Views and the samples of each.
        sets: Per data set the first of its ids, the one after its last, and its weight.
        strand: Makes the strand of some ids of a data set, by its number.

    Returns:
        One kind per view, or one for all packs.

    Raises:
        ConfigError: If a pack, or the packs of one step, cannot be filled; says the numbers.
    """
    if batching.kind == "packed":
        return [_packed_kind(batching, arrangement, sets=sets, strand=strand)]
    total = sum(weight for _, _, weight in sets)
    placed = [sum(int(((ids >= low) & (ids < high)).sum()) for ids in arrangement.ids) for low, high, _ in sets]
    kinds = []
    for number, (view, ids, units) in enumerate(
        zip(arrangement.views, arrangement.ids, arrangement.units, strict=True)
    ):
        inside = [ids[(ids >= low) & (ids < high)] for low, high, _ in sets]
        orders = tuple(
            SampleOrder(strand(part, place), part=number) if len(part) else None for place, part in enumerate(inside)
        )
        if batching.kind == "fixed":
            shares = [weight for _, _, weight in sets]
            rate = view.weight if len(ids) else 0.0
        else:  # every sample of a data set comes up equally often, whatever its bucket
            pairs = zip(inside, placed, sets, strict=True)
            shares = [weight / total * len(part) / max(count, 1) for part, count, (_, _, weight) in pairs]
            rate = sum(shares) * sum(placed) / units
        kinds.append(StepKind(orders, tuple(shares), units, rate, arrangement.tokens[number], number))
    return kinds


def _packed_kind(
    batching: PackedConfig,
    arrangement: Arrangement,
    *,
    sets: Sequence[tuple[int, int, float]],
    strand: Callable[[np.ndarray, int], Strand],
) -> StepKind:
    view_of = arrangement.view_of(sets[-1][1])
    orders: list[PackOrder | None] = []
    for place, (low, high, _) in enumerate(sets):
        ids = low + np.flatnonzero(view_of[low:high] != _NO_VIEW)
        if not len(ids):
            orders.append(None)
            continue
        classes = view_of[ids]
        counts = np.bincount(classes, minlength=len(arrangement.views))
        packs, ends = fill_packs(arrangement.tokens, counts.tolist(), batching.tokens)
        orders.append(PackOrder(strand(ids, place), classes, packs, ends))
    total = sum(order.num_units for order in orders if order is not None)
    if total < batching.packs:
        raise ConfigError(
            f"data.batching.packs: got {batching.packs}, but all samples fill only {total} packs of "
            f"{batching.tokens} tokens; lower data.batching.packs or tokens, or add data"
        )
    # Weights are of samples; a data set of small samples has more of them in a pack.
    pairs = zip(orders, sets, strict=True)
    shares = [weight * order.num_units / order.num_samples if order else 0.0 for order, (_, _, weight) in pairs]
    return StepKind(tuple(orders), tuple(shares), batching.packs, 1.0, max(arrangement.tokens), view_of)
