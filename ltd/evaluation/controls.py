"""Controls that give a metric a scale: real data against real data, and clips with their frames in random order."""

from __future__ import annotations

import torch
from torch import Tensor

from ltd.rng import generator


def shuffle_frames(clips: Tensor, *, seed: int) -> Tensor:
    """Put each clip's frames in a random order, never their own.

    Args:
        clips: ``(b, t, ...)``, at least 2 frames.
        seed: Seed of the orders; clip ``i`` takes the stream ``i``.

    Returns:
        The same frames in other orders.

    Raises:
        ValueError: If the clips have one frame.
    """
    num_frames = clips.shape[1]
    if num_frames < 2:
        raise ValueError("a clip of one frame cannot be shuffled")
    shuffled = []
    for index, clip in enumerate(clips):
        order = torch.randperm(num_frames, generator=generator(seed, "shuffle_frames", index))
        if torch.equal(order, torch.arange(num_frames)):
            order = order.roll(1)
        shuffled.append(clip[order])
    return torch.stack(shuffled)


def disjoint_draws(num_items: int, num_drawn: int, *, seed: int, repeat: int = 0) -> tuple[Tensor, Tensor]:
    """Draw two sets of equal size that share no item.

    Args:
        num_items: Items to draw from.
        num_drawn: Items in each set; at most half of them.
        seed: Seed of the draw.
        repeat: Number of the draw.

    Returns:
        Indices of the two sets, ``(num_drawn,)`` each.

    Raises:
        ValueError: If there are too few items.
    """
    if num_drawn < 1 or 2 * num_drawn > num_items:
        raise ValueError(f"two disjoint sets of {num_drawn} need {2 * num_drawn} items, got {num_items}")
    order = torch.randperm(num_items, generator=generator(seed, "disjoint_draws", repeat))
    return order[:num_drawn], order[num_drawn : 2 * num_drawn]
