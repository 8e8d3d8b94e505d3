"""Fill packs of a token budget with samples of several sizes. Knows sizes and counts, no samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ltd.config import ConfigError


def fill_packs(tokens: Sequence[int], counts: Sequence[int], budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack all samples, largest first: each pack takes the largest size that still fits until nothing does.

    A pack's make-up is repeated as long as there are samples for it, so the work grows with the number of sizes, not
    of samples.

    Args:
        tokens: Tokens of one sample of each class.
        counts: Samples of each class.
        budget: Tokens of a pack.

    Returns:
        Classes of the samples, pack after pack, int64; place after the last sample of each pack, int64.

    Raises:
        ConfigError: If a sample is larger than the budget.
    """
    if max(tokens) > budget:
        raise ConfigError(
            f"data.batching.tokens: got {budget}, but the largest sample has {max(tokens)} tokens; raise tokens, or "
            "lower data.batching.max_side or max_frames"
        )
    left = np.array(counts, dtype=np.int64)
    order = np.argsort(-np.asarray(tokens), kind="stable")
    classes: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    while left.any():
        make_up = np.zeros_like(left)
        room = budget
        for kind in order:
            fitting = min(int(left[kind]), room // tokens[kind])
            make_up[kind] = fitting
            room -= fitting * tokens[kind]
        used = make_up > 0
        times = int((left[used] // make_up[used]).min())
        pattern = np.repeat(np.arange(len(left)), make_up)
        classes.append(np.tile(pattern, times))
        sizes.append(np.full(times, len(pattern), dtype=np.int64))
        left -= make_up * times
    return np.concatenate(classes), np.cumsum(np.concatenate(sizes))
