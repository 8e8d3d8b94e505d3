"""How attention is dealt to a sequence group whose degree does not divide the heads, and moved there and back.

The heads of all queries lie on one line, and every member computes an equal part of it: some heads whole, of its first
and last perhaps only some queries. A head of which several members compute queries is sent to each of them; its keys'
and values' gradients come back from each and are summed. Only real tokens are sent, all in one all-to-all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ltd.nn.packing import Segments
from ltd.parallel.layout import Layout

Span = tuple[int, int]


@dataclass(frozen=True)
class Unit:
    """Neighbouring heads of which a member computes the same queries; without queries it needs no keys."""

    heads: Span
    """First head and the one after the last."""
    queries: Span
    """First query and the one after the last."""


@dataclass(frozen=True)
class Piece:
    """Some tokens and heads of the ``index``-th of several tensors ``(b, n, heads, head_dim)``."""

    index: int
    tokens: Span
    heads: Span

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """View the piece of these tensors."""
        whole = tensors[self.index]
        return whole[:, self.tokens[0] : self.tokens[1], self.heads[0] : self.heads[1]]

    def numel(self, row: int) -> int:
        """Count its elements, ``row`` of them for each token and head."""
        return row * (self.tokens[1] - self.tokens[0]) * (self.heads[1] - self.heads[0])


@dataclass(frozen=True)
class Route:
    """One exchange of pieces of tensors within a sequence group."""

    sent: tuple[tuple[Piece, ...], ...]
    """For each member, what of the tensors here goes there."""
    received: tuple[tuple[Piece, ...], ...]
    """For each member, where in the new tensors its pieces go, in the order in which it sends them."""
    before: tuple[Span, ...]
    """Tokens and heads of each tensor here."""
    after: tuple[Span, ...]
    """Tokens and heads of each new tensor."""
    sums: bool = False
    """Whether pieces that meet are summed: what is sent to several members comes back from each."""

    def back(self) -> Route:
        """Reverse the exchange: the route of the gradients."""
        return Route(self.received, self.sent, self.after, self.before, not self.sums)


@dataclass(frozen=True)
class Plan:
    """What one member computes of an attention, and how it gets there."""

    units: tuple[Unit, ...]
    """At least one, if only an empty one: every member takes part in every exchange, forward and backward."""
    to_heads: Route
    """From this member's tokens of q, k and v to q, k and v of each unit."""
    to_tokens: Route
    """From the output of each unit to this member's tokens of all heads."""


def deal(num_heads: int, num_tokens: int, degree: int) -> tuple[tuple[Unit, ...], ...]:
    """Cut the line of all heads' queries into equal parts, and each part where heads begin.

    Args:
        num_heads: Heads of the attention.
        num_tokens: Queries of each.
        degree: Members of the group.

    Returns:
        Each member's units; as many queries for each as for any other, but for one.
    """
    total = num_heads * num_tokens
    bounds = [total * member // degree for member in range(degree + 1)]
    return tuple(tuple(_units(first, end, num_tokens)) for first, end in pairwise(bounds))


def _units(first: int, end: int, num_tokens: int) -> Iterable[Unit]:
    if first == end:
        yield Unit((first // num_tokens, first // num_tokens), (0, 0))
    while first < end:
        head, query = divmod(first, num_tokens)
        whole = 0 if query else (end - first) // num_tokens
        if whole:
            yield Unit((head, head + whole), (0, num_tokens))
            first += whole * num_tokens
        else:
            stop = min(num_tokens, query + end - first)
            yield Unit((head, head + 1), (query, stop))
            first += stop - query


@functools.lru_cache(maxsize=64)
def plan(num_heads: int, num_tokens: int, degree: int, rank: int) -> Plan:
    """Lay out one attention for one member.

    Args:
        num_heads: Heads of the attention.
        num_tokens: Tokens of the whole sequence.
        degree: Members of the group; each holds ``ceil(num_tokens / degree)`` tokens, the last ones fewer real ones.
        rank: Which member.

    Returns:
        The plan; the members' routes fit each other.
    """
    dealt = deal(num_heads, num_tokens, degree)
    size = -(-num_tokens // degree)
    held = [(min(num_tokens, i * size), min(num_tokens, (i + 1) * size)) for i in range(degree)]
    mine = dealt[rank]
    sides = [(unit.queries, keys, keys) for unit in mine for keys in [_keys(unit, num_tokens)]]  # of q, k, v
    sizes = [(end - first, unit.heads[1] - unit.heads[0]) for unit, three in zip(mine, sides, strict=True)
             for first, end in three]  # fmt: skip
    to_heads = Route(
        sent=tuple(
            tuple(
                Piece(index, _meet(span, held[rank], origin=rank * size), unit.heads)
                for unit in units
                for index, span in enumerate((unit.queries, _keys(unit, num_tokens), _keys(unit, num_tokens)))
            )
            for units in dealt
        ),
        received=tuple(
            tuple(
                Piece(3 * i + index, _meet(span, tokens, origin=span[0]), (0, sizes[3 * i][1]))
                for i, three in enumerate(sides)
                for index, span in enumerate(three)
            )
            for tokens in held
        ),
        before=((size, num_heads),) * 3,
        after=tuple(sizes),
    )
    queries = _only_queries(to_heads)
    return Plan(mine, to_heads, Route(queries.received, queries.sent, queries.after, queries.before))


def _only_queries(route: Route) -> Route:
    """Take keys and values out of ``Plan.to_heads``: what is left is the way of the output, backwards."""
    sent = tuple(tuple(piece for piece in pieces if piece.index == 0) for pieces in route.sent)
    received = tuple(
        tuple(Piece(piece.index // 3, piece.tokens, piece.heads) for piece in pieces if piece.index % 3 == 0)
        for pieces in route.received
    )
    return Route(sent, received, route.before[:1], route.after[::3])


def _keys(unit: Unit, num_tokens: int) -> Span:
    return (0, num_tokens if unit.queries[0] < unit.queries[1] else 0)


def _meet(a: Span, b: Span, *, origin: int) -> Span:
    first = max(a[0], b[0])
    end = max(first, min(a[1], b[1]))
    return (first - origin, end - origin) if first < end else (0, 0)


class _Move(torch.autograd.Function):
    """Exchange pieces; the backward pass is the same along the way back."""

    @staticmethod
    def forward(ctx: Any, route: Route, layout: Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.route, ctx.layout = route, layout
        batch, dim = tensors[0].shape[0], tensors[0].shape[3]
        sent, received = (
            [[piece.numel(batch * dim) for piece in pieces] for pieces in side] for side in (route.sent, route.received)
        )
        buffer = tensors[0].new_empty(sum(map(sum, sent)))
        for piece, part in _parts(route.sent, sent, buffer):
            source = piece.of(tensors)
            part.view(source.shape).copy_(source)
        buffer = layout.swap_sequence_parts(buffer, [sum(sizes) for sizes in sent], [sum(sizes) for sizes in received])
        outputs = [buffer.new_zeros(batch, *size, dim) for size in route.after]
        for piece, part in _parts(route.received, received, buffer):
            target = piece.of(outputs)
            if route.sums:
                target.add_(part.view(target.shape))
            else:
                target.copy_(part.view(target.shape))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, *_Move.apply(ctx.route.back(), ctx.layout, *gradients)


def _parts(
    pieces: Sequence[Sequence[Piece]], sizes: Sequence[Sequence[int]], buffer: Tensor
) -> Iterable[tuple[Piece, Tensor]]:
    flat = [piece for member in pieces for piece in member]
    ends = list(accumulate(size for member in sizes for size in member))
    for piece, first, end in zip(flat, [0, *ends], ends, strict=False):
        yield piece, buffer[first:end]


def attend(
    local: Callable[..., Tensor],
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_tokens: int,
    key_mask: Tensor | None,
    segments: Segments | None,
) -> Tensor:
    """Attend over all tokens with this member's part of the heads and queries.

    Args:
        local: The single-device operation.
        layout: This process's position in its sequence group.
        q: ``(b, ceil(num_tokens / sequence), heads, head_dim)``; ``k`` and ``v`` alike.
        k: Keys.
        v: Values.
        num_tokens: Tokens of the whole sequence.
        key_mask: bool ``(b, num_tokens)``, True = keep.
        segments: Samples of the whole sequence of a pack.

    Returns:
        Like ``q``; zeros behind the last token.
    """
    own = plan(q.shape[2], num_tokens, layout.sequence, layout.sequence_rank)
    received: tuple[Tensor, ...] = _Move.apply(own.to_heads, layout, q, k, v)
    outputs = []
    for unit, queries, keys, values in zip(own.units, received[::3], received[1::3], received[2::3], strict=True):
        if queries.shape[1] == 0:
            outputs.append(queries)  # nothing to compute, but a way for the gradient: the others wait for it
            continue
        packed = {} if segments is None else {"segments": _cut(segments, unit.queries)}
        outputs.append(local(queries, keys, values, key_mask=key_mask, **packed))
    joined: tuple[Tensor] = _Move.apply(own.to_tokens, layout, *outputs)
    return joined[0]


def _cut(segments: Segments, queries: Span) -> Segments:
    """Keep the queries of a span, and all keys."""
    ends = list(accumulate(segments.q_lengths))
    lengths = (
        max(0, min(end, queries[1]) - max(first, queries[0])) for first, end in zip([0, *ends], ends, strict=False)
    )
    return Segments(tuple(lengths), segments.k_lengths)
