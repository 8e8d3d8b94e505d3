"""Weights of patches and heads under another patch, more channels, another split of the rotations. Pure functions.

Features of a patch are ordered ``(pt, ph, pw, c)`` (``ltd.nn.patch``). All results are float64, on the CPU.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Patch = tuple[int, int, int]
TimePatch = Literal["average", "central"]


def resample_matrix(before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Write the resampling of a patch as a matrix: linear along an axis that grows, means along one that shrinks.

    Means of cells, and no wider filter, because a patch ends at its edge: so a constant patch stays told exactly.

    Args:
        before: Cells along (h, w).
        after: Cells along (h, w) of the resampled patch.

    Returns:
        ``(after cells, before cells)``, each row with the sum 1.
    """
    rows, columns = (_resample_axis(old, new) for old, new in zip(before, after, strict=True))
    return torch.kron(rows, columns)


def _resample_axis(before: int, after: int) -> Tensor:
    cells = torch.eye(before, dtype=torch.float64).unsqueeze(1)  # before 1 before
    if after < before:
        return F.adaptive_avg_pool1d(cells, after).squeeze(1).T.contiguous()
    return F.interpolate(cells, size=after, mode="linear", align_corners=False).squeeze(1).T.contiguous()


def resize_input(weight: Tensor, before: Patch, after: Patch, channels: int, time: TimePatch = "average") -> Tensor:
    """Fit the weights that read a patch to another patch and more channels.

    Along (h, w): the weights ``P w``, with ``P`` the pseudo-inverse of the transposed resampling, which give a
    resampled patch the token of the patch itself: exactly where the patch grows, else nearest in the mean over white
    patches. Along t: from one frame to several, so that equal frames give the frame's token. New channels, behind the
    old ones, are not read: their weights are zero.

    Reference: Beyer et al. (2022), FlexiViT, arXiv 2212.08013, Eq. 4-5; Arnab et al. (2021), ViViT, arXiv 2103.15691,
    Sec. 3.4 (average: "filter inflation"; central: "central frame initialisation").

    Args:
        weight: ``(..., pt * ph * pw * c)``.
        before: Its patch along (t, h, w); one frame if ``after`` has another number.
        after: The new patch.
        channels: The new c, no less than the old.
        time: Whether a token reads the mean of its frames, or the frame ``pt // 2`` alone.

    Returns:
        ``(..., pt * ph * pw * c)`` of the new patch and channels.
    """
    cells = _as_cells(weight, before)
    if before[1:] != after[1:]:
        resample = resample_matrix(before[1:], after[1:])
        cells = _resample(cells, torch.linalg.pinv(resample.T), after)
    if before[0] != after[0]:
        frames = torch.zeros(after[0], dtype=torch.float64)
        if time == "average":
            frames += 1 / after[0]
        else:
            frames[after[0] // 2] = 1.0
        cells = cells * frames[:, None, None]
    return _as_features(_padded(cells, channels))


def resize_output(
    weight: Tensor, before: Patch, after: Patch, channels: int, groups: tuple[int, int] = (1, 1)
) -> Tensor:
    """Fit the weights (or biases) that write a patch to another patch and more channels.

    Along (h, w) the new patch is the old one resampled; along t each frame is the old one; new channels, behind the old
    ones, are zero.

    Args:
        weight: ``(pt * ph * pw * c, ...)``.
        before: Its patch along (t, h, w); one frame if ``after`` has another number.
        after: The new patch.
        channels: The new c of a group, no less than the old.
        groups: How many groups of c channels there are before and after, such as mean and variance: each is fitted by
            itself; those behind the old ones are zero, those that have no place any more are left out.

    Returns:
        ``(pt * ph * pw * groups * c, ...)`` of the new patch and channels.
    """
    cells = _as_cells(weight.movedim(0, -1), before)
    if before[1:] != after[1:]:
        cells = _resample(cells, resample_matrix(before[1:], after[1:]), after)
    if before[0] != after[0]:
        cells = cells.expand(*cells.shape[:-3], after[0], *cells.shape[-2:])
    parts = [_padded(part, channels) for part in cells.chunk(groups[0], dim=-4)[: groups[1]]]
    return _as_features(_padded(torch.cat(parts, -4), groups[1] * channels)).movedim(-1, 0).contiguous()


def regroup_pairs(before: Patch, after: Patch) -> list[int]:
    """Say which rotated pair of a head goes where under another split of the head among (t, h, w).

    An axis keeps its pairs of the highest frequencies in their order. What an axis loses, its lowest frequencies, goes
    to the axes that grow, in the order of the axes.

    Args:
        before: Channels of a head rotated by (t, h, w), even parts.
        after: Another split of the same number of channels.

    Returns:
        For each new pair the old one.
    """
    starts = [sum(before[:axis]) // 2 for axis in range(3)]
    kept = [
        list(range(start, start + min(old, new) // 2)) for start, old, new in zip(starts, before, after, strict=True)
    ]
    used = {pair for pairs in kept for pair in pairs}
    spare = [pair for pair in range(sum(before) // 2) if pair not in used]
    order: list[int] = []
    for pairs, new in zip(kept, after, strict=True):
        missing = new // 2 - len(pairs)
        order += pairs + spare[:missing]
        spare = spare[missing:]
    return order


def regroup_heads(value: Tensor, order: list[int], parts: int) -> Tensor:
    """Move the rotated pairs of every head; a pair is channels ``i`` and ``i + head_dim / 2``.

    Args:
        value: ``(parts * heads * head_dim, ...)``: queries, keys and values (the values stay), or ``(head_dim,)``.
        order: What ``regroup_pairs`` gives.
        parts: 3 for queries, keys and values, 1 for a norm's weights of one head.

    Returns:
        A tensor like ``value``.
    """
    half = len(order)
    channels = torch.tensor([*order, *(pair + half for pair in order)])
    moved = value.double().reshape(parts, -1, 2 * half, *value.shape[1:]).clone()
    rotated = slice(0, 2 if parts == 3 else 1)
    moved[rotated] = moved[rotated][:, :, channels]
    return moved.reshape(value.shape)


def _as_cells(weight: Tensor, patch: Patch) -> Tensor:
    """View ``(..., pt * ph * pw * c)`` as ``(..., c, pt, ph, pw)`` in float64."""
    split = weight.double().reshape(*weight.shape[:-1], *patch, -1)
    return split.movedim(-1, -4)


def _resample(cells: Tensor, matrix: Tensor, after: Patch) -> Tensor:
    flat = cells.flatten(-2) @ matrix.T
    return flat.unflatten(-1, after[1:])


def _padded(cells: Tensor, channels: int) -> Tensor:
    """Put zeros behind the channels of ``(..., c, pt, ph, pw)``."""
    return F.pad(cells, (0, 0, 0, 0, 0, 0, 0, channels - cells.shape[-4]))


def _as_features(cells: Tensor) -> Tensor:
    """View ``(..., c, pt, ph, pw)`` as ``(..., pt * ph * pw * c)``: the inverse of ``_as_cells``."""
    return cells.movedim(-4, -1).flatten(-4)
