"""A chunk's way through the stages of a causal network: depth first and in pieces, so that little lies in between.

A stage is called as ``stage(x, state, guide) -> (x, state)`` on ``(b, c, t, h, w)``. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ltd.nn.causal_conv import START, State, is_first

#: Pixels (over frames and batch) that a stage works on at once without gradients: enough to keep all threads busy, few
#: enough that what lies between two layers stays small.
PIECE_PIXELS = 1 << 14

Stage = Callable[[Tensor, State, "Tensor | None"], "tuple[Tensor, State]"]


def descend(
    stages: list[Stage],
    units: list[int],
    x: Tensor,
    states: list[State],
    guide: Tensor | None = None,
    *,
    piece_pixels: int = PIECE_PIXELS,
) -> Tensor:
    """Run a chunk through stages; without gradients a large one goes on in pieces, depth first.

    Args:
        stages: What is run, in order.
        units: Frames of each stage's input that belong together, because what follows halves their number.
        x: ``(b, c, t, h, w)``.
        states: State of each stage, replaced by that for the next chunk; old ones are let go as soon as they are used.
        guide: Goes along with x, repeated where a stage doubles the frames.
        piece_pixels: Pixels that a stage works on at once.

    Returns:
        Output of the last stage.
    """
    descent = _Descent(stages, units, states, piece_pixels)
    if torch.is_grad_enabled():
        return descent.whole(x, guide)
    whole = all(state is None for state in states)
    pieces = list(descent.pieces(0, x, guide))
    if whole:
        states[:] = [None] * len(states)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def split_state(state: State, count: int) -> list[State]:
    """Split a state into those of ``count`` parts.

    Args:
        state: ``None``, ``START`` or what ``join_states`` gave.
        count: Parts.

    Returns:
        One state each.

    Raises:
        TypeError: If the state is of something else.
    """
    if state is None:
        return [None] * count
    if is_first(state):
        return [START] * count
    if not isinstance(state, tuple) or len(state) != count:
        raise TypeError("expected the state that the previous chunk returned")
    return list(state)


def join_states(states: list[State]) -> State:
    """Join the states of parts; ``None`` where they are, for a whole clip."""
    return None if all(state is None for state in states) else tuple(states)


@dataclass
class _Descent:
    stages: list[Stage]
    units: list[int]
    states: list[State]
    piece_pixels: int

    def whole(self, x: Tensor, guide: Tensor | None) -> Tensor:
        """Run the stages one after another."""
        for index in range(len(self.stages)):
            first = is_first(self.states[index])
            x = self._run(index, x, guide)
            guide = _follow(guide, x, first=first)
        return x

    def pieces(self, index: int, x: Tensor, guide: Tensor | None) -> Iterator[Tensor]:
        """Run the stages from ``index`` on, yielding the last one's output as it comes."""
        if index == len(self.stages):
            yield x
            return
        cuts = _cut(x, self.units[index], self.piece_pixels, first=is_first(self.states[index]))
        if self.states[index] is None and len(cuts) > 1:
            self.states[index:] = [START] * (len(self.stages) - index)
        for start, stop in cuts:
            follow = None if guide is None else guide[:, :, start:stop]
            first = is_first(self.states[index])
            y = self._run(index, x[:, :, start:stop], follow)
            yield from self.pieces(index + 1, y, _follow(follow, y, first=first))

    def _run(self, index: int, x: Tensor, guide: Tensor | None) -> Tensor:
        state, self.states[index] = self.states[index], None
        x, self.states[index] = self.stages[index](x, state, guide)
        return x


def _cut(x: Tensor, unit: int, piece_pixels: int, *, first: bool) -> list[tuple[int, int]]:
    """Cut a chunk into pieces of about ``piece_pixels``, whole units each; the clip's first frame stands for a unit."""
    b, _, t, h, w = x.shape
    size = max(1, piece_pixels // (b * h * w * unit)) * unit
    head = size + 1 - unit if first else size
    if t <= head:
        return [(0, t)]
    starts = [0, *range(head, t, size)]
    return list(zip(starts, [*starts[1:], t], strict=True))


def _follow(guide: Tensor | None, x: Tensor, *, first: bool) -> Tensor | None:
    """Repeat the guide to the frames of x, whose number a stage may have doubled behind the first."""
    if guide is None or guide.shape[2] == x.shape[2]:
        return guide
    return guide.repeat_interleave(2, dim=2)[:, :, int(first) :]
