"""Pieces of a chunk on their way through stages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ltd.autoencoders.descent import Step, descend
from ltd.nn.causal_conv import START, State


@torch.no_grad()
def test_a_piece_that_waits_does_not_keep_those_before_it_alive() -> None:
    made: list[StorageWeakRef] = []
    seen: list[tuple[int, bool]] = []

    def begin(x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        x = x + 1
        made.append(StorageWeakRef(x.untyped_storage()))
        return x, (None,)

    def double(x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        return 2 * x, (None,)

    def look(x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        assert guide is not None
        seen.append((x.shape[2], made[0].expired()))
        return x + guide, (None,)

    x = torch.randn(2, 3, 7, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    guide = torch.arange(7.0).view(1, 1, 7, 1, 1).expand(2, 1, 7, 1, 1)
    states: list[State] = [START] * 3
    steps = [Step(begin), Step(double, spread=8), Step(look)]
    # All frames at once through the first stage, two at a time from the second on.
    y = descend(steps, x, states, guide, piece_pixels=512)
    assert seen == [(2, True), (2, True), (2, True), (1, True)]
    assert torch.equal(y, 2 * (x + 1) + guide)
    assert states == [(None,)] * 3


@torch.no_grad()
def test_pieces_of_what_the_caller_holds_are_not_copied() -> None:
    x = torch.randn(1, 3, 6, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    storages: list[int] = []

    def look(x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        storages.append(x.untyped_storage().data_ptr())
        return x + 1, (None,)

    states: list[State] = [START]
    assert torch.equal(descend([Step(look)], x, states, piece_pixels=32), x + 1)
    assert storages == [x.untyped_storage().data_ptr()] * 3
