"""Sequence parallelism at the seams (Ulysses): the processes of a group share the tokens of one sample.

Everything outside attention works on a slice of the tokens; inside, an all-to-all trades the slice of all heads for
all tokens of a slice of the heads. Two collectives per attention: one for the stacked q, k and v, one for the output.
A token count that does not divide is padded behind; the padding is cut off before attention. A pack of samples is one
sequence like any other: attention has all its tokens and so its segments, the rest asks for this process's part of
each sample (``TokenSeam.lengths``). The group's members read
different samples, ``exchange`` them, and train on each in turn, so the plain SUM of gradients over all processes is
the single process's: each member's gradient holds its own tokens' part.

Reference: Jacobs et al. (2023), arXiv 2309.14509, Section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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
        ConfigError: If the model has no such seams, or a head count does not divide.
    """
    if layout.sequence == 1:
        return 0
    attentions = {name: module for name, module in model.named_modules() if "attend" in vars(module)}
    if not attentions or "shard_tokens" not in vars(model) or "gather_tokens" not in vars(model):
        raise ConfigError(
            f"parallel.sequence: got {layout.sequence}, but {type(model).__name__} has no token seams; needs 1"
        )
    for name, module in attentions.items():
        heads = getattr(module, "num_heads", None)
        if heads is not None:
            _check_heads(heads, layout.sequence, name)
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
        ends = list(accumulate(lengths))
        ends[-1] = size * self.layout.sequence  # padding is never attended to and is cut off: any sample may own it
        starts = [0, *ends[:-1]]
        return tuple(max(0, min(e, first + size) - max(s, first)) for s, e in zip(starts, ends, strict=True))

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
        _check_heads(q.shape[2], self.layout.sequence, "attend")
        qkv = self._to_heads(torch.stack((q, k, v)))  # (3, b, n, heads / s, head_dim)
        if key_mask is not None:
            key_mask = torch.cat(self.layout.gather_sequence(key_mask.contiguous()), 1)[:, : self.num_tokens]
        packed = {} if segments is None else {"segments": segments}
        out = local(qkv[0], qkv[1], qkv[2], key_mask=key_mask, **packed)
        return self._to_tokens(out)

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

    def _to_heads(self, x: Tensor) -> Tensor:
        degree = self.layout.sequence
        three, b, n_local, heads, dim = x.shape
        # one chunk of heads for each member, first axis
        chunks = x.view(three, b, n_local, degree, heads // degree, dim).permute(3, 0, 1, 2, 4, 5)
        parts = _swap(chunks, self.layout)  # (s, 3, b, n_local, heads / s, dim): chunk i holds member i's tokens
        whole = parts.permute(1, 2, 0, 3, 4, 5).reshape(three, b, degree * n_local, heads // degree, dim)
        return whole.narrow(2, 0, self.num_tokens)

    def _to_tokens(self, x: Tensor) -> Tensor:
        degree = self.layout.sequence
        b, _, heads_local, dim = x.shape
        padded = _pad_tokens(x, self._local() * degree)
        chunks = padded.view(b, degree, self._local(), heads_local, dim).transpose(0, 1)
        parts = _swap(chunks, self.layout)  # (s, b, n_local, heads / s, dim): chunk i holds member i's heads
        return parts.permute(1, 2, 0, 3, 4).reshape(b, self._local(), degree * heads_local, dim)


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
    """All-to-all of axis 0; its own inverse, so the backward pass is the same exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return layout.swap_sequence(x.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.layout.swap_sequence(gradients[0].contiguous()), None


class _Join(torch.autograd.Function):
    """All-gather along axis 1 whose backward pass takes the process's own slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.start, ctx.length = layout.sequence_rank * x.shape[1], x.shape[1]
        return torch.cat(layout.gather_sequence(x.contiguous()), 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].narrow(1, ctx.start, ctx.length), None


def _swap(x: Tensor, layout: Layout) -> Tensor:
    swapped: Tensor = _Swap.apply(x, layout)
    return swapped


def _pad_tokens(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[1]
    return x if missing == 0 else torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), 1)


def _check_heads(heads: int, sequence: int, name: str) -> None:
    if heads % sequence:
        raise ConfigError(
            f"parallel.sequence: must divide the attention heads, got sequence {sequence} and {heads} heads ({name}); "
            "change parallel.sequence or the model's number of heads"
        )


def _num_bytes(shape: list[int], dtype: torch.dtype) -> int:
    return prod(size for size in shape if size >= 0) * torch.empty((), dtype=dtype).element_size()
