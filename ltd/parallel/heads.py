"""Who computes what of one attention in a sequence group, and how it gets there and back: one all-to-all each way.

Every head is cut into as many parts of its queries as there are members, along their tokens. All heads' parts lie on
one line, and every member takes an equal run of it: whole heads where the degree divides them, else at the ends of its
run some queries of a head that it shares. The keys and values of a shared head go to all that share it, and their
gradients come back from each and are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ltd.parallel.layout import Layout


@dataclass(frozen=True)
class Share:
    """Neighbouring heads of which one member computes the same queries."""

    #: Heads, of which it has the keys of all tokens.
    heads: range
    #: Members whose tokens are its queries.
    queries: range


def deal_heads(num_heads: int, degree: int) -> tuple[tuple[Share, ...], ...]:
    """Deal the work of one attention to the members of a group.

    Args:
        num_heads: Attention heads.
        degree: Members of the group.

    Returns:
        Each member's shares, one to three; every head meets every query once, and every member gets the same work.
    """
    dealt = []
    for member in range(degree):
        shares, part, end = [], member * num_heads, (member + 1) * num_heads
        while part < end:
            head, first = divmod(part, degree)
            whole = 0 if first else (end - part) // degree
            stop = degree if whole else min(degree, first + end - part)
            shares.append(Share(range(head, head + max(whole, 1)), range(first, stop)))
            part += whole * degree or stop - first
        dealt.append(tuple(shares))
    return tuple(dealt)


class HeadExchange:
    """Trade tokens of all heads for heads of all tokens, within the sequence group of a process.

    Args:
        layout: This process's position in its sequence group.
    """

    def __init__(self, layout: Layout) -> None:
        self.me, self.degree = layout.sequence_rank, layout.sequence
        self._layout = layout
        self._handle = id(layout)
        _LAYOUTS[self._handle] = layout

    def shares(self, num_heads: int) -> tuple[Share, ...]:
        """List what this member computes."""
        return deal_heads(num_heads, self.degree)[self.me]

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Trade this member's tokens of all heads for all tokens of its shares.

        Args:
            q: ``(b, n_local, heads, head_dim)``, as many tokens on all members; ``k`` and ``v`` alike.
            k: Keys.
            v: Values.

        Returns:
            Of each share, queries ``(b, len(queries) * n_local, len(heads), head_dim)``, keys and values of all tokens.
        """
        dealt = deal_heads(q.shape[2], self.degree)
        mine = dealt[self.me]
        edges = sorted({edge for shares in dealt for share in shares for edge in (share.heads.start, share.heads.stop)})
        sizes = [end - first for first, end in pairwise(edges)]
        # Split, not sliced: the gradient of every slice would be as large as the whole.
        pieces = [dict(zip(edges, x.permute(2, 0, 1, 3).split(sizes), strict=False)) for x in (q, k, v)]
        rows = [_rows(pieces, shares, self.me) for shares in dealt]
        receive = [[size for share in mine for size in _sizes(share, member)] for member in range(self.degree)]
        received = self._swap(rows, [sum(member) for member in receive])
        parts = received.split([size for member in receive for size in member])
        every = 3 * len(mine)
        return [
            (
                _join_tokens([parts[member * every + 3 * index] for member in share.queries]),
                _join_tokens(parts[3 * index + 1 :: every]),
                _join_tokens(parts[3 * index + 2 :: every]),
            )
            for index, share in enumerate(mine)
        ]

    def to_tokens(self, outputs: Sequence[Tensor], num_heads: int) -> Tensor:
        """Trade the outputs of this member's shares for its tokens of all heads: the way back of the queries.

        Args:
            outputs: Of each share, ``(b, len(queries) * n_local, len(heads), head_dim)``.
            num_heads: Attention heads.

        Returns:
            ``(b, n_local, num_heads, head_dim)``.
        """
        dealt = deal_heads(num_heads, self.degree)
        rows: list[list[Tensor]] = [[] for _ in range(self.degree)]
        for output, share in zip(outputs, dealt[self.me], strict=True):
            chunks = output.permute(2, 0, 1, 3).chunk(len(share.queries), 2)  # heads b n_local d
            for member, chunk in zip(share.queries, chunks, strict=True):
                rows[member].append(chunk)
        receive = [sum(len(share.heads) for share in shares if self.me in share.queries) for shares in dealt]
        # Of one member's tokens the heads come in order: they follow each other on the line that was dealt.
        return self._swap(rows, receive).permute(1, 2, 0, 3)

    def _swap(self, rows: Sequence[Sequence[Tensor]], receive: list[int]) -> Tensor:
        """Send every member its rows, each ``(heads, b, n, d)``; receive ``(sum(receive), b, n, d)``, by member."""
        send = [sum(len(row) for row in member) for member in rows]
        swapped: Tensor = _exchange(torch.cat([row for member in rows for row in member]), self._handle, send, receive)
        return swapped


def _rows(pieces: list[dict[int, Tensor]], shares: Sequence[Share], me: int) -> list[Tensor]:
    """List what of q, k and v, by first head, goes to the member of these shares: each ``(heads, b, n_local, d)``."""
    rows: list[Tensor] = []
    for share in shares:
        for by_head in pieces if me in share.queries else pieces[1:]:
            rows += [piece for first, piece in by_head.items() if first in share.heads]
    return rows


def _sizes(share: Share, member: int) -> tuple[int, int, int]:
    """Count the heads of q, k and v that come from a member for a share."""
    num_heads = len(share.heads)
    return num_heads if member in share.queries else 0, num_heads, num_heads


def _join_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Join ``(heads, b, n_local, d)`` of several members to ``(b, n, heads, d)``."""
    return torch.cat(tuple(parts), 2).permute(1, 2, 0, 3)


# An operation of torch's own kind, not an autograd function: torch.compile leaves it as it is and gets its gradient
# right, so that a block with it in the middle is one graph. Such operations take numbers, not objects.
_LAYOUTS: WeakValueDictionary[int, Layout] = WeakValueDictionary()


@torch.library.custom_op("ltd::exchange", mutates_args=())
def _exchange(x: Tensor, handle: int, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    return _LAYOUTS[handle].swap_sequence(x.contiguous(), send, receive)


@_exchange.register_fake
def _(x: Tensor, handle: int, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    return x.new_empty(sum(receive), *x.shape[1:])


def _keep_sizes(ctx: Any, inputs: tuple[Tensor, int, list[int], list[int]], output: Tensor) -> None:
    ctx.handle, ctx.send, ctx.receive = inputs[1:]


def _send_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return _exchange(gradient, ctx.handle, ctx.receive, ctx.send), None, None, None


_exchange.register_autograd(_send_back, setup_context=_keep_sizes)
