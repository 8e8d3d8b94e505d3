"""Floating-point operations of layers, counted from shapes; a multiplication and its addition are two.

Only products are counted: of activations with weights, and of activations with each other in attention. Norms,
activations and rotations are left out, as they are by ``torch.utils.flop_counter``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from torch import Tensor

#: A number; or a 0-d tensor where a count is known to the device alone, which nobody waits for.
Number: TypeAlias = float | Tensor


@dataclass(frozen=True)
class Flops:
    """Operations of a part of a model."""

    #: Of a forward pass.
    forward: Number = 0.0
    #: Of the backward pass, from what the forward pass kept.
    backward: Number = 0.0
    #: The part of ``forward`` that attention's two products make up.
    attention: Number = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.attention + other.attention)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times, self.attention * times)

    @property
    def training(self) -> Number:
        """Forward and backward, nothing computed twice: what "model FLOPs" means."""
        return self.forward + self.backward

    @property
    def scores_again(self) -> Number:
        """What fused attention computes a second time in the backward pass: its scores."""
        return self.attention / 2


def total(parts: Iterable[Flops]) -> Flops:
    """Add up parts; none give zero."""
    found = Flops()
    for part in parts:
        found = found + part
    return found


def linear(rows: Number, inputs: int, outputs: int, *, leaf: bool = False) -> Flops:
    """Count a product with a trained matrix.

    Args:
        rows: Vectors that are multiplied.
        inputs: Features of each.
        outputs: Features of each result.
        leaf: Whether the input needs no gradient.

    Returns:
        The operations.
    """
    forward = 2.0 * inputs * outputs * rows
    return Flops(forward, forward * (1 if leaf else 2))


def attention(queries: Number, keys: Number, width: int) -> Flops:
    """Count scores and weighted sums of all heads together.

    Args:
        queries: Number of queries.
        keys: Number of keys that each of them reads.
        width: Heads times channels of a head.

    Returns:
        The operations.
    """
    forward = 4.0 * width * queries * keys
    return Flops(forward, 2 * forward, forward)


def convolution(
    cells: float, inputs: int, outputs: int, kernel: Iterable[int], *, leaf: bool = False, fixed: bool = False
) -> Flops:
    """Count a convolution, products with padding included.

    Args:
        cells: Pixels of the output over frames and batch.
        inputs: Channels of the input.
        outputs: Channels of the output.
        kernel: Size of the kernel along each axis.
        leaf: Whether the input needs no gradient.
        fixed: Whether the weights need none.

    Returns:
        The operations.
    """
    forward = 2.0 * cells * inputs * outputs * prod(kernel)
    return Flops(forward, forward * ((not leaf) + (not fixed)))
