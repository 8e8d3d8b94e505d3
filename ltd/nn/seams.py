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
- ``gather_rows(x)``: rows ``(n, d)`` of all processes one after the other in the order of their ranks; every process
  gives equally many; on the same modules.
"""

from __future__ import annotations

from torch import Tensor


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
