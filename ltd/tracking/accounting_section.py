"""The report's section on what runs cost: rates, shares of the device's peak, padding and waits, also by size."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape

from ltd.tracking.charts import number
from ltd.tracking.markup import details, section, table, value_cell
from ltd.tracking.run_record import RunRecord

#: Metric, how it is called, whether it is a share, and what is said of a run: its median, or its largest value.
ROWS: tuple[tuple[str, str, bool, Callable[[Sequence[float]], float]], ...] = (
    ("time/step_s", "seconds per step", False, statistics.median),
    ("perf/samples_per_s", "samples/s", False, statistics.median),
    ("perf/tokens_per_s", "tokens/s", False, statistics.median),
    ("perf/model_tflops", "model TFLOP/s per device", False, statistics.median),
    ("perf/mfu", "MFU", True, statistics.median),
    ("perf/mfu_with_encoders", "MFU with encoders", True, statistics.median),
    ("perf/hfu", "with what is computed again", True, statistics.median),
    ("perf/padding_waste", "padding", True, statistics.median),
    ("perf/data_wait_share", "waiting for data", True, statistics.median),
    ("perf/communication_share", "communication", True, statistics.median),
    ("perf/memory_peak_gb", "most memory, GB", False, max),
)
#: Of these, what is measured for each size of samples too.
SIZES = re.compile(r"perf/bucket/(.+)/([a-z_]+)")


def accounting_section(runs: Sequence[RunRecord]) -> str:
    """Show the accounting of runs beside each other.

    Args:
        runs: All runs of the page.

    Returns:
        HTML; nothing where no run has any.
    """
    values = [_values(run) for run in runs]
    rows = [
        [escape(title), *(_cell(found.get(name), share, say) for found in values)]
        for name, title, share, say in ROWS
        if any(found.get(name) for found in values)
    ]
    if not any(name.startswith("perf/") for found in values for name in found):
        return ""
    columns = ["median of the logged steps", *(run.name for run in runs)] if len(runs) > 1 else ["", "median"]
    device = [value_cell(run.hardware.get("device")) for run in runs]
    rows = ([["device", *device]] if any(run.hardware for run in runs) else []) + rows
    body = table(columns, rows, numeric=range(1, 1 + len(runs))) + _sizes(runs, values)
    note = (
        "MFU: model FLOPs, counted from shapes, as a share of the device's peak. Padding: share of computed tokens. "
        "Rates include waits for data, not evaluations and saves."
    )
    return section("Accounting", f'{body}<p class="note">{note}</p>', "accounting")


def _values(run: RunRecord) -> dict[str, list[float]]:
    """Collect the finite values of the metrics of ``ROWS``, of all samples and of each size."""
    wanted = {name for name, *_ in ROWS}
    found: dict[str, list[float]] = {}
    for row in run.rows:
        for name, value in row.items():
            if name not in wanted and not name.startswith("perf/bucket/"):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append(float(value))
    return found


def _cell(found: Sequence[float] | None, share: bool, say: Callable[[Sequence[float]], float]) -> str:
    if not found:
        return value_cell(None)
    return f"{100 * say(found):.3g} %" if share else number(say(found))


def _sizes(runs: Sequence[RunRecord], values: Sequence[Mapping[str, Sequence[float]]]) -> str:
    """Show the figures of each size, folded; nothing where runs have one size each."""
    shown = [(name.removeprefix("perf/"), title, share, say) for name, title, share, say in ROWS]
    shown = [(name.replace("time/", ""), title, share, say) for name, title, share, say in shown]
    rows = []
    measured: set[str] = set()
    for run, found in zip(runs, values, strict=True):
        sizes = dict.fromkeys(match[1] for name in found if (match := SIZES.fullmatch(name)))
        for size in sorted(sizes, key=_by_length):
            cells = {name: found.get(f"perf/bucket/{size}/{name}") for name, *_ in shown}
            measured |= {name for name, numbers in cells.items() if numbers}
            line = {name: _cell(cells[name], share, say) for name, _, share, say in shown}
            rows.append(([escape(run.name), f"<code>{escape(size)}</code>"], line))
    if not rows:
        return ""
    names = [(name, title) for name, title, *_ in shown if name in measured]
    body = [[*first, *(line[name] for name, _ in names)] for first, line in rows]
    columns = ["run", "size", *(title for _, title in names)]
    if len(runs) == 1:
        body, columns = [line[1:] for line in body], columns[1:]
    first_number = 2 if len(runs) > 1 else 1
    return details("By size", table(columns, body, numeric=range(first_number, len(columns))))


def _by_length(size: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else 0, part) for part in size.split("x")]
