"""Buckets from the data's own statistics: lengths and resolutions from the configuration, aspect ratios by least crop.

A sample takes the longest length and the highest resolution it can fill. Within each the aspect ratios are those that
together crop the least off the samples (exactly: dynamic programming over the candidates). Fewer aspect ratios are
taken where one would have fewer samples than a batch; a length with fewer than ``multiple`` samples gives them to the
next shorter one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from ltd.config import ConfigError
from ltd.data.batching import Arrangement, BucketsConfig, bucket_units, frame_steps, tokens_of
from ltd.data.entries import Entries
from ltd.data.plan import ViewConfig

#: No bucket is more than this many times as wide as high, or the other way round.
_MAX_ASPECT = 4.0
#: Areas of buckets, relative to the square's.
_AREAS = (0.75, 1.1)
_BINS = 400
_MAX_CANDIDATES = 80


def crop_loss(aspects: np.ndarray, bucket: float | np.ndarray) -> np.ndarray:
    """Compute the share of each picture that is cut off to reach an aspect ratio.

    Args:
        aspects: Width / height of the pictures.
        bucket: Width / height of the bucket.

    Returns:
        Shares in [0, 1).
    """
    return 1 - np.minimum(aspects, bucket) / np.maximum(aspects, bucket)


def candidate_sizes(side: int, token: tuple[int, int, int]) -> np.ndarray:
    """List the sizes of about ``side`` squared pixels whose sides are whole tokens.

    Args:
        side: Side of the square of the same area, pixels.
        token: Frames, rows and columns of pixels per token.

    Returns:
        int64 ``(n, 2)``, (height, width), from the highest to the widest: the square nearest to that area, and of each
        other aspect ratio the largest of 0.75 to 1.1 times the area.
    """
    _, h, w = token
    area = side * side
    tall, wide = (np.arange(1, int(side * np.sqrt(_MAX_ASPECT)) // unit + 2, dtype=np.int64) * unit for unit in (h, w))
    height, width = (grid.reshape(-1) for grid in np.meshgrid(tall, wide, indexing="ij"))
    aspects, areas = width / height, width * height
    fits = (areas >= _AREAS[0] * area) & (areas <= _AREAS[1] * area)
    fits &= (aspects <= _MAX_ASPECT) & (aspects >= 1 / _MAX_ASPECT)
    square = (max(1, round(side / h)) * h, max(1, round(side / w)) * w)
    best = {square[1] / square[0]: square}
    for size in zip(height[fits].tolist(), width[fits].tolist(), strict=True):
        ratio = size[1] / size[0]
        if ratio not in best or size[0] > best[ratio][0]:
            best[ratio] = size
    ratios = sorted(best)
    if len(ratios) > _MAX_CANDIDATES:  # of those that hardly differ one is kept, and the square
        bins = np.linspace(np.log(ratios[0]), np.log(ratios[-1]), _MAX_CANDIDATES)
        places = {int(place): ratio for ratio, place in zip(ratios, np.digitize(np.log(ratios), bins), strict=True)}
        ratios = sorted({*places.values(), square[1] / square[0]})
    return np.array([best[ratio] for ratio in ratios], dtype=np.int64)


def choose_aspects(aspects: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """Choose the candidates that together crop the least.

    Args:
        aspects: Width / height of the samples.
        candidates: Width / height of the candidates, increasing.
        count: At most this many are chosen.

    Returns:
        Places of the chosen among the candidates, increasing; fewer than ``count`` where more do not help.
    """
    logs = np.clip(np.log(aspects), -np.log(2 * _MAX_ASPECT), np.log(2 * _MAX_ASPECT))
    edges = np.linspace(logs.min(), logs.max() + 1e-9, _BINS + 1)
    weights, _ = np.histogram(logs, edges)
    centers = np.exp((edges[:-1] + edges[1:]) / 2) if len(np.unique(aspects)) > 1 else np.full(_BINS, aspects[0])
    losses = crop_loss(centers[None], candidates[:, None]) * weights  # candidate, bin

    # spans[i, j]: loss of the bins between candidates i and j when only these two are there.
    total = len(candidates)
    between = np.searchsorted(candidates, centers)  # bins below candidate k have between <= k
    best = np.full((count + 1, total), np.inf)
    back = np.zeros((count + 1, total), dtype=np.int64)
    best[1] = [losses[j, between <= j].sum() for j in range(total)]
    spans = np.array(
        [
            [
                np.minimum(losses[i], losses[j])[(between > i) & (between <= j)].sum() if i < j else 0.0
                for j in range(total)
            ]
            for i in range(total)
        ]
    )
    for number in range(2, count + 1):
        for j in range(1, total):
            costs = best[number - 1, :j] + spans[:j, j]
            back[number, j] = int(np.argmin(costs))
            best[number, j] = costs[back[number, j]]
    tails = np.array([losses[j, between > j].sum() for j in range(total)])
    whole = best[1:] + tails
    number = int(np.argmin(whole.min(axis=1) * (1 + 1e-12 * np.arange(count)))) + 1
    chosen = [int(np.argmin(whole[number - 1]))]
    for step in range(number, 1, -1):
        chosen.append(int(back[step, chosen[-1]]))
    return np.array(chosen[::-1])


def arrange_buckets(config: BucketsConfig, entries: Entries, *, fill: bool = True) -> Arrangement:
    """Sort samples into buckets.

    Args:
        config: The buckets.
        entries: The samples.
        fill: Whether each bucket must have the samples of one batch (held-out data need not).

    Returns:
        One view per bucket that has at least one batch, and the reasons why samples are left out.
    """
    groups, left_out = _lengths_and_sides(config, entries)
    if fill:
        _check_budget(config, groups)
    found: list[tuple[ViewConfig, np.ndarray]] = []
    for frames in sorted(config.frames, reverse=True):
        for side in sorted(config.sides, reverse=True):
            members = groups.pop((frames, side), None)
            if members is None:
                continue
            shorter = [(length, side) for length in sorted(config.frames) if 1 < length < frames]
            smaller = [(frames, length) for length in sorted(config.sides) if length < side]
            if fill and len(members) < config.multiple:
                reason = f"too few for one batch of {frames} frames at {side} pixels square"
                _hand_down(groups, members, (shorter or smaller)[-1:], left_out, reason)
                continue
            buckets, rest = _by_aspect(config, entries, members, frames=frames, side=side, fill=fill)
            found += buckets
            if len(rest):
                limit = f"enlarged more than {config.max_upscale:g} times"
                reason = f"{limit}, or too few for one batch, at {side} pixels square"
                _hand_down(groups, rest, smaller[-1:], left_out, reason)
    views, ids = tuple(view for view, _ in found), tuple(members for _, members in found)
    tokens = tuple(tokens_of(view, config.token) for view in views)
    rows = zip(views, tokens, ids, strict=True)
    units = tuple(bucket_units(config, v, n, len(i)) if fill else 1 for v, n, i in rows)
    return Arrangement(views, ids, tokens, units, left_out)


def _check_budget(config: BucketsConfig, groups: Iterable[tuple[int, int]]) -> None:
    """Refuse a token budget that some bucket's smallest batch may exceed; names the budget that holds all."""
    t, h, w = config.token
    largest = [
        (1 + (frames - 1) // t) * int((candidate_sizes(side, config.token) // [h, w]).prod(axis=1).max())
        for frames, side in groups
    ]
    needed = config.multiple * max(largest, default=0)
    if needed > config.tokens:
        raise ConfigError(
            f"data.batching.tokens: got {config.tokens}, but a batch of {config.multiple} (data.batching.multiple) of "
            f"the largest samples has {needed} tokens; raise tokens to that, or lower multiple, sides or frames"
        )


def _hand_down(
    groups: dict[tuple[int, int], np.ndarray],
    members: np.ndarray,
    target: list[tuple[int, int]],
    left_out: Counter[str],
    reason: str,
) -> None:
    """Give samples to another group, or leave them out where there is none."""
    if not target:
        left_out[reason] += len(members)
        return
    groups[target[0]] = np.sort(np.concatenate([groups.get(target[0], members[:0]), members]))


def _lengths_and_sides(
    config: BucketsConfig, entries: Entries
) -> tuple[dict[tuple[int, int], np.ndarray], Counter[str]]:
    """Find the longest length and the largest side that each sample fills; ids by (frames, side)."""
    columns = entries.columns
    steps = frame_steps(columns["fps"], config.fps)
    lengths = np.zeros(len(entries), dtype=np.int64)
    for frames in sorted(config.frames):
        fits = (columns["kind"] == (frames > 1)) & (columns["frames"] >= (frames - 1) * steps + 1)
        lengths[fits] = frames
    area = columns["height"].astype(np.float64) * columns["width"] * config.max_upscale**2
    sides = np.zeros(len(entries), dtype=np.int64)
    for side in sorted(config.sides):
        sides[area >= side * side] = side
    video = columns["kind"] == 1
    clips = [frames for frames in config.frames if frames > 1]
    reasons = {
        "images (no 1 in data.batching.frames)": ~video & (lengths == 0),
        f"shorter than {min(clips)} frames" if clips else "clips (none in data.batching.frames)": video
        & (lengths == 0),
        f"smaller than {min(config.sides)} pixels square": (lengths > 0) & (sides == 0),
    }
    left_out = Counter({reason: int(mask.sum()) for reason, mask in reasons.items()})
    groups = {
        (frames, side): found
        for frames in sorted(config.frames, reverse=True)
        for side in sorted(config.sides, reverse=True)
        if len(found := np.flatnonzero((lengths == frames) & (sides == side)))
    }
    return groups, +left_out


def _by_aspect(
    config: BucketsConfig, entries: Entries, members: np.ndarray, *, frames: int, side: int, fill: bool
) -> tuple[list[tuple[ViewConfig, np.ndarray]], np.ndarray]:
    """Choose aspect ratios for a group, fewer of them until each fills at least one batch.

    Returns:
        Views and their samples; those that no view takes without enlarging too much, or are too few.
    """
    height, width = (entries.columns[name][members].astype(np.float64) for name in ("height", "width"))
    sizes = candidate_sizes(side, config.token)
    ratios = sizes[:, 1] / sizes[:, 0]
    for count in range(min(config.max_aspects, len(sizes)), 0, -1):
        chosen = sizes[choose_aspects(width / height, ratios, count)]
        losses = crop_loss((width / height)[:, None], (chosen[:, 1] / chosen[:, 0])[None])
        scales = np.maximum(chosen[:, 0] / height[:, None], chosen[:, 1] / width[:, None])
        losses[scales > config.max_upscale * (1 + 1e-9)] = np.inf
        nearest = np.where(np.isinf(losses.min(axis=1)), -1, np.argmin(losses, axis=1))
        found, full = [], True
        for place, (rows, cols) in enumerate(chosen.tolist()):
            view = ViewConfig(num_frames=frames, height=rows, width=cols, fps=config.fps)
            units = bucket_units(config, view, tokens_of(view, config.token)) if fill else 1
            ids = members[nearest == place]
            full &= not len(ids) or len(ids) >= units
            found.append((view, ids))
        least = config.multiple if fill else 1
        if count == 1 or not fill or full:
            kept = [(view, ids) for view, ids in found if len(ids) >= least]
            rest = [members[nearest == -1], *(ids for _, ids in found if 0 < len(ids) < least)]
            return kept, np.sort(np.concatenate(rest))
    raise AssertionError("unreachable: one aspect ratio is always taken")
