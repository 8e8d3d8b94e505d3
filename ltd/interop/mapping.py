"""Strict maps between two state dicts: every key, shape and dtype on both sides is accounted for.

A map is a list of ``Pair``; applying it in one direction and back gives the same bits. Knows no layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltd.config import ConfigError


@dataclass(frozen=True)
class Pair:
    """One tensor of ours and the one or more of theirs that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    #: Their tensors, in order, to ours, and back.
    to_ours: Callable[[Sequence[Tensor]], Tensor]
    to_theirs: Callable[[Tensor], Sequence[Tensor]]


def same(ours: str, theirs: str) -> Pair:
    """Pair two tensors that are equal."""
    return Pair(ours, (theirs,), lambda x: x[0], lambda x: [x])


def reshaped(ours: str, theirs: str, ours_shape: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Pair:
    """Pair two tensors that differ in their axes."""
    return Pair(ours, (theirs,), lambda x: ours_shape(x[0]), lambda x: [back(x)])


def stacked(ours: str, theirs: Sequence[str]) -> Pair:
    """Pair one tensor with several of equal size that are joined along the first axis."""
    return Pair(ours, tuple(theirs), lambda x: torch.cat(list(x)), lambda x: x.chunk(len(theirs)))


def to_ours(pairs: Sequence[Pair], theirs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map their tensors to ours.

    Args:
        pairs: The map.
        theirs: Their state dict.
        expected: Tensors of our model that the map must give, for their names and shapes.

    Returns:
        Our state dict, in their dtypes, with memory of its own.

    Raises:
        ConfigError: If a key is missing or unknown, or a shape differs; names them.
    """
    wanted = {name for pair in pairs for name in pair.theirs}
    _check_keys(wanted, set(theirs))
    result = {pair.ours: pair.to_ours([theirs[name] for name in pair.theirs]).contiguous() for pair in pairs}
    _check_keys(set(expected), set(result))
    wrong = [
        f"{pair.theirs[0]}: got {tuple(theirs[pair.theirs[0]].shape)}, which is {tuple(result[pair.ours].shape)} as "
        f"{pair.ours}, needed {tuple(expected[pair.ours].shape)}"
        for pair in pairs
        if result[pair.ours].shape != expected[pair.ours].shape
    ]
    if not wrong:
        # The way back gives the shapes that theirs must have: nothing of a tensor may be dropped on the way here.
        back = {
            name: x for pair in pairs for name, x in zip(pair.theirs, pair.to_theirs(result[pair.ours]), strict=True)
        }
        wrong = [
            f"{name}: got {tuple(theirs[name].shape)}, needed {tuple(value.shape)}"
            for name, value in back.items()
            if theirs[name].shape != value.shape
        ]
    if wrong:
        raise ConfigError(f"tensors do not fit the configuration: {'; '.join(wrong[:3])} ({len(wrong)} in all)")
    return result


def to_theirs(pairs: Sequence[Pair], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map our tensors to theirs.

    Args:
        pairs: The map.
        ours: Our state dict, without what their layout keeps elsewhere.

    Returns:
        Their state dict, in our dtypes, with memory of its own.

    Raises:
        ConfigError: If a key is missing or unknown.
    """
    _check_keys({pair.ours for pair in pairs}, set(ours))
    result: dict[str, Tensor] = {}
    for pair in pairs:
        for name, value in zip(pair.theirs, pair.to_theirs(ours[pair.ours]), strict=True):
            result[name] = value.clone(memory_format=torch.contiguous_format)
    return result


def _check_keys(wanted: set[str], got: set[str]) -> None:
    missing, extra = sorted(wanted - got), sorted(got - wanted)
    if missing or extra:
        raise ConfigError(
            f"tensors do not fit the configuration: missing {missing[:3]}, unknown {extra[:3]} "
            f"({len(missing)} and {len(extra)} in all)"
        )


def heads_apart(ours: str, theirs: str, num_heads: int) -> Pair:
    """Pair what is held per channel of queries or keys, where theirs rotate neighbours and ours halves of a head."""
    return reshaped(ours, theirs, lambda x: _to_halves(x, num_heads), lambda x: _to_neighbours(x, num_heads))


def qkv_rotated(ours: str, theirs: Sequence[str], num_heads: int) -> Pair:
    """Pair the product that makes queries, keys and values with theirs: three tensors, or one that holds all.

    Args:
        ours: Name of ours.
        theirs: Names of their (q, k, v), or of the one.
        num_heads: Attention heads; theirs rotate neighbouring channels, ours the two halves of a head.

    Returns:
        The pair.
    """

    def here(x: Sequence[Tensor]) -> Tensor:
        q, k, v = x if len(x) == 3 else x[0].chunk(3)
        return torch.cat((_to_halves(q, num_heads), _to_halves(k, num_heads), v))

    def back(x: Tensor) -> Sequence[Tensor]:
        q, k, v = x.chunk(3)
        parts = (_to_neighbours(q, num_heads), _to_neighbours(k, num_heads), v)
        return parts if len(theirs) == 3 else [torch.cat(parts)]

    return Pair(ours, tuple(theirs), here, back)


def copies(ours: str, theirs: Sequence[str]) -> Pair:
    """Pair one tensor with several of theirs that hold the same numbers."""
    return Pair(ours, tuple(theirs), lambda x: x[0], lambda x: [x] * len(theirs))


def negated(ours: str, theirs: str) -> Pair:
    """Pair two tensors of opposite sign."""
    return reshaped(ours, theirs, lambda x: -x, lambda x: -x)


def _to_halves(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _to_neighbours(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
