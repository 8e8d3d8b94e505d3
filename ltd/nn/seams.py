"""The points where parallelism may change a single-device model.

A model never asks how many processes there are. Where an operation needs all tokens or all samples, the module that
uses it holds the operation as an *attribute* (never a global), whose default is the single-device one below;
``ltd.parallel`` replaces the attribute on that instance.

- ``attend(q, k, v, key_mask=None, segments=None)``: self-attention of one token sequence, on ``SelfAttention`` modules.
- ``shard_tokens(x)``: what is held per token ``(b, n, ...)`` (patches, positions, masks, conditions) -> this process's
  part of axis 1, on the denoiser.
- ``gather_tokens(x)``: the inverse, on the denoiser.
- ``shard_lengths(lengths)``: tokens of each sample of a pack -> those of them in this process's part, on the denoiser.
- ``needs_all_tokens``: True on a module that mixes tokens in another way than ``attend`` (expert choice, dropping
  tokens): sequence parallelism has no rule for it and refuses the model.
- ``reduce_mean(x)``: mean over processes, for statistics of a batch.
- ``reduce_sum(x)``: sum over processes, on modules that learn from sums over the global batch (``Vq``).
- ``extend_rows(x, above, below, padding)``: rows of ``(b, c, t, h, w)`` that a convolution reads beyond the strip of a
  frame that this process has: a neighbour's, or padding at the frame's edge. None where a process has whole frames, so
  that a module pads in its own way.
- ``gather_pixels(x)``: pixels ``(n, h * w, d)`` of a strip -> those of the whole frame, on ``FrameAttention``.
- ``sum_strips(x)``: sum over the strips of a frame, on ``FrameGroupNorm``; None where a process has whole frames.
- ``piece_pixels``: how many pixels a network takes at a time, None by the device; 0 takes as few as it can, so that all
  processes of a group take their strips in equally many pieces.
- ``gather_rows(x)``: rows ``(n, d)`` of all processes one after the other in the order of their ranks; every process
  gives equally many; on the same modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

ExtendRows: TypeAlias = Callable[[Tensor, int, int, str], Tensor]
SumStrips: TypeAlias = Callable[[Tensor], Tensor]


def shard_tokens(x: Tensor) -> Tensor:
    """Keep all tokens ``(b, n, ...)``: the single-device identity."""
    return x


def gather_tokens(x: Tensor) -> Tensor:
    """Keep all tokens ``(b, n, ...)``: the single-device identity."""
    return x


def shard_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Keep all tokens of each sample of a pack: the single-device identity."""
    return lengths


def reduce_mean(x: Tensor) -> Tensor:
    """Keep the local mean: the single-device identity."""
    return x


def reduce_sum(x: Tensor) -> Tensor:
    """Keep the local sum: the single-device identity."""
    return x


def gather_rows(x: Tensor) -> Tensor:
    """Keep the own rows ``(n, d)``: the single-device identity."""
    return x


def gather_pixels(x: Tensor) -> Tensor:
    """Keep the pixels ``(n, h * w, d)`` of a whole frame: the single-device identity."""
    return x
