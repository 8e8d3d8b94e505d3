"""One self-contained HTML page about one run or several, from plain records: curves, samples, metrics, configuration.

Everything is embedded, and the page's own policy forbids it to ask the network for anything.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from omegaconf import OmegaConf

from ltd.tracking.charts import Chart, Point, Series, draw, number
from ltd.tracking.run_record import RunRecord, Sample

MIME = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}
#: Metrics whose curves come first and are open; the others are folded away.
MAIN = ("loss/", "heldout/", "eval/", "optim/lr", "optim/grad_norm", "time/step_s", "time/data_s", "perf/")
#: Groups that hold the same quantities as ``loss/``, measured on held-out data: drawn into its charts, dashed.
HELD_OUT = ("heldout", "eval", "validation")

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
<header><h1>$title</h1>$facts</header>
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
    """
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
    samples, left_out = samples_section(runs, media_limit_mb)
    sections = [evaluation_section(runs), samples, curves_section(runs), bad_section(runs), config_section(runs)]
    assets = resources.files("ltd.tracking")
    page = PAGE.substitute(
        title=escape(f"{'Run' if len(runs) == 1 else 'Runs'} {', '.join(run.name for run in runs)}"),
        css=assets.joinpath("report.css").read_text(encoding="utf-8"),
        script=assets.joinpath("report.js").read_text(encoding="utf-8"),
        facts="".join(facts_row(run, index, named=len(runs) > 1) for index, run in enumerate(runs)),
        sections="\n".join(section for section in sections if section),
    )
    return page, left_out


def facts_row(run: RunRecord, color: int, *, named: bool) -> str:
    """Say in a line of tiles what a run is and how far it came."""
    facts: list[tuple[str, str]] = []
    kind = _at(run.config, "model.kind") or _at(run.config, "kind")
    if kind:
        facts.append(("model", str(kind)))
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
    facts.append(("bad samples", f"{sum(run.bad.values()):,}"))
    name = f'<span class="run"><i class="swatch c{color % 8}"></i>{escape(run.name)}</span>' if named else ""
    tiles = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts)
    return f'<div class="facts">{name}<dl>{tiles}</dl></div>'


def curves_section(runs: Sequence[RunRecord]) -> str:
    """Draw every numeric metric: the main ones open, the others folded."""
    charts = collect_charts(runs)
    if not charts:
        return ""
    main = [draw(chart) for chart in charts if chart.title.startswith(MAIN)]
    others = [draw(chart) for chart in charts if not chart.title.startswith(MAIN)]
    body = f'<div class="charts">{"".join(main)}</div>'
    if others:
        plural = "s" if len(others) > 1 else ""
        body += _details(f"{len(others)} more curve{plural}", f'<div class="charts">{"".join(others)}</div>')
    note = "Faint: as logged. Strong: smoothed, where the curve is noisy. Dashed: held-out data."
    return _section("Curves", f'<p class="note">{note}</p>{body}', "curves")


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
                label = name if len(runs) == 1 else f"{run.name}: {name}"
                color = index if len(runs) > 1 else int(joins)
                charts.setdefault(train if joins else name, []).append(Series(label, points, color, joins))
    order = {prefix: index for index, prefix in enumerate(MAIN)}

    def rank(title: str) -> tuple[int, str]:
        return min((index for prefix, index in order.items() if title.startswith(prefix)), default=len(MAIN)), title

    return [Chart(title, charts[title]) for title in sorted(charts, key=rank)]


def samples_section(runs: Sequence[RunRecord], limit_mb: float) -> tuple[str, list[str]]:
    """Embed the samples, playable, side by side where several runs have the same caption.

    Args:
        runs: Runs.
        limit_mb: Megabytes embedded at most.

    Returns:
        The section, and what was left out.
    """
    budget = limit_mb * 1e6
    cards: dict[tuple[str, int], list[str]] = {}
    left_out: list[str] = []
    shown: Counter[str] = Counter()
    for run in runs:
        for sample in run.samples:
            size = sample.path.stat().st_size
            if size > budget:
                left_out.append(f"{sample.path}: {size / 1e6:.1f} MB past the limit of {limit_mb:g} MB in all")
                continue
            budget -= size
            shown[f"{run.name}/{sample.caption}"] += 1
            key = (sample.caption, shown[f"{run.name}/{sample.caption}"])
            cards.setdefault(key, []).append(_card(sample, run.name if len(runs) > 1 else ""))
    if not cards and not left_out:
        return "", []
    groups = "".join(
        f'<div class="group{" several" if len(group) > 1 else ""}">{"".join(group)}</div>' for group in cards.values()
    )
    note = f'<p class="note">{len(left_out)} files left out, past {limit_mb:g} MB in all.</p>' if left_out else ""
    buttons = '<p class="controls"><button type="button" id="play-all">Play all</button></p>'
    has_video = any(sample.path.suffix in (".mp4", ".webm") for run in runs for sample in run.samples)
    body = f'{buttons if has_video else ""}{note}<div class="samples">{groups}</div>'
    return _section("Samples", body, "samples"), left_out


def evaluation_section(runs: Sequence[RunRecord]) -> str:
    """Show the measured metrics: every value with its network, sample count, floor and note."""
    keys = dict.fromkeys((row["name"], str(row.get("network") or "")) for run in runs for row in run.evaluation)
    if not keys:
        return ""
    values = ["value"] if len(runs) == 1 else [run.name for run in runs]
    columns = ["metric", *values, "unit", "floor", "n", "network", "note"]
    rows = []
    for key in keys:
        per_run = [_find(run.evaluation, key) for run in runs]
        first = next(row for row in per_run if row is not None)
        cells = [_value(row.get("value") if row else None) for row in per_run]
        rest = [_value(first.get(name)) for name in ("unit", "floor", "n", "network", "note")]
        rows.append([escape(key[0]), *cells, *rest])
    note = (
        "Floor: the same distance between two sets of real data of the same size. Distances compare only at equal n "
        "and with the same network."
    )
    return _section(
        "Metrics", _table(columns, rows, numeric=range(1, 1 + len(values))) + f'<p class="note">{note}</p>', "metrics"
    )


def bad_section(runs: Sequence[RunRecord]) -> str:
    """Count the samples that failed by cause, with the first of them."""
    causes = sorted({cause for run in runs for cause in run.bad})
    if not causes:
        return _section("Bad samples", "<p>None failed.</p>" if any(run.rows for run in runs) else "", "bad")
    counts = [[escape(cause), *(f"{run.bad.get(cause, 0):,}" for run in runs)] for cause in causes]
    body = _table(["cause", *(run.name for run in runs)], counts, numeric=range(1, 1 + len(runs)))
    columns = ["run", "step", "key", "shard", "cause", "message"]
    rows = [
        [escape(run.name), *(_value(row.get(name)) for name in columns[1:])] for run in runs for row in run.bad_examples
    ]
    return _section("Bad samples", body + _details("The first of them", _table(columns, rows)), "bad")


def config_section(runs: Sequence[RunRecord]) -> str:
    """Show the resolved configuration, and where several runs differ."""
    body = ""
    if len(runs) > 1:
        rows = [[f"<code>{escape(key)}</code>", *map(_value, values)] for key, values in config_differences(runs)]
        names = ["field", *(run.name for run in runs)]
        body += _table(names, rows) if rows else "<p>The configurations are equal.</p>"
    for run in runs:
        if run.config:
            text = f"<pre>{escape(OmegaConf.to_yaml(OmegaConf.create(dict(run.config))))}</pre>"
            title = "Resolved configuration" + (f" of {escape(run.name)}" if len(runs) > 1 else "")
            body += _details(title, text, is_open=len(runs) == 1)
    return _section("Configuration", body, "configuration") if body else ""


def config_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """List the fields in which runs differ.

    Args:
        runs: Two or more.

    Returns:
        (dotted field, value in each run) pairs; a run without the field has None.
    """
    flat = [dict(_flatten(run.config)) for run in runs]
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


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _at(tree: Mapping[str, Any], dotted: str) -> Any:
    return dict(_flatten(tree)).get(dotted)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")


def _points(run: RunRecord, name: str) -> list[Point]:
    return [(float(row["step"]), float(row[name])) for row in run.rows if name in row and _is_number(row[name])]


def _find(rows: Sequence[Mapping[str, Any]], key: tuple[str, str]) -> Mapping[str, Any] | None:
    return next((row for row in rows if (row["name"], str(row.get("network") or "")) == key), None)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _value(value: Any) -> str:
    if value is None or value == "":
        return '<span class="note">-</span>'
    return escape(number(value) if isinstance(value, float) else str(value))


def _card(sample: Sample, run_name: str) -> str:
    kind = MIME.get(sample.path.suffix, "image/jpeg")
    source = f"data:{kind};base64,{base64.b64encode(sample.path.read_bytes()).decode()}"
    if kind.startswith("video/"):
        media = f'<video controls loop muted playsinline preload="auto" src="{source}"></video>'
    else:
        media = f'<img alt="{escape(sample.caption, quote=True)}" src="{source}">'
    details = " · ".join(part for part in (run_name, sample.details) if part)
    note = f'<br><span class="note">{escape(details)}</span>' if details else ""
    wide = " wide" if "grid" in sample.path.stem else ""
    return f'<figure class="card{wide}">{media}<figcaption>{escape(sample.caption)}{note}</figcaption></figure>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Iterable[int] = ()) -> str:
    """Lay out escaped cells under plain column names."""
    right = set(numeric)

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{cell}</{tag}>' if index in right else f"<{tag}>{cell}</{tag}>"
            for index, cell in enumerate(cells)
        )

    head = f"<thead><tr>{line('th', [escape(name) for name in columns])}</tr></thead>"
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="table"><table>{head}<tbody>{body}</tbody></table></div>'


def _details(title: str, body: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>{body}</details>"


def _section(title: str, body: str, anchor: str) -> str:
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>' if body else ""
