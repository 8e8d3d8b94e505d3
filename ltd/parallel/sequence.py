"""Sequence parallelism at the seams (Ulysses): the processes of a group share the tokens of one sample.

Everything outside attention works on a slice of the tokens; inside, an all-to-all trades the slice of all heads for
all tokens of a share of the heads, of which there may be any number (``heads``). Two collectives per attention: one for
q, k and v together, one for the output. A token count that does not divide is padded behind; the padding is cut off
before attention. A pack of samples is one sequence like any other: attention has all its keys and so its segments, the
rest asks for this process's part of each sample (``TokenSeam.lengths``). The group's members read different samples,
``exchange`` them, and train on each in turn, so the plain SUM of gradients over all processes is the single process's:
each member's gradient holds its own tokens' part.

Reference: Jacobs et al. (2023), arXiv 2309.14509, Section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.nn.packing import Segments
from ltd.parallel.heads import HeadExchange
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


class TokenSeam:
    """What the seams of one model share: the layout, and the token count of the forward pass that is running.

    Args:
        layout: This process's position in its sequence group.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.heads = HeadExchange(layout)
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
        if key_mask is not None:
            key_mask = torch.cat(self.layout.gather_sequence(key_mask.contiguous()), 1)[:, : self.num_tokens]
        outputs = []
        shares = self.heads.shares(q.shape[2])
        for share, (queries, keys, values) in zip(shares, self.heads.to_heads(q, k, v), strict=True):
            first = share.queries.start * self._local()
            length = max(0, min(queries.shape[1], self.num_tokens - first))
            if length == 0:  # all padding: there is nothing to attend, but the gradient has to pass
                outputs.append(queries)
                continue
            packed = {} if segments is None else {"segments": _narrow(segments, first, length)}
            keys, values = keys[:, : self.num_tokens], values[:, : self.num_tokens]
            output = local(queries[:, :length], keys, values, key_mask=key_mask, **packed)
            outputs.append(_pad_tokens(output, queries.shape[1]))
        return self.heads.to_tokens(outputs, q.shape[2])

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


class _Join(torch.autograd.Function):
    """All-gather along axis 1 whose backward pass takes the process's own slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.start, ctx.length = layout.sequence_rank * x.shape[1], x.shape[1]
        return torch.cat(layout.gather_sequence(x.contiguous()), 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].narrow(1, ctx.start, ctx.length), None


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


def _num_bytes(shape: list[int], dtype: torch.dtype) -> int:
    return prod(size for size in shape if size >= 0) * torch.empty((), dtype=dtype).element_size()
