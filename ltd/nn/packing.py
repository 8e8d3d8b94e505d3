"""Samples of different sizes laid one behind another in one token sequence, without padding.

A pack is a batch of one row: attention is block-diagonal (``Segments``), and what belongs to a sample (its modulation)
is computed once per sample and met with that sample's tokens only (``by_sample``). Knows nothing of what tokens mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.nn.patch import grid_positions, patchify, token_grid, unpatchify
from ltd.shapes import VideoShape


@dataclass(frozen=True)
class Segments:
    """Blocks of a block-diagonal attention: queries of block i read the keys of block i only.

    Raises:
        ValueError: If the two sides differ in their number of blocks, a length is negative, or queries have no key.
    """

    q_lengths: tuple[int, ...]
    """Queries of every block, in order; a block may have none."""
    k_lengths: tuple[int, ...]
    """Keys of every block, in order; at least one where there are queries."""

    def __post_init__(self) -> None:
        if len(self.q_lengths) != len(self.k_lengths):
            raise ValueError(f"segments: got {len(self.q_lengths)} blocks of queries, {len(self.k_lengths)} of keys")
        for index, (num_queries, num_keys) in enumerate(zip(self.q_lengths, self.k_lengths, strict=True)):
            if num_queries < 0 or num_keys < (num_queries > 0):
                raise ValueError(f"segments: block {index} has {num_queries} queries and {num_keys} keys, needed a key")


@dataclass(frozen=True)
class Repeats:
    """The last key of every block stands for several equal ones, such as the padding of a text that is read."""

    counts: tuple[int, ...]
    """How many; one number for whole tensors, one per block of a pack. 0 = the key is not read."""
    logs: Tensor
    """Logarithms of the counts, float32 or wider: what a softmax adds to the key's score."""

    @classmethod
    def of(cls, counts: tuple[int, ...], like: Tensor) -> Repeats:
        """Make them for keys of a tensor's device, in its dtype or float32."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return cls(counts, torch.tensor(counts, dtype=dtype).log().to(like.device))

    def bias(self, num_keys: int, blocks: Sequence[int] = (0,)) -> Tensor:
        """Lay out what is added to the scores of some blocks of as many keys, ``(blocks, 1, 1, num_keys)``."""
        logs = self.logs if len(self.counts) == len(blocks) else self.logs[list(blocks)]
        return F.pad(logs.reshape(-1, 1, 1, 1), (num_keys - 1, 0))

    def spread(self, keys: Tensor, lengths: Sequence[int] | None) -> Tensor:
        """Write the repeated keys ``(b, m, ...)`` out; ``lengths`` of the blocks of a pack."""
        parts = [keys] if lengths is None else keys.split(list(lengths), 1)
        pairs = zip(parts, self.counts, strict=True)
        spread = [torch.cat((x[:, :-1], x[:, -1:].expand(-1, count, *x.shape[2:])), 1) for x, count in pairs]
        return torch.cat(spread, 1)


@dataclass(frozen=True)
class Packing:
    """How the tokens of a pack lie in the sequence: what a block has to know besides the tokens."""

    attention: Segments
    """Blocks of self-attention: the whole sequence's, whatever part of the tokens this process holds."""
    lengths: tuple[int, ...]
    """Tokens of every sample that this process holds."""
    text: Segments | None = None
    """Blocks of cross-attention: ``lengths`` tokens read each sample's text."""


def by_sample(
    operation: Callable[..., Tensor],
    lengths: Sequence[int] | None,
    tokens: Sequence[Tensor],
    vectors: Sequence[Tensor],
) -> Tensor:
    """Apply an operation of tokens and of one vector per sample, without a copy of the vector for every token.

    Args:
        operation: Takes tokens ``(b, n, ...)``, then vectors ``(b, 1, ...)``; works on every row alike.
        lengths: Tokens of each sample of a pack; None for whole tensors, which are passed as they are.
        tokens: ``(1, sum(lengths), ...)`` each.
        vectors: ``(samples, 1, ...)`` each.

    Returns:
        ``(1, sum(lengths), ...)``.
    """
    if lengths is None:
        return operation(*tokens, *vectors)
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]  # neighbours of one length are one call
    # Split, not sliced: the gradients of slices are tensors of the whole pack each.
    rows = zip(*(x.split([length * count for length, count in runs], 1) for x in tokens), strict=True)
    own = zip(*(v.split([count for _, count in runs]) for v in vectors), strict=True)
    parts = [
        operation(*(x.unflatten(1, (count, length)).squeeze(0) for x in given), *told).flatten(0, 1)
        for (length, count), given, told in zip(runs, rows, own, strict=True)
        if length
    ]
    return torch.cat(parts).unsqueeze(0)


def pack_latents(latents: Sequence[Tensor], patch: tuple[int, int, int]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Cut latents of any sizes into the tokens of one sequence.

    Args:
        latents: Samples ``(c, t, h, w)``.
        patch: Latent cells per token along (t, h, w).

    Returns:
        Patches ``(1, n, pt * ph * pw * c)``; positions ``(1, n, 3)``, float32, each sample's from 0; tokens per sample.

    Raises:
        ValueError: If an axis does not divide by the patch.
    """
    patches = [patchify(x.unsqueeze(0), patch) for x in latents]
    positions = [grid_positions(token_grid(VideoShape(*x.shape[1:]), patch), x.device) for x in latents]
    return torch.cat(patches, 1), torch.cat(positions, 1), tuple(part.shape[1] for part in patches)


def unpack_latents(tokens: Tensor, shapes: Sequence[tuple[int, int, int]], patch: tuple[int, int, int]) -> list[Tensor]:
    """Put a sequence's tokens back together: the inverse of ``pack_latents``.

    Args:
        tokens: ``(1, n, pt * ph * pw * c)``.
        shapes: Latent cells (t, h, w) of every sample.
        patch: Latent cells per token along (t, h, w).

    Returns:
        Samples ``(c, t, h, w)``.
    """
    grids = [token_grid(VideoShape(*shape), patch) for shape in shapes]
    parts = tokens.split([t * h * w for t, h, w in grids], 1)
    return [unpatchify(part, grid, patch).squeeze(0) for part, grid in zip(parts, grids, strict=True)]


def pack_text(text: Tensor, mask: Tensor) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
    """Lay the real text tokens of all samples one behind another; waits for the mask, once.

    A sample without text keeps one token of zeros: a kernel needs a key, and the gradient reaches the same parameters
    whatever the texts are, as it must where processes sum gradients. Whoever reads the text discards that token.

    Args:
        text: ``(b, m, d)``.
        mask: Bool ``(b, m)``, True = a real token.

    Returns:
        Tokens ``(1, n, d)``; tokens per sample; which samples have text, bool ``(b, 1)``, None when all have.
    """
    counts: list[int] = mask.sum(1).tolist()
    if 0 not in counts:
        return text[mask].unsqueeze(0), tuple(counts), None
    some = mask.any(1, keepdim=True)
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    kept = torch.where(mask[..., None], text, 0)[mask | (first & ~some)]
    return kept.unsqueeze(0), tuple(max(count, 1) for count in counts), some


def mean_by_sample(tokens: Tensor, lengths: Sequence[int], some: Tensor | None) -> Tensor:
    """Average the tokens of each sample: what ``masked_mean`` is to rows of padded tokens.

    Args:
        tokens: ``(1, sum(lengths), d)``.
        lengths: Tokens of each sample.
        some: Which samples to average, bool ``(samples, 1)``; None = all.

    Returns:
        ``(samples, d)``; zero where a sample is left out, or has no token.
    """
    parts = tokens.split(list(lengths), 1)
    means = torch.cat([part.sum(1) / max(part.shape[1], 1) for part in parts])
    return means if some is None else torch.where(some, means, 0)
