"""Rows of results: every number with its unit, network, preprocessing, sample count and floor. Knows no metric."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One measured number and everything needed to read it."""

    #: Which half of the evaluation made it: "autoencoder" or "samples"; or, while training, "training" (of samples),
    #: "reconstruction" or "heldout" (an autoencoder's held-out samples).
    part: str
    name: str
    value: float
    unit: str
    #: Network or statistic the number comes from; "none" for plain pixels.
    network: str = "none"
    preprocessing: str = ""
    #: Clips, images or queries counted.
    n: int
    #: The same metric of real data against real data at equal n; chance for retrieval; None where there is none.
    floor: float | None = None
    note: str = ""
    #: Which weights made the samples: "ema", the name of an average, or "raw".
    weights: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None


def rows_to_json(rows: Iterable[MetricRow]) -> str:
    """Write rows as a JSON list; infinities become the string "inf", as JSON has none."""
    return json.dumps([{k: _plain(v) for k, v in asdict(row).items()} for row in rows], indent=1) + "\n"


def rows_from_json(text: str) -> list[MetricRow]:
    """Read rows back.

    Args:
        text: What ``rows_to_json`` wrote.

    Returns:
        The rows.

    Raises:
        ValueError: If the text is no such list.
    """
    try:
        return [MetricRow(**{key: _parsed(value) for key, value in row.items()}) for row in json.loads(text)]
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a list of metric rows: {error}") from error


def format_table(rows: Sequence[MetricRow]) -> str:
    """Lay rows out as text: name, value, floor, unit, n and network, the notes numbered below."""
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    head = ("metric", "value", "floor", "unit", "n", "network", "note")
    body = [
        (
            f"{row.part}/{row.name}",
            f"{row.value:.4g}",
            "" if row.floor is None else f"{row.floor:.4g}",
            row.unit,
            str(row.n),
            row.network,
            f"[{notes.index(row.note) + 1}]" if row.note else "",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *body)
    ]
    return "\n".join([*lines, *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])


def _plain(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) and value > 0 else value


def _parsed(value: Any) -> Any:
    return math.inf if value == "inf" else value


def replace_parts(old: Sequence[MetricRow], new: Sequence[MetricRow]) -> list[MetricRow]:
    """Put new rows in the place of all old ones of the same parts.

    Args:
        old: Rows of any parts.
        new: Rows of one part or more.

    Returns:
        The other parts' rows, then the new ones.
    """
    parts = {row.part for row in new}
    return [*(row for row in old if row.part not in parts), *new]
