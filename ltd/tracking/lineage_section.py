"""The report's sections on where runs are from and what changed on the way: forks, weights of others, stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ltd.tracking.markup import section, table, value_cell
from ltd.tracking.run_record import RunRecord, flatten


def lineage_section(runs: Sequence[RunRecord]) -> str:
    """List the ancestors of every run that has some.

    Args:
        runs: All runs of the page.

    Returns:
        HTML; nothing where no run has ancestors.
    """
    rows = []
    for run in runs:
        name = escape(run.name)
        if run.init_from:
            source = [value_cell(run.init_from.get("path")), value_cell(None), _fingerprint(run.init_from)]
            rows.append([name, *source, f"weights alone ({escape(str(run.init_from.get('weights', '')))})"])
        rows += [
            [name, value_cell(entry.get("run")), _number(entry.get("step")), _fingerprint(entry), _overrides(entry)]
            for entry in run.lineage
        ]
    if not rows:
        return ""
    note = (
        "Oldest first: each run began from the checkpoint in its last line, with the fields changed that stand there."
    )
    columns = ["run", "from", "step", "fingerprint", "changed"]
    return section("Lineage", table(columns, rows, numeric=[2]) + f'<p class="note">{note}</p>', "lineage")


def stages_section(runs: Sequence[RunRecord]) -> str:
    """List the stages of every run that has some: from which step, and which fields they change.

    Args:
        runs: All runs of the page.

    Returns:
        HTML; nothing where no run has stages.
    """
    rows = []
    for run in runs:
        held = dict(flatten(run.config))
        for stage in run.config.get("stages") or ():
            now = dict(flatten(stage.get("set") or {}))
            changes = {field: (held.get(field), value) for field, value in now.items()}
            rows.append([escape(run.name), _number(stage.get("from_step")), _changes(changes)])
            held |= now
    if not rows:
        return ""
    note = "Upright lines in the curves are these steps. A field that is not named holds on from the stage before."
    body = table(["run", "after step", "changed"], rows, numeric=[1]) + f'<p class="note">{note}</p>'
    return section("Stages", body, "stages")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else value_cell(value)


def _fingerprint(entry: Mapping[str, Any]) -> str:
    return f"<code>{escape(str(entry.get('fingerprint', ''))[:12])}</code>"


def _overrides(entry: Mapping[str, Any]) -> str:
    return _changes(entry.get("overrides") or {})


def _changes(changes: Mapping[str, Sequence[Any]]) -> str:
    lines = [
        f"<code>{escape(field)}</code>: {escape(str(old))} → {escape(str(new))}"
        for field, (old, new) in changes.items()
    ]
    return "<br>".join(lines) or value_cell("nothing")
