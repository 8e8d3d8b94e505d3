"""Buckets from the data's own statistics: lengths and resolutions from the configuration, aspect ratios by least crop.

A sample takes the longest length and the highest resolution it can fill. Within each the aspect ratios are those that
together crop the least off the samples (exactly: dynamic programming over the candidates). Fewer aspect ratios are
taken where one would have fewer samples than a batch; a length with fewer than ``multiple`` samples gives them to the
next shorter one.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from ltd.data.batching import Arrangement, BucketsConfig, bucket_units, frame_steps, tokens_of
from ltd.data.entries import Entries
from ltd.data.plan import ViewConfig

#: No bucket is more than this many times as wide as high, or the other way round.
_MAX_ASPECT = 4.0
_BINS = 400


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
        int64 ``(n, 2)``, (height, width), from the highest to the widest; none has more than ``side`` squared pixels
        but for the nearest to the square itself.
    """
    _, h, w = token
    heights = np.arange(1, side * 2 // h + 2, dtype=np.int64) * h
    widths = np.maximum(1, np.floor(side * side / heights / w + 1e-9).astype(np.int64)) * w
    sizes = np.stack([heights, widths], axis=1)
    aspects = widths / heights
    sizes = sizes[(aspects <= _MAX_ASPECT) & (aspects >= 1 / _MAX_ASPECT) & (heights * widths <= max(side, h, w) ** 2)]
    # The shape with the larger area stands for each aspect ratio.
    best: dict[float, tuple[int, int]] = {}
    for height, width in sizes.tolist():
        ratio = width / height
        if ratio not in best or height * width > best[ratio][0] * best[ratio][1]:
            best[ratio] = (height, width)
    return np.array([best[ratio] for ratio in sorted(best)], dtype=np.int64)


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

    # span[i, j]: loss of the bins between candidates i and j when only these two are there.
    total = len(candidates)
    between = np.searchsorted(candidates, centers)  # bins below candidate k have between <= k
    best = np.full((count + 1, total), np.inf)
    back = np.zeros((count + 1, total), dtype=np.int64)
    best[1] = [losses[j, between <= j].sum() for j in range(total)]
    for number in range(2, count + 1):
        for j in range(1, total):
            costs = [
                best[number - 1, i] + np.minimum(losses[i], losses[j])[(between > i) & (between <= j)].sum()
                for i in range(j)
            ]
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
    aspects = entries.columns["width"] / entries.columns["height"]
    views: list[ViewConfig] = []
    ids: list[np.ndarray] = []
    for (frames, side), members in _settle(config, groups, left_out, fill=fill).items():
        sizes = candidate_sizes(side, config.token)
        for (height, width), chosen in _by_aspect(config, frames, sizes, members, aspects, fill=fill):
            views.append(ViewConfig(num_frames=frames, height=height, width=width, fps=config.fps))
            ids.append(chosen)
    tokens = tuple(tokens_of(view, config.token) for view in views)
    units = tuple(bucket_units(config, v, n, len(i)) for v, n, i in zip(views, tokens, ids, strict=True))
    return Arrangement(tuple(views), tuple(ids), tokens, units, left_out)


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


def _settle(
    config: BucketsConfig, groups: dict[tuple[int, int], np.ndarray], left_out: Counter[str], *, fill: bool
) -> dict[tuple[int, int], np.ndarray]:
    """Hand groups that cannot fill one batch down to the next shorter length, or else the next smaller side."""
    settled: dict[tuple[int, int], np.ndarray] = {}
    for frames in sorted(config.frames, reverse=True):
        for side in sorted(config.sides, reverse=True):
            members = groups.get((frames, side))
            if members is None:
                continue
            if not fill or len(members) >= config.multiple:
                settled[(frames, side)] = members
                continue
            shorter = [length for length in config.frames if 1 < length < frames]
            smaller = [length for length in config.sides if length < side]
            if not shorter and not smaller:
                left_out[f"too few for one batch of {frames} frames at {side} pixels square"] += len(members)
                continue
            target = (max(shorter), side) if shorter else (frames, max(smaller))
            groups[target] = np.sort(np.concatenate([groups.get(target, members[:0]), members]))
    return settled


def _by_aspect(
    config: BucketsConfig,
    frames: int,
    sizes: np.ndarray,
    members: np.ndarray,
    aspects: np.ndarray,
    *,
    fill: bool,
) -> list[tuple[tuple[int, int], np.ndarray]]:
    """Choose aspect ratios for a group, fewer of them until each fills at least one batch."""
    ratios = sizes[:, 1] / sizes[:, 0]
    for count in range(min(config.max_aspects, len(sizes)), 0, -1):
        chosen = choose_aspects(aspects[members], ratios, count)
        nearest = np.argmin(crop_loss(aspects[members][:, None], ratios[chosen][None]), axis=1)
        found = []
        for place, candidate in enumerate(chosen):
            height, width = sizes[candidate].tolist()
            view = ViewConfig(num_frames=frames, height=height, width=width)
            units = bucket_units(config, view, tokens_of(view, config.token))
            found.append(((height, width), members[nearest == place], units))
        if count == 1 or not fill or all(len(ids) >= units for _, ids, units in found if len(ids)):
            return [(size, ids) for size, ids, _ in found if len(ids)]
    return []
