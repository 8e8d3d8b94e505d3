"""Random numbers that belong to a sample: a function of (seed, draw index, stream name), never of a rank or of history.

A *draw* is one slot of the global sequence of batches (``step * global_batch + position``), so the same clip gets new
noise in every epoch and the same noise on any number of ranks, accumulation steps or restarts. No global generator is
read or changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, *parts: int | str) -> int:
    """Hash a seed and any number of labels into a 63-bit seed; the same on every machine."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """Make a CPU generator seeded from ``derive_seed(seed, *parts)``."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


class DrawRandom:
    """Random tensors of a batch, each row from its own draw's stream.

    Args:
        seed: Seed of the run.
        draws: Global draw index of each row, ``b`` of them.
    """

    def __init__(self, seed: int, draws: Sequence[int]) -> None:
        self.seed = seed
        self.draws = tuple(int(draw) for draw in draws)

    def normal(self, shape: Sequence[int], stream: str) -> Tensor:
        """Draw standard normal numbers.

        Args:
            shape: Shape of one row.
            stream: Name of the stream; two streams are independent.

        Returns:
            ``(b, *shape)``, float32, CPU.
        """
        return torch.stack([torch.randn(tuple(shape), generator=generator(self.seed, d, stream)) for d in self.draws])

    def uniform(self, shape: Sequence[int], stream: str) -> Tensor:
        """Draw numbers uniform in [0, 1).

        Args:
            shape: Shape of one row; ``()`` gives one number per row.
            stream: Name of the stream.

        Returns:
            ``(b, *shape)``, float32, CPU.
        """
        return torch.stack([torch.rand(tuple(shape), generator=generator(self.seed, d, stream)) for d in self.draws])
