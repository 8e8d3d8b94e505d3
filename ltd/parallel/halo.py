"""Collectives for work that a sequence group splits into parts of one tensor. Knows no model and no overlap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ltd.parallel.layout import Layout
from ltd.parallel.sequence import exchange


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
