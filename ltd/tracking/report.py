"""One self-contained HTML page about one run or several, from plain records: curves, samples, metrics, configuration.

Everything is embedded, and the page's own policy forbids it to ask the network for anything.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from omegaconf import OmegaConf

from ltd.tracking.accounting_section import accounting_section
from ltd.tracking.charts import Chart, Point, Series, draw, number
from ltd.tracking.ledger import ledger_section
from ltd.tracking.lineage_section import lineage_section, stages_section
from ltd.tracking.markup import details, section, table, value_cell
from ltd.tracking.media_section import samples_section
from ltd.tracking.run_record import RunRecord, flatten

#: Metrics whose curves come first and are open; the others are folded away.
MAIN = (
    *("loss/", "eval/", "optim/lr", "optim/grad_norm", "time/step_s", "time/data_s"),
    *("perf/tokens_per_s", "perf/mfu"),
)
#: Of these, what is folded away all the same: a curve for each size of samples.
FOLDED = ("perf/bucket/", "eval/bucket/")
#: Groups that hold the same quantities as ``loss/``, measured on held-out data: drawn into its charts, dashed.
HELD_OUT = ("eval", "validation")

#: Choices of smoothing: over which part of a curve, one n-th; 0 is none.
SMOOTHINGS = (("auto", "auto"), ("none", "0"), ("light", "150"), ("medium", "50"), ("strong", "12"))

#: Differences between configurations are unfolded up to this many: runs of two stages share little.
MAX_OPEN_DIFFERENCES = 30

#: How ``markup.section`` begins: the section's anchor and title.
HEADING = re.compile('<section id="([a-z]+)"><h2>([^<]*)</h2>')
SCRIPTS = ("report.js", "report_charts.js")

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
$css
</style>
</head>
<body>
<header><h1>$title</h1>$facts$contents</header>
<main>
$sections
</main>
<script>
$script
</script>
</body>
</html>
""")


def write_report(runs: Sequence[RunRecord], out: Path, *, media_limit_mb: float = 64.0) -> list[str]:
    """Write the page.

    Args:
        runs: At least one; several are drawn over each other.
        out: HTML file to write; it appears whole or not at all.
        media_limit_mb: Media embedded at most, in megabytes before encoding.

    Returns:
        What was left out of the page, one line each.

    Raises:
        ValueError: If ``out`` is a folder.
    """
    if out.is_dir():
        raise ValueError(f"{out}: is a folder, needed an HTML file to write, such as {out / 'report.html'}")
    page, left_out = build_page(runs, media_limit_mb=media_limit_mb)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".incomplete")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return left_out


def build_page(runs: Sequence[RunRecord], *, media_limit_mb: float = 64.0) -> tuple[str, list[str]]:
    """Put the page together.

    Args:
        runs: At least one.
        media_limit_mb: Media embedded at most, in megabytes before encoding.

    Returns:
        The HTML text, and what was left out of it, one line each.
    """
    runs = _with_distinct_names(runs)
    samples, left_out = samples_section([(run.name, run.samples) for run in runs], media_limit_mb)
    ledger = ledger_section([(run.name, run.ledger) for run in runs])
    sections = [evaluation_section(runs), samples, curves_section(runs), accounting_section(runs), ledger]
    sections += [bad_section(runs), lineage_section(runs), stages_section(runs), config_section(runs)]
    assets = resources.files("ltd.tracking")
    page = PAGE.substitute(
        title=escape(f"{'Run' if len(runs) == 1 else 'Runs'} {', '.join(run.name for run in runs)}"),
        css=assets.joinpath("report.css").read_text(encoding="utf-8"),
        script="\n".join(assets.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS),
        facts=facts_section(runs),
        contents=contents(sections),
        sections="\n".join(section for section in sections if section),
    )
    return page, left_out


def contents(sections: Sequence[str]) -> str:
    """Link to the sections there are."""
    heads = [HEADING.match(section) for section in sections]
    links = "".join(f'<a href="#{head[1]}">{head[2]}</a>' for head in heads if head)
    return f"<nav>{links}</nav>"


def facts_section(runs: Sequence[RunRecord]) -> str:
    """Say what the runs are and how far they came: in a line of tiles of one run, in a table of several."""
    found = [dict(collect_facts(run)) for run in runs]
    if len(runs) == 1:
        tiles = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in found[0].items())
        return f'<dl class="facts">{tiles}</dl>'
    names = list(dict.fromkeys(name for facts in found for name in facts))
    rows = [
        [f'<i class="swatch c{index % 8}"></i>{escape(run.name)}', *(value_cell(facts.get(name)) for name in names)]
        for index, (run, facts) in enumerate(zip(runs, found, strict=True))
    ]
    return table(["run", *names], rows, numeric=range(2, 1 + len(names)))


def collect_facts(run: RunRecord) -> list[tuple[str, str]]:
    """List in a few words each what a run is and how far it came."""
    facts: list[tuple[str, str]] = []
    kind = _at(run.config, "model.kind") or _at(run.config, "kind")
    facts += [("model", str(kind))] if kind else []
    if run.rows:
        last, steps = run.rows[-1]["step"], _at(run.config, "steps")
        facts.append(("last step logged", f"{last:,}" + (f" of {steps:,}" if isinstance(steps, int) else "")))
    seconds = [value for _, value in _points(run, "time/step_s") if math.isfinite(value)]
    if seconds:
        facts += [("in logged steps", _duration(sum(seconds))), ("median step", f"{statistics.median(seconds):.3g} s")]
        waits = [value for _, value in _points(run, "time/data_s") if math.isfinite(value)]
        if waits:
            facts.append(("waiting for data", f"{100 * sum(waits) / max(sum(seconds), 1e-9):.1f} %"))
    rates = [value for _, value in _points(run, "perf/tokens_per_s") if math.isfinite(value)]
    if rates:
        facts.append(("median tokens/s", number(statistics.median(rates))))
    shares = [value for _, value in _points(run, "perf/mfu") if math.isfinite(value)]
    if shares:
        facts.append(("median MFU", f"{100 * statistics.median(shares):.3g} %"))
    facts.append(("bad samples", f"{sum(run.bad.values()):,}"))
    return facts


def curves_section(runs: Sequence[RunRecord]) -> str:
    """Draw every numeric metric: the main ones open, the others folded."""
    charts = collect_charts(runs)
    if not charts:
        return ""
    main = [draw(chart) for chart in charts if _is_main(chart)]
    others = [draw(chart) for chart in charts if not _is_main(chart)]
    body = curve_controls(runs) + f'<div class="charts">{"".join(main)}</div>'
    if others:
        plural = "s" if len(others) > 1 else ""
        body += details(f"{len(others)} more curve{plural}", f'<div class="charts">{"".join(others)}</div>')
    note = "Faint: as logged. Strong: smoothed. Dashed: held-out data."
    return section("Curves", f'<p class="note">{note}</p>{body}', "curves")


def curve_controls(runs: Sequence[RunRecord]) -> str:
    """Choices that the page's script redraws all curves by: the axis, smoothing and, of several runs, which."""
    scales = "".join(f'<option value="{name}">{name}</option>' for name in ("auto", "linear", "logarithmic"))
    smoothings = "".join(f'<option value="{value}">{name}</option>' for name, value in SMOOTHINGS)
    controls = f'<label>Axis <select id="scale">{scales}</select></label>'
    controls += f'<label>Smoothing <select id="smoothing">{smoothings}</select></label>'
    if len(runs) > 1:
        controls += "".join(
            f'<label><input type="checkbox" class="run-shown" value="{index}" checked>'
            f'<i class="swatch c{index % 8}"></i>{escape(run.name)}</label>'
            for index, run in enumerate(runs)
        )
    return f'<div class="controls">{controls}</div>'


def _is_main(chart: Chart) -> bool:
    return chart.title.startswith(MAIN) and not chart.title.startswith(FOLDED)


def collect_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Gather curves into charts, one per metric; a held-out metric joins the training metric of the same last name.

    Args:
        runs: Runs, coloured by their position.

    Returns:
        Charts in reading order: the main metrics first, in the order of ``MAIN``.
    """
    names = sorted({name for run in runs for row in run.rows for name, value in row.items() if _is_number(value)})
    names = sorted(
        (name for name in names if name != "step"), key=lambda name: (name.partition("/")[0] in HELD_OUT, name)
    )
    charts: dict[str, list[Series]] = {}
    for name in names:
        group, _, rest = name.partition("/")
        train = f"loss/{rest}"
        joins = group in HELD_OUT and train in names
        for index, run in enumerate(runs):
            points = _points(run, name)
            if points:
                label = name if len(runs) == 1 else f"{run.name}: {name}" if joins else run.name
                color = index if len(runs) > 1 else int(joins)
                charts.setdefault(train if joins else name, []).append(Series(label, points, color, joins))
    order = {prefix: index for index, prefix in enumerate(MAIN)}

    def rank(title: str) -> tuple[int, str]:
        return min((index for prefix, index in order.items() if title.startswith(prefix)), default=len(MAIN)), title

    marks = sorted({float(stage["from_step"]) for run in runs for stage in run.config.get("stages") or ()})
    return [Chart(title, charts[title], marks) for title in sorted(charts, key=rank)]


def evaluation_section(runs: Sequence[RunRecord]) -> str:
    """Show the measured metrics: every value with its network, sample count, floor, making and note."""
    measured = [run for run in runs if run.evaluation]
    keys = dict.fromkeys(_metric_cells(row) for run in measured for row in run.evaluation)
    if not keys:
        return ""
    values = ["value"] if len(measured) == 1 else [run.name for run in measured]
    found = [{_metric_cells(row): value_cell(row.get("value")) for row in reversed(run.evaluation)} for run in measured]
    names = {key[0]: number for number, key in reversed(list(enumerate(keys)))}
    rows = [
        [key[0], *(cells.get(key, value_cell(None)) for cells in found), *key[1:]]
        for key in sorted(keys, key=lambda key: names[key[0]])  # what was measured in several ways stays together
    ]
    columns = ["metric", *values, "unit", "floor", "n", "network", "how", "note"]
    note = (
        "Floor: the same metric of real data against real data, at equal n (chance, for retrieval). Distances compare "
        "only at equal n and with the same network."
    )
    body = table(columns, rows, numeric=range(1, 1 + len(values))) + f'<p class="note">{note}</p>'
    return section("Metrics", body, "metrics")


def bad_section(runs: Sequence[RunRecord]) -> str:
    """Count the samples that failed by cause, with the first of them."""
    causes = sorted({cause for run in runs for cause in run.bad})
    if not causes:
        return section("Bad samples", "<p>None failed.</p>" if any(run.rows for run in runs) else "", "bad")
    counts = [[escape(cause), *(f"{run.bad.get(cause, 0):,}" for run in runs)] for cause in causes]
    body = table(["cause", *(run.name for run in runs)], counts, numeric=range(1, 1 + len(runs)))
    columns = ["run", "step", "key", "shard", "cause", "message"]
    rows = [
        [escape(run.name), *(value_cell(row.get(name)) for name in columns[1:])]
        for run in runs
        for row in run.bad_examples
    ]
    return section("Bad samples", body + details("The first of them", table(columns, rows)), "bad")


def config_section(runs: Sequence[RunRecord]) -> str:
    """Show the resolved configuration, and where several runs differ."""
    body = ""
    if len(runs) > 1:
        rows = [[f"<code>{escape(key)}</code>", *map(value_cell, values)] for key, values in config_differences(runs)]
        names = ["field", *(run.name for run in runs)]
        differences = table(names, rows) if rows else "<p>The configurations are equal.</p>"
        body += details(f"{len(rows)} fields differ", differences, is_open=len(rows) <= MAX_OPEN_DIFFERENCES)
    for run in runs:
        if run.config:
            text = f"<pre>{escape(OmegaConf.to_yaml(OmegaConf.create(dict(run.config))))}</pre>"
            title = "Resolved configuration" + (f" of {escape(run.name)}" if len(runs) > 1 else "")
            body += details(title, text, is_open=len(runs) == 1)
    return section("Configuration", body, "configuration") if body else ""


def config_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """List the fields in which runs differ.

    Args:
        runs: Two or more.

    Returns:
        (dotted field, value in each run) pairs; a run without the field has None.
    """
    flat = [dict(flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [one.get(key) for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _with_distinct_names(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Lengthen the names of runs whose directories have the same last part."""
    names = Counter(run.name for run in runs)
    return [
        run if names[run.name] == 1 else dataclasses.replace(run, name="/".join(run.path.resolve().parts[-2:]))
        for run in runs
    ]


def _at(tree: Mapping[str, Any], dotted: str) -> Any:
    return dict(flatten(tree)).get(dotted)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")


def _points(run: RunRecord, name: str) -> list[Point]:
    return [(float(row["step"]), float(row[name])) for row in run.rows if name in row and _is_number(row[name])]


def _metric_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Write what stands beside a metric's value; runs share a line of the table only where all of it is equal."""
    name = f"{row['part']}/{row['name']}" if row.get("part") else row["name"]
    about = [row.get(field) for field in ("unit", "floor", "n", "network")]
    return escape(name), *map(value_cell, (*about, _how_measured(row), row.get("note")))


def _how_measured(row: Mapping[str, Any]) -> str:
    """How the samples were made and read, as far as the row tells."""
    parts = [str(row[name]) for name in ("preprocessing",) if row.get(name)]
    parts += [f"{row['weights']} weights"] if row.get("weights") else []
    parts += [f"{name} {row[name]}" for name in ("steps", "guidance", "seed") if row.get(name) is not None]
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
