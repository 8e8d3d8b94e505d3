"""Compare two traces of one step in causal order: the first difference is where to look for the cause."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ltd.config import ConfigError
from ltd.training.trace import Kind, Place, Trace, What, distances

#: In causal order.
Category = Literal["sample", "weight", "input", "output", "loss", "gradient", "norm"]

#: Sums in another order: sketches this close are of equal tensors.
_ROUNDING = 1e-13
#: Tensors smaller than this share of the largest beside them are compared on its scale: rounding rules there.
_SMALL = 1e-3
_KINDS = get_args(Kind)


@dataclass(frozen=True)
class Difference:
    """Two things that should be equal."""

    category: Category
    #: What differs, in words.
    what: str
    #: Slot and key of the sample; None where it is of no one sample.
    draw: int | None = None
    key: str | None = None
    #: Norm of the difference in shares of the larger norm; infinite where no number says.
    error: float = math.inf

    def __str__(self) -> str:
        where = "" if self.draw is None else f" (sample {self.key}, draw {self.draw})"
        return f"{self.what}{where}" + (f": relative {self.error:.3g}" if math.isfinite(self.error) else "")


@dataclass
class Comparison:
    """What two traces have in common and where they part."""

    tolerance: float
    #: All that differ at all, in causal order.
    differences: list[Difference] = field(default_factory=list)
    #: How many things were compared, by category.
    compared: dict[Category, int] = field(default_factory=dict)
    #: What the two were made with and do not share, and what only one of them holds.
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> Difference | None:
        """The first difference above the tolerance."""
        return next(self.beyond(), None)

    def beyond(self) -> Iterator[Difference]:
        """List the differences above the tolerance, in causal order."""
        return (difference for difference in self.differences if difference.error > self.tolerance)

    def worst(self, category: Category) -> Difference | None:
        """Find the largest difference of a category; None where all are equal bit for bit."""
        found = [difference for difference in self.differences if difference.category == category]
        return max(found, key=lambda difference: difference.error, default=None)


def compare(a: Trace, b: Trace, *, tolerance: float) -> Comparison:
    """Compare two traces.

    Args:
        a: One.
        b: The other, of the same step.
        tolerance: Largest relative difference that counts as equal.

    Returns:
        The comparison.

    Raises:
        ConfigError: If they are of different steps.
    """
    if a.facts["step"] != b.facts["step"]:
        raise ConfigError(f"the traces are of steps {a.facts['step']} and {b.facts['step']}; needed one step")
    result = Comparison(tolerance, notes=_notes(a, b))
    _samples(result, a, b)
    for what in ("weight", "input", "output"):
        _tensors(result, a, b, what)
    _losses(result, a, b)
    norms = [_norm(trace) for trace in (a, b)]
    _tensors(result, a, b, "gradient", scale=max((norm for norm in norms if math.isfinite(norm)), default=0.0))
    _number(result, "norm", "gradient norm of all parameters", (norms[0], norms[1]))
    _number(result, "norm", "gradient norm that the engine measured", (_measured(a), _measured(b)))
    return result


def _samples(result: Comparison, a: Trace, b: Trace) -> None:
    draws = sorted(a.samples.keys() | b.samples.keys())
    result.compared["sample"] = len(draws)
    for draw in draws:
        one, other = a.samples.get(draw), b.samples.get(draw)
        if one is None or other is None:
            present, name = (one, "A") if one is not None else (other, "B")
            assert present is not None
            result.differences.append(Difference("sample", f"a sample that only {name} has", draw, present.key))
        elif one.key != other.key:
            result.differences.append(Difference("sample", f"other sample in B: {other.key}", draw, one.key))
        elif one.weight != other.weight:
            what = f"weight {one.weight:g} in A, {other.weight:g} in B"
            result.differences.append(Difference("sample", what, draw, one.key))


def _losses(result: Comparison, a: Trace, b: Trace) -> None:
    for draw in sorted(a.samples.keys() & b.samples.keys()):
        sample = a.samples[draw]
        _number(result, "loss", "loss", (sample.loss, b.samples[draw].loss), draw, sample.key)


def _number(
    result: Comparison,
    category: Category,
    what: str,
    values: tuple[float, float],
    draw: int | None = None,
    key: str | None = None,
) -> None:
    a, b = values
    result.compared[category] = result.compared.get(category, 0) + 1
    if a == b or (math.isnan(a) and math.isnan(b)):
        return
    finite = math.isfinite(a) and math.isfinite(b)
    error = abs(a - b) / max(abs(a), abs(b)) if finite else math.inf
    result.differences.append(Difference(category, f"{what} {a:.9g} in A, {b:.9g} in B", draw, key, error))


def _tensors(result: Comparison, a: Trace, b: Trace, what: What, *, scale: float = 0.0) -> None:
    """Compare all tensors of one category that both hold."""
    names, others = a.names(what), set(b.names(what))
    for name in names:
        if name in others:
            _tensor(result, a, b, (what, name), scale)
    lone = {"A": [name for name in names if name not in others], "B": sorted(others - set(names))}
    for trace, missing in lone.items():
        if not missing:
            continue
        told = f"{len(missing)} {what}s that only {trace} has: {', '.join(missing[:4])}"
        if what == "output":  # other code, or compiled blocks, which are looked at from outside alone
            result.notes.append(told)
        else:
            result.differences.append(Difference(what, told))


def _tensor(result: Comparison, a: Trace, b: Trace, tensor: tuple[What, str], scale: float) -> None:
    what, name = tensor
    draws = [draw for draw in a.places[tensor] if draw in b.places[tensor]]
    for lone in sorted(a.samples.keys() & b.samples.keys() & (a.places[tensor].keys() ^ b.places[tensor].keys())):
        holder = "A" if lone in a.places[tensor] else "B"
        text = f"{_title(what, name)}, which only {holder} has"
        result.differences.append(Difference(what, text, lone, a.samples[lone].key))
    result.compared[what] = result.compared.get(what, 0) + len(draws)
    pairs = {draw: _pair(a.places[tensor][draw], b.places[tensor][draw]) for draw in draws}
    rows = [(draw, pair) for draw, pair in pairs.items() if pair is not None]
    ours = a.values[[one.row for _, (one, _) in rows]]
    theirs = b.values[[other.row for _, (_, other) in rows]]
    largest = max(scale, float(ours[:, 0].max()), float(theirs[:, 0].max())) if rows else 0.0
    errors = dict(zip((draw for draw, _ in rows), distances(ours, theirs, floor=_SMALL * largest), strict=True))
    for draw in draws:
        key = a.samples[draw].key if draw is not None and draw in a.samples else None
        pair = pairs[draw]
        if pair is None:
            shapes = [_shapes(trace.places[tensor][draw]) for trace in (a, b)]
            text = f"shape of {_title(what, name)}, {shapes[0]} in A, {shapes[1]} in B"
            result.differences.append(Difference(what, text, draw, key))
        elif errors[draw] > _ROUNDING:
            result.differences.append(Difference(what, _title(what, name), draw, key, errors[draw]))


def _pair(a: dict[Kind, Place], b: dict[Kind, Place]) -> tuple[Place, Place] | None:
    """Find a way to cut the tensor that gives both the same shape; the same way first."""
    ways = sorted(itertools.product(_KINDS, _KINDS), key=lambda way: (way[0] != way[1], _KINDS.index(way[0])))
    for one, other in ways:
        if one in a and other in b and a[one].shape == b[other].shape:
            return a[one], b[other]
    return None


def _shapes(places: dict[Kind, Place]) -> str:
    return " or ".join(str(list(place.shape)) for place in places.values())


def _title(what: What, name: str) -> str:
    return f"{what} {name}" if what in ("weight", "input") else f"{what} of {name}"


def _norm(trace: Trace) -> float:
    rows = [place.row for name in trace.names("gradient") for place in trace.places["gradient", name][None].values()]
    norms = trace.values[rows]
    return float(norms[:, 0].norm()) if not bool(norms[:, 1].any()) else math.nan


def _measured(trace: Trace) -> float:
    return float(trace.facts["row"].get("optim/grad_norm", math.nan))


def _notes(a: Trace, b: Trace) -> list[str]:
    """Say what the traces were made with and do not share."""
    notes = []
    for name in ("layout", "config", "packages"):
        one, other = _flat(a.facts[name]), _flat(b.facts[name])
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key) and not (name == "config" and key.startswith("parallel.")):
                notes.append(f"{name} {key}: {one.get(key)} in A, {other.get(key)} in B")
    commits = [trace.facts["commit"] for trace in (a, b)]
    if commits[0] != commits[1]:
        notes.append(f"commit: {commits[0]} in A, {commits[1]} in B")
    one, other = a.facts["code"], b.facts["code"]
    changed = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if changed:
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        notes.append(f"code that differs: {', '.join(changed[:6])}{more}")
    return notes


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {key: value for name, item in tree.items() for key, value in _flat(item, f"{path}.{name}").items()}
    return {path.removeprefix("."): tree}
