"""Strips of frames at the seams of convolutional models: the processes of a sequence group share the rows of a frame.

Each member has a strip of latent rows through the whole network. A convolution that reads beyond it gets the rows of
its neighbours, attention over a frame the pixels of all, a norm over a frame the sums of all: what a member computes
is what one process computes at these rows, and nothing is computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.parallel.layout import Layout
from ltd.parallel.sequence import exchange

_SEAMS = ("extend_rows", "gather_pixels", "sum_strips", "piece_pixels")


@contextlib.contextmanager
def strips(model: nn.Module, rows: int, layout: Layout) -> Iterator[slice]:
    """Swap the row seams of a model for those of the sequence group, for as long as the context lasts.

    Args:
        model: A model whose convolutions have ``extend_rows``; without gradients.
        rows: Latent rows of the frames that it will be given parts of.
        layout: This process's position in its sequence group.

    Yields:
        This process's latent rows.

    Raises:
        ConfigError: If the model has no row seams, or there are too few rows for the group.
    """
    members = layout.sequence
    if members == 1:
        yield slice(0, rows)
        return
    modules = [module for module in model.modules() if any(name in vars(module) for name in _SEAMS)]
    if not any("extend_rows" in vars(module) for module in modules):
        raise ConfigError(
            f"parallel.sequence: got {members}, but {type(model).__name__} has no row seams, so that strips of a frame "
            "would differ from the whole; needs 1"
        )
    edges: list[tuple[int, ...]] = [vars(module).get("edges", (0, 0, 1, 1)) for module in modules]
    reach = max(1, *(side for _, _, *sides in edges for side in sides))
    if rows // members < reach:
        raise ConfigError(
            f"parallel.sequence: got {members}, needed at most {max(rows // reach, 1)} for {rows} latent rows: "
            f"convolutions read up to {reach} beyond a strip"
        )
    cuts = [rows * member // members for member in range(members + 1)]
    seam = RowSeam(layout, [stop - start for start, stop in pairwise(cuts)])
    before: list[tuple[nn.Module, str, Any]] = []
    swapped: dict[str, Any] = {
        "extend_rows": seam.extend,
        "gather_pixels": seam.gather_pixels,
        "sum_strips": seam.sum,
        "piece_pixels": 0,
    }
    try:
        for module in modules:
            for name in _SEAMS:
                if name in vars(module):
                    before.append((module, name, getattr(module, name)))
                    setattr(module, name, swapped[name])
        yield slice(cuts[layout.sequence_rank], cuts[layout.sequence_rank + 1])
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class RowSeam:
    """What the row seams of one model share.

    Args:
        layout: This process's position in its sequence group.
        rows: Latent rows of each member, from top to bottom.
    """

    def __init__(self, layout: Layout, rows: Sequence[int]) -> None:
        self.layout = layout
        self.rows = list(rows)

    def extend(self, x: Tensor, above: int, below: int, padding: str) -> Tensor:
        """Put the neighbours' rows around a strip.

        Args:
            x: ``(b, c, t, h, w)``, the same but for h on all members; at least ``above`` and ``below`` rows.
            above: Rows to get from the previous member; at the top of the frame they are padding.
            below: Rows to get from the next member; at its bottom likewise.
            padding: "zeros", or "replicate" for the edge's row again.

        Returns:
            ``(b, c, t, above + h + below, w)``, channels-last in memory.
        """
        rank, last = self.layout.sequence_rank, self.layout.sequence - 1
        b, c, t, h, w = x.shape
        frames = x.permute(3, 0, 2, 4, 1)  # h b t w c: rows outermost
        out = x.new_empty(b, t, above + h + below, w, c).permute(2, 0, 1, 3, 4)
        out[above : above + h] = frames
        send, receive = [0] * (last + 1), [0] * (last + 1)
        parts = []
        if rank > 0:
            send[rank - 1], receive[rank - 1] = below, above
            parts.append(frames[:below])
        if rank < last:
            send[rank + 1], receive[rank + 1] = above, below
            parts.append(frames[h - above :])
        received = self.layout.swap_sequence(torch.cat(parts).contiguous(), send, receive)
        top, bottom = out[:above], out[above + h :]
        _fill(top, received[:above] if rank > 0 else None, frames[:1], padding)
        _fill(bottom, received[len(received) - below :] if rank < last else None, frames[-1:], padding)
        return out.permute(1, 4, 2, 0, 3)

    def gather_pixels(self, x: Tensor) -> Tensor:
        """Collect the pixels of a frame.

        Args:
            x: ``(n, h * w, d)``, the own strip's in row-major order.

        Returns:
            ``(n, H * w, d)``, those of all strips from top to bottom.
        """
        scale = x.shape[1] // self.rows[self.layout.sequence_rank]
        parts = gather_parts(x, [scale * count for count in self.rows], self.layout, axis=1, everywhere=True)
        assert parts is not None
        return torch.cat(parts, 1)

    def sum(self, x: Tensor) -> Tensor:
        """Sum a tensor of one shape over the members."""
        return torch.stack(self.layout.gather_sequence(x.contiguous())).sum(0)


def share_first(tensor: Tensor, layout: Layout) -> Tensor:
    """Give every member of the sequence group the first member's tensor.

    Args:
        tensor: Any shape, of one dtype on all members; its values are read on the first member only.
        layout: This process's position in its sequence group.

    Returns:
        The first member's tensor, on the device of this process's.
    """
    own = tensor if layout.sequence_rank == 0 else tensor.new_empty(0)
    return exchange({"tensor": own}, layout)[0]["tensor"]


def gather_parts(
    part: Tensor, sizes: Sequence[int], layout: Layout, *, axis: int, everywhere: bool
) -> list[Tensor] | None:
    """Collect the parts of the members of the sequence group, which may differ in size along one axis.

    Args:
        part: This member's, ``sizes[sequence_rank]`` long along ``axis``; otherwise of one shape and dtype.
        sizes: Length of each member's part, the same list on all members.
        layout: This process's position in its sequence group.
        axis: Axis along which the parts differ.
        everywhere: Whether all members receive the parts; otherwise the first alone does, which spares the others
            the memory.

    Returns:
        The members' parts by sequence rank; None on members that receive nothing.
    """
    if layout.sequence_group is None:
        return [part]
    shape = list(part.shape)
    shape[axis] = max(sizes)
    padded = part.new_zeros(shape)
    padded.narrow(axis, 0, part.shape[axis]).copy_(part)
    if everywhere:
        received: list[Tensor] | None = layout.gather_sequence(padded)
    else:
        layout.collectives += 1
        is_first = layout.sequence_rank == 0
        received = [torch.empty_like(padded) for _ in sizes] if is_first else None
        first = layout.global_rank - layout.sequence_rank
        dist.gather(padded, received, dst=first, group=layout.sequence_group)
    if received is None:
        return None
    return [whole.narrow(axis, 0, size) for whole, size in zip(received, sizes, strict=True)]


def _fill(room: Tensor, received: Tensor | None, edge: Tensor, padding: str) -> None:
    """Fill rows beyond a strip: with what a neighbour sent, or with padding."""
    if received is not None:
        room.copy_(received)
    elif padding == "zeros":
        room.zero_()
    else:
        room.copy_(edge.expand_as(room))
