"""Sequence parallelism at the seams (Ulysses): the processes of a group share the tokens of one sample.

Everything outside attention works on a slice of the tokens; inside, an all-to-all trades the slice of all heads for
all tokens of a share of the heads (``deal_heads``: any number of heads). Two collectives per attention: one for q, k
and v together, one for the output. A token count that does not divide is padded behind; the padding is cut off before
attention. A pack of samples is one sequence like any other: attention has all its keys and so its segments, the rest
asks for this process's part of each sample (``TokenSeam.lengths``). The group's members read
different samples, ``exchange`` them, and train on each in turn, so the plain SUM of gradients over all processes is
the single process's: each member's gradient holds its own tokens' part.

Reference: Jacobs et al. (2023), arXiv 2309.14509, Section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.nn.packing import Segments
from ltd.parallel.layout import Layout

_MAX_NDIM = 8

Attend = Callable[..., Tensor]


def shard(model: nn.Module, layout: Layout) -> int:
    """Swap the seams of a model for those of the layout's sequence degree; nothing changes at degree 1.

    Args:
        model: Denoiser with ``shard_tokens`` and ``gather_tokens``; modules with ``attend`` are its self-attentions.
        layout: This process's position in its sequence group.

    Returns:
        Number of attentions that were swapped.

    Raises:
        ConfigError: If the model has no such seams, or a module declares that it needs all tokens.
    """
    if layout.sequence == 1:
        return 0
    attentions = {name: module for name, module in model.named_modules() if "attend" in vars(module)}
    if not attentions or "shard_tokens" not in vars(model) or "gather_tokens" not in vars(model):
        raise ConfigError(
            f"parallel.sequence: got {layout.sequence}, but {type(model).__name__} has no token seams; needs 1"
        )
    for name, module in model.named_modules():
        if getattr(module, "needs_all_tokens", False):
            raise ConfigError(
                f"parallel.sequence: got {layout.sequence}, but {name} ({type(module).__name__}) works on all tokens "
                "at once and has no rule for a part of them; needs 1"
            )
    seam = TokenSeam(layout)
    seams: Any = model
    seams.shard_tokens, seams.gather_tokens = seam, seam.gather
    if "shard_lengths" in vars(model):
        seams.shard_lengths = seam.lengths
    for module in attentions.values():
        attention: Any = module
        attention.attend = functools.partial(seam.attend, attention.attend)
    return len(attentions)


@dataclass(frozen=True)
class Share:
    """What one member of a sequence group computes in attention."""

    #: Heads, of which it has the keys of all tokens.
    heads: range
    #: Members whose tokens are its queries: all, unless several members share a head.
    queries: range


@functools.lru_cache(maxsize=64)
def deal_heads(num_heads: int, degree: int) -> tuple[Share, ...]:
    """Deal the work of one attention to the members of a group, as evenly as it can be cut.

    With at least as many heads as members, each gets whole heads, some one more than others. With fewer, each member
    gets one head, and the members of a head share its queries.

    Args:
        num_heads: Attention heads.
        degree: Members of the group.

    Returns:
        One share per member; every head meets every query once.
    """
    if num_heads >= degree:
        return tuple(Share(heads, range(degree)) for heads in _cut(num_heads, degree))
    shares = []
    for head, members in enumerate(_cut(degree, num_heads)):
        shares += [Share(range(head, head + 1), queries) for queries in _cut(degree, len(members))]
    return tuple(shares)


class TokenSeam:
    """What the seams of one model share: the layout, and the token count of the forward pass that is running.

    Args:
        layout: This process's position in its sequence group.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.num_tokens = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Keep this process's part of the tokens.

        Args:
            x: ``(b, n, ...)``, the same on all members of the group.

        Returns:
            ``(b, ceil(n / sequence), ...)``; the last members' parts may end in zeros.
        """
        self.num_tokens = x.shape[1]
        padded = _pad_tokens(x, self._local() * self.layout.sequence)
        return padded.narrow(1, self.layout.sequence_rank * self._local(), self._local())

    def gather(self, x: Tensor) -> Tensor:
        """Join all members' tokens; the backward pass takes this process's slice of the gradient, without a sum.

        Args:
            x: ``(b, ceil(n / sequence), ...)``.

        Returns:
            ``(b, n, ...)``, the same on all members.
        """
        joined: Tensor = _Join.apply(x, self.layout)
        return joined.narrow(1, 0, self.num_tokens)

    def lengths(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Count the tokens of each sample of a pack that lie in this process's part.

        Args:
            lengths: Tokens of each sample of the whole sequence, in order.

        Returns:
            As many numbers, some of them 0; the padding behind counts to the last sample.
        """
        total = sum(lengths)
        size = -(-total // self.layout.sequence)
        first = self.layout.sequence_rank * size
        # Padding is never attended to and is cut off: any sample may own it.
        padding = size * self.layout.sequence - total
        return _overlaps((*lengths[:-1], lengths[-1] + padding), first, size)

    def attend(
        self,
        local: Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Attend over all tokens with this process's share of the heads.

        Args:
            local: The single-device operation.
            q: ``(b, n_local, heads, head_dim)``; ``k`` and ``v`` alike.
            k: Keys.
            v: Values.
            key_mask: bool ``(b, n_local)``, True = keep.
            segments: Samples of the whole sequence of a pack.

        Returns:
            ``(b, n_local, heads, head_dim)``.
        """
        me, degree = self.layout.sequence_rank, self.layout.sequence
        shares = deal_heads(q.shape[2], degree)
        mine = shares[me]
        q, k, v = self._to_heads(q, k, v, shares)
        first = mine.queries.start * self._local()
        num_queries = max(0, min(q.shape[1], self.num_tokens - first))
        q, k, v = q[:, :num_queries], k[:, : self.num_tokens], v[:, : self.num_tokens]
        if key_mask is not None:
            key_mask = torch.cat(self.layout.gather_sequence(key_mask.contiguous()), 1)[:, : self.num_tokens]
        out = q  # without queries, in a part that is all padding, there is nothing to attend
        if num_queries:
            packed = {} if segments is None else {"segments": _narrow(segments, first, num_queries)}
            out = local(q, k, v, key_mask=key_mask, **packed)
        return self._to_tokens(out, shares)

    def pin(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Bind a function to the token count of the running forward pass, for when it is called again later."""
        num_tokens = self.num_tokens

        def pinned(*args: Any, **kwargs: Any) -> Any:
            before, self.num_tokens = self.num_tokens, num_tokens
            try:
                return forward(*args, **kwargs)
            finally:
                self.num_tokens = before

        return pinned

    def _local(self) -> int:
        return -(-self.num_tokens // self.layout.sequence)

    def _to_heads(self, q: Tensor, k: Tensor, v: Tensor, shares: Sequence[Share]) -> tuple[Tensor, Tensor, Tensor]:
        """Trade this member's tokens of all heads for its share: ``(b, n_local, heads, d)`` -> ``(b, n, share, d)``."""
        me = self.layout.sequence_rank
        mine, num_heads = shares[me], len(shares[me].heads)
        q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))  # heads b n_local d
        rows = []
        for share in shares:
            heads = slice(share.heads.start, share.heads.stop)
            rows += [x[heads] for x in ((q, k, v) if me in share.queries else (k, v))]
        send = [len(share.heads) * (3 if me in share.queries else 2) for share in shares]
        receive = [num_heads * (3 if member in mine.queries else 2) for member in range(len(shares))]
        received = _swap(torch.cat(rows), self.layout, send, receive).split(receive)
        queries = [part[:num_heads] for member, part in enumerate(received) if member in mine.queries]
        keys = [part[-2 * num_heads : -num_heads] for part in received]
        values = [part[-num_heads:] for part in received]
        return _join_tokens(queries), _join_tokens(keys), _join_tokens(values)

    def _to_tokens(self, x: Tensor, shares: Sequence[Share]) -> Tensor:
        """Trade this member's share of the output for its tokens of all heads: the way back of ``_to_heads``."""
        me = self.layout.sequence_rank
        mine, num_heads = shares[me], len(shares[me].heads)
        padded = _pad_tokens(x, self._local() * len(mine.queries)).permute(2, 0, 1, 3)  # heads b n d
        send = [num_heads if member in mine.queries else 0 for member in range(len(shares))]
        receive = [len(share.heads) if me in share.queries else 0 for share in shares]
        chunks = torch.cat(padded.split(self._local(), 2))
        return _swap(chunks, self.layout, send, receive).permute(1, 2, 0, 3)


def exchange(tensors: Mapping[str, Tensor], layout: Layout) -> list[dict[str, Tensor]]:
    """Deal every member's batch to all members of the sequence group.

    Args:
        tensors: This process's batch by name, on one device; the same names and dtypes on all members, any shapes.
        layout: This process's position in its sequence group.

    Returns:
        The members' batches by sequence rank; at degree 1 the process's own alone.
    """
    if layout.sequence == 1:
        return [dict(tensors)]
    present = {name: tensor.contiguous() for name, tensor in tensors.items()}
    shapes = torch.full((len(present), _MAX_NDIM), -1, dtype=torch.int64, device=layout.device)
    for row, tensor in enumerate(present.values()):
        shapes[row, : tensor.ndim] = torch.tensor(tensor.shape, dtype=torch.int64)
    all_shapes = [member.tolist() for member in layout.gather_sequence(shapes)]
    sizes = [
        sum(_num_bytes(row, tensor.dtype) for row, tensor in zip(rows, present.values(), strict=True))
        for rows in all_shapes
    ]
    payload = torch.zeros(max(sizes), dtype=torch.uint8, device=layout.device)
    if present:
        own = [tensor.reshape(-1).view(torch.uint8).to(layout.device) for tensor in present.values()]
        payload[: sizes[layout.sequence_rank]] = torch.cat(own)
    batches = []
    for rows, received in zip(all_shapes, layout.gather_sequence(payload), strict=True):
        batch: dict[str, Tensor] = {}
        offset = 0
        for row, (name, tensor) in zip(rows, present.items(), strict=True):
            length = _num_bytes(row, tensor.dtype)
            # cloned: a view of another dtype needs its own alignment
            piece = received[offset : offset + length].clone().view(tensor.dtype)
            batch[name] = piece.view([size for size in row if size >= 0]).to(tensor.device)
            offset += length
        batches.append(batch)
    return batches


class _Swap(torch.autograd.Function):
    """All-to-all of parts of axis 0; the backward pass is the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, send: list[int], receive: list[int]) -> Tensor:
        ctx.layout, ctx.send, ctx.receive = layout, send, receive
        return layout.swap_sequence(x.contiguous(), send, receive)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.layout.swap_sequence(gradients[0].contiguous(), ctx.receive, ctx.send), None, None, None


class _Join(torch.autograd.Function):
    """All-gather along axis 1 whose backward pass takes the process's own slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.start, ctx.length = layout.sequence_rank * x.shape[1], x.shape[1]
        return torch.cat(layout.gather_sequence(x.contiguous()), 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].narrow(1, ctx.start, ctx.length), None


def _swap(x: Tensor, layout: Layout, send: list[int], receive: list[int]) -> Tensor:
    """Send ``(sum(send), b, n, d)`` in parts by member, receive ``(sum(receive), b, n, d)`` likewise."""
    swapped: Tensor = _Swap.apply(x, layout, send, receive)
    return swapped


def _join_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Join ``(heads, b, n_local, d)`` of several members to ``(b, n, heads, d)``."""
    return torch.cat(tuple(parts), 2).permute(1, 2, 0, 3)


def _pad_tokens(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[1]
    return x if missing == 0 else torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), 1)


def _narrow(segments: Segments, first: int, length: int) -> Segments:
    """Keep the queries ``[first, first + length)`` of a pack; its keys stay whole."""
    return Segments(_overlaps(segments.q_lengths, first, length), segments.k_lengths)


def _overlaps(lengths: Sequence[int], first: int, size: int) -> tuple[int, ...]:
    """Count the tokens of each sample of a pack that lie in ``[first, first + size)``."""
    ends = list(accumulate(lengths))
    starts = [0, *ends[:-1]]
    return tuple(max(0, min(e, first + size) - max(s, first)) for s, e in zip(starts, ends, strict=True))


def _cut(number: int, parts: int) -> list[range]:
    """Cut ``range(number)`` into consecutive parts whose lengths differ by one at most, the longer ones first."""
    ends = list(accumulate(number // parts + (part < number % parts) for part in range(parts)))
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _num_bytes(shape: list[int], dtype: torch.dtype) -> int:
    return prod(size for size in shape if size >= 0) * torch.empty((), dtype=dtype).element_size()
