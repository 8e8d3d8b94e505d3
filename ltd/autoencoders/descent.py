"""A chunk's way through the stages of a causal network: depth first and in pieces, so that little lies in between.

Where frames have become small, pieces wait for the next ones and go on together: few large pieces are less work.
A stage is called as ``stage(x, state, guide) -> (x, state)`` on ``(b, c, t, h, w)``. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ltd.nn.bands import pixels_at_once
from ltd.nn.causal_conv import START, State, is_first

#: Pixels (over frames and batch) that a stage works on at once on a CPU, without gradients: enough to keep all threads
#: busy, few enough that what lies between two layers stays small.
PIECE_PIXELS = 1 << 15

Stage = Callable[[Tensor, State, "Tensor | None"], "tuple[Tensor, State]"]


@dataclass(frozen=True)
class Step:
    """A stage, and what cutting its input has to know."""

    run: Stage
    #: Frames of the input that belong together, because what follows halves their number.
    unit: int = 1
    #: Pixels that are made of one, where they are more.
    spread: int = 1
    #: Whether small pieces wait for the next ones: worth it where frames have just become smaller.
    gathers: bool = False


def descend(
    steps: list[Step],
    x: Tensor,
    states: list[State],
    guide: Tensor | None = None,
    *,
    piece_pixels: int | None = None,
) -> Tensor:
    """Run a chunk through stages; without gradients a large one goes on in pieces, depth first.

    Where a stage gathers, pieces wait until there are as many frames as it works on at once, or no more come.

    Args:
        steps: What is run, in order.
        x: ``(b, c, t, h, w)``.
        states: State of each stage, replaced by that for the next chunk; old ones are let go as soon as they are used.
        guide: Goes along with x, repeated where a stage doubles the frames.
        piece_pixels: Pixels that a stage works on at once; None goes by the device.

    Returns:
        Output of the last stage.
    """
    pixels = pixels_at_once(PIECE_PIXELS, x.device) if piece_pixels is None else piece_pixels
    descent = _Descent(steps, states, pixels)
    if torch.is_grad_enabled():
        return descent.whole(x, guide)
    whole = all(state is None for state in states)
    pieces = list(descent.pieces(x, guide))
    if whole:
        states[:] = [None] * len(states)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def split_state(state: State, count: int) -> list[State]:
    """Split a state into those of ``count`` parts.

    Args:
        state: ``None``, ``START`` or what ``join_states`` gave.
        count: Parts.

    Returns:
        One state each; a list is given back itself.

    Raises:
        TypeError: If the state is of something else.
    """
    if state is None:
        return [None] * count
    if is_first(state):
        return [START] * count
    if not isinstance(state, tuple | list) or len(state) != count:
        raise TypeError("expected the state that the previous chunk returned")
    return state if isinstance(state, list) else list(state)


def join_states(states: list[State]) -> State:
    """Join the states of parts; ``None`` where they are, for a whole clip."""
    return None if all(state is None for state in states) else tuple(states)


@dataclass
class _Descent:
    steps: list[Step]
    states: list[State]
    piece_pixels: int

    def whole(self, x: Tensor, guide: Tensor | None) -> Tensor:
        """Run the stages one after another."""
        for index in range(len(self.steps)):
            first = is_first(self.states[index])
            x = self._run(index, x, guide)
            guide = _follow(guide, x, first=first)
        return x

    def pieces(self, x: Tensor, guide: Tensor | None) -> Iterator[Tensor]:
        """Run the stages, yielding the last one's output as it comes; what is read is let go of."""
        waiting, gathered = [(0, x, guide)], _Gathered()
        del x, guide
        while waiting:
            index, x, guide = waiting.pop()
            if index == len(self.steps):
                yield x
                continue
            first = is_first(self.states[index])
            length = self._length(index, x, first=first)
            # All that waits has yet to pass this stage.
            if self.steps[index].gathers and waiting and x.shape[2] + gathered.frames(index) < length:
                gathered.add(index, x, guide)
                del x, guide
                continue
            x, guide = gathered.join(index, x, guide)
            follow = guide
            if length < x.shape[2]:
                if self.states[index] is None:
                    self.states[index:] = [START] * (len(self.steps) - index)
                waiting += self._rest(index, x[:, :, length:], _cut(guide, length, None))
                x, follow = x[:, :, :length], _cut(guide, 0, length)
            x = self._run(index, x, follow)
            waiting.append((index + 1, x, _follow(follow, x, first=first)))
            del x, guide, follow

    def _rest(self, index: int, x: Tensor, guide: Tensor | None) -> list[tuple[int, Tensor, Tensor | None]]:
        """Cut what comes behind a first piece, the last piece first.

        Copies, so that none that waits keeps the storage of those before it alive; but not of the descent's own input,
        which the caller holds.
        """
        length, rest = self._length(index, x, first=False), []
        for start in reversed(range(0, x.shape[2], length)):
            piece = x[:, :, start : start + length]
            piece = piece.clone(memory_format=torch.channels_last_3d) if index else piece
            rest.append((index, piece, _cut(guide, start, start + length)))
        return rest

    def _length(self, index: int, x: Tensor, *, first: bool) -> int:
        """Count the frames of a full piece: about ``piece_pixels``, in whole units; a clip's first frame is one."""
        unit = self.steps[index].unit
        b, _, _, h, w = x.shape
        size = max(1, self.piece_pixels // (b * h * w * unit * self.steps[index].spread)) * unit
        return size + 1 - unit if first else size

    def _run(self, index: int, x: Tensor, guide: Tensor | None) -> Tensor:
        state, self.states[index] = self.states[index], None
        # A list is handed over: the stage lets go of each part as soon as it is used.
        handed = list(state) if isinstance(state, tuple) and state else state
        del state
        x, self.states[index] = self.steps[index].run(x, handed, guide)
        return x


@dataclass
class _Gathered:
    """Pieces, with their guides, that wait in front of a stage until there is enough for it to work on."""

    pieces: dict[int, list[tuple[Tensor, Tensor | None]]] = field(default_factory=dict)

    def frames(self, index: int) -> int:
        """Count the frames that wait in front of a stage."""
        return sum(x.shape[2] for x, _ in self.pieces.get(index, ()))

    def add(self, index: int, x: Tensor, guide: Tensor | None) -> None:
        """Let a piece wait."""
        self.pieces.setdefault(index, []).append((x, guide))

    def join(self, index: int, x: Tensor, guide: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Put what waits in front of a piece; nothing waits any more."""
        before = self.pieces.pop(index, [])
        if not before:
            return x, guide
        guides = [] if guide is None else [*(each for _, each in before if each is not None), guide]
        return torch.cat([*(each for each, _ in before), x], dim=2), torch.cat(guides, dim=2) if guides else None


def _cut(guide: Tensor | None, start: int, stop: int | None) -> Tensor | None:
    return None if guide is None else guide[:, :, start:stop]


def _follow(guide: Tensor | None, x: Tensor, *, first: bool) -> Tensor | None:
    """Repeat the guide to the frames of x, whose number a stage may have doubled behind the first."""
    if guide is None or guide.shape[2] == x.shape[2]:
        return guide
    return guide.repeat_interleave(2, dim=2)[:, :, int(first) :]
