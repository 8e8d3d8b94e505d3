"""The report's section on where runs are from: the checkpoints that forks began from, and what was changed there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ltd.tracking.markup import section, table, value_cell


def lineage_section(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> str:
    """List the ancestors of every run that has some.

    Args:
        runs: (name, ancestors), oldest ancestor first.

    Returns:
        HTML; nothing where no run has ancestors.
    """
    rows = [
        [escape(name), value_cell(entry.get("run")), _step(entry), _fingerprint(entry), _overrides(entry)]
        for name, ancestors in runs
        for entry in ancestors
    ]
    if not rows:
        return ""
    note = (
        "Oldest first: each run began from the checkpoint in its last line, with the fields changed that stand there."
    )
    columns = ["run", "from", "step", "fingerprint", "changed"]
    return section("Lineage", table(columns, rows, numeric=[2]) + f'<p class="note">{note}</p>', "lineage")


def _step(entry: Mapping[str, Any]) -> str:
    step = entry.get("step")
    return f"{step:,}" if isinstance(step, int) else value_cell(step)


def _fingerprint(entry: Mapping[str, Any]) -> str:
    return f"<code>{escape(str(entry.get('fingerprint', ''))[:12])}</code>"


def _overrides(entry: Mapping[str, Any]) -> str:
    changes = entry.get("overrides") or {}
    lines = [
        f"<code>{escape(field)}</code>: {escape(str(old))} → {escape(str(new))}"
        for field, (old, new) in changes.items()
    ]
    return "<br>".join(lines) or value_cell("nothing")
