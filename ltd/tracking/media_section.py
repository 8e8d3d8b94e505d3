"""The report's samples: videos and pictures embedded, those that answer one request side by side."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ltd.tracking.markup import details, section
from ltd.tracking.run_record import Sample

MIME = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}
#: Steps of training shown of all runs together; each run has its first and its last at least.
MAX_STEPS = 12


@dataclass(frozen=True)
class Column:
    """What the samples of one column share: run, step, folder and how they were made."""

    #: Place in the order of reading: by step, those made after training last, and runs beside each other.
    order: tuple[float, str, int]
    details: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """A sample with the run it is of."""

    run: str
    number: int
    sample: Sample

    @property
    def row(self) -> tuple[str, tuple[str, ...]]:
        """Samples that answer the same request share a row."""
        return self.sample.caption, self.sample.asked

    @property
    def column(self) -> Column:
        """Where in its row the sample stands."""
        sample = self.sample
        after = sample.step is None
        order = (float("inf") if sample.step is None else sample.step, str(sample.path.parent) if after else "")
        return Column((*order, self.number), sample.details)


def samples_section(runs: Sequence[tuple[str, Sequence[Sample]]], limit_mb: float) -> tuple[str, list[str]]:
    """Embed the samples of all runs.

    Args:
        runs: Each run's name and samples.
        limit_mb: Megabytes embedded at most, before encoding.

    Returns:
        The section, empty without samples, and what was left out of it, one line each.
    """
    everything = [Shown(name, number, sample) for number, (name, samples) in enumerate(runs) for sample in samples]
    chosen, notes = _choose_steps(everything, max(2, MAX_STEPS // max(1, len(runs))))
    shown, left_out = _within_limit(chosen, limit_mb)
    if not shown and not left_out:
        return "", []
    grids = [one for one in shown if one.sample.is_grid]
    samples = [one for one in shown if not one.sample.is_grid]
    asked = _common(one.sample.asked for one in samples)
    made = _common(one.sample.details for one in samples)
    notes = ([f"All of these: {', '.join((*asked, *made))}."] if asked or made else []) + notes
    notes += [f"{len(left_out)} files left out, past {limit_mb:g} MB in all."] if left_out else []
    has_video = any(_kind(one.sample).startswith("video/") for one in shown)
    controls = '<p class="controls"><button type="button" id="play-all">Play all</button></p>' if has_video else ""
    text = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    page = _Page({*asked, *made}, is_named=len(runs) > 1)
    body = page.rows(samples)
    if grids:
        cards = "".join(page.card(one, "", is_wide=True) for one in sorted(grids, key=lambda one: one.column.order))
        body += details(f"Overviews ({len(grids)})", cards, is_open=not samples)
    return section("Samples", text + controls + body, "samples"), left_out


def _choose_steps(everything: Sequence[Shown], limit: int) -> tuple[list[Shown], list[str]]:
    """Leave at most ``limit`` steps of a run, the first, the last and some between; of overviews the last step's."""
    steps: dict[int, list[int]] = {}
    for one in everything:
        if one.sample.step is not None and one.sample.step not in steps.setdefault(one.number, []):
            steps[one.number].append(one.sample.step)
    kept, notes = {}, []
    for number, found in steps.items():
        found.sort()
        count = min(limit, len(found))
        kept[number] = {found[round(k * (len(found) - 1) / max(1, count - 1))] for k in range(count)}
        if count < len(found):
            name = next(one.run for one in everything if one.number == number)
            notes.append(f"{name}: {len(kept[number])} of {len(found)} steps with samples are shown.")
    chosen = []
    for one in everything:
        step = one.sample.step
        if step is None or (step == steps[one.number][-1] if one.sample.is_grid else step in kept[one.number]):
            chosen.append(one)
    return chosen, notes


def _within_limit(chosen: Sequence[Shown], limit_mb: float) -> tuple[list[Shown], list[str]]:
    """Take files until the limit is reached, what was made last first; the others are named."""
    budget = limit_mb * 1e6
    taken: set[int] = set()
    left_out = []
    for index in sorted(range(len(chosen)), key=lambda index: (-chosen[index].column.order[0], index)):
        sample = chosen[index].sample
        size = sample.path.stat().st_size
        if size <= budget:
            budget -= size
            taken.add(index)
        else:
            left_out.append(f"{sample.path}: {size / 1e6:.1f} MB past the limit of {limit_mb:g} MB in all")
    return [one for index, one in enumerate(chosen) if index in taken], left_out


def _common(parts: Iterable[tuple[str, ...]]) -> list[str]:
    """Words that every sample shares, where there is more than one."""
    found = list(parts)
    return [part for part in found[0] if all(part in other for other in found)] if len(found) > 1 else []


def _kind(sample: Sample) -> str:
    return MIME.get(sample.path.suffix, "image/jpeg")


class _Page:
    """Lay out samples.

    Args:
        common: Words said once, above all samples.
        is_named: Whether cards name their run.
    """

    def __init__(self, common: set[str], *, is_named: bool) -> None:
        self.common, self.is_named = common, is_named

    def rows(self, samples: Sequence[Shown]) -> str:
        """One row for each request, with the same columns in each; or one grid where each has a single sample."""
        cells: dict[tuple[str, tuple[str, ...]], dict[Column, list[Shown]]] = {}
        for one in samples:
            cells.setdefault(one.row, {}).setdefault(one.column, []).append(one)
        columns = sorted({one.column for one in samples}, key=lambda column: (column.order, column.details))
        if len(columns) < 2:
            cards = "".join(self.card(one, self._asked(one.row)) for one in samples)
            return f'<div class="samples">{cards}</div>' if cards else ""
        body = ""
        for row, found in cells.items():
            line = ""
            for column in columns:
                cards = "".join(self.card(one, "") for one in found.get(column, ()))
                line += f'<div class="cell">{cards}</div>' if cards else '<div class="cell empty">not made</div>'
            heading = f"<h3>{self._asked(row)}</h3>"
            has_video = any(_kind(one.sample).startswith("video/") for group in found.values() for one in group)
            play = '<button type="button" class="play-row">Play row</button>' if has_video else ""
            head = f'<div class="head">{heading}{play}</div>'
            body += f'<div class="sample-row">{head}<div class="row">{line}</div></div>'
        return body

    def card(self, shown: Shown, asked: str, *, is_wide: bool = False) -> str:
        """One file with what is said about it."""
        sample = shown.sample
        source = f"data:{_kind(sample)};base64,{base64.b64encode(sample.path.read_bytes()).decode()}"
        if _kind(sample).startswith("video/"):
            media = f'<video controls loop muted playsinline preload="auto" src="{source}"></video>'
        else:
            media = f'<img alt="{escape(sample.caption, quote=True)}" src="{source}">'
        swatch = f'<i class="swatch c{shown.number % 8}"></i>{escape(shown.run)}' if self.is_named else ""
        step = f"step {sample.step:,}" if sample.step is not None else ""
        made = " · ".join(word for word in (step, escape(self._note(sample.details))) if word)
        note = "<br>".join(word for word in (swatch, made) if word)
        lines = [asked] if asked else []
        lines += [f'<span class="note">{note}</span>'] if note else []
        text = f"<figcaption>{'<br>'.join(lines)}</figcaption>" if lines else ""
        return f'<figure class="card{" wide" if is_wide else ""}">{media}{text}</figure>'

    def _note(self, parts: Iterable[str]) -> str:
        return " · ".join(part for part in parts if part not in self.common)

    def _asked(self, row: tuple[str, tuple[str, ...]]) -> str:
        about = self._note(row[1])
        return escape(row[0]) + (f' <span class="note">{escape(about)}</span>' if about else "")
