"""The loss ledger of a run, read back: tables by source, size, time and caption, and what they advise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ltd.tracking.journal import read_journal
from ltd.tracking.markup import details, section, table

LEDGER = "ledger.jsonl"

#: A source is judged from so many samples on.
LEAST_SAMPLES = 64
#: Relative loss of a source above which it is worth a look for damage, and below which for duplicates.
HIGH, LOW = 1.3, 0.7
#: The deviation must also be this many standard errors.
ERRORS = 4.0
#: Share of losses that are not finite above which a source goes to quarantine.
NOT_FINITE = 0.001


@dataclass
class Sums:
    """Losses of some samples."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    not_finite: int = 0

    def add(self, count: int, total: float, squares: float, not_finite: int) -> None:
        """Add those of others."""
        self.count, self.total, self.squares = self.count + count, self.total + total, self.squares + squares
        self.not_finite += not_finite

    @property
    def mean(self) -> float:
        """Mean loss; nan without samples."""
        return self.total / self.count if self.count else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation; nan without samples."""
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2)) if self.count else math.nan


@dataclass(frozen=True)
class SourceRow:
    """A source beside the others."""

    name: str
    sums: Sums
    #: Its loss over what the other sources have in the same cells (size, time, caption), 1 = alike; nan = none has.
    #: Sources far from the rest are no part of what others are compared with.
    relative: float
    #: Standard error of that.
    error: float
    advice: str


@dataclass(frozen=True)
class LedgerRecord:
    """What a ledger says of a run, or of a part of it."""

    #: (size, part of the times, kind of caption) -> source -> losses.
    cells: Mapping[tuple[str, int, str], Mapping[str, Sums]] = field(default_factory=dict)
    #: First and last step.
    steps: tuple[int, int] = (0, 0)

    def by(self, what: int) -> dict[str, Sums]:
        """Add up by one part of the cells: 0 the size, 1 the time, 2 the caption."""
        found: dict[Any, Sums] = defaultdict(Sums)
        for cell, sources in self.cells.items():
            for sums in sources.values():
                found[cell[what]].add(sums.count, sums.total, sums.squares, sums.not_finite)
        return {str(name): found[name] for name in sorted(found)}

    def sources(self) -> list[SourceRow]:
        """Compare every source with the others in the same cells, the furthest above first."""
        return sorted(_compare(self.cells), key=lambda row: -row.relative if math.isfinite(row.relative) else math.inf)


def read_ledger(run_dir: Path, *, last: float = 0.5) -> LedgerRecord:
    """Read the ledger of a run; the beginning, where losses fall fast, is left out.

    Args:
        run_dir: Directory of the run.
        last: Share of the steps, the last ones, that is read.

    Returns:
        The sums; without cells where the run has no ledger.
    """
    rows = list(read_journal(run_dir / LEDGER))
    if not rows:
        return LedgerRecord()
    begin = rows[-1]["step"] * (1 - last)
    rows = [row for row in rows if row["step"] > begin]
    cells: dict[tuple[str, int, str], dict[str, Sums]] = defaultdict(lambda: defaultdict(Sums))
    for row in rows:
        for source, size, time, caption, count, total, squares, not_finite in row["cells"]:
            cells[size, time, caption][source].add(count, float(total), float(squares), not_finite)
    return LedgerRecord(cells, (rows[0]["from"], rows[-1]["step"]))


Cells = Mapping[tuple[str, int, str], Mapping[str, Sums]]


def _compare(cells: Cells) -> list[SourceRow]:
    """Compare each source with the others, leaving out of the comparison those that are far from the rest.

    One source of noise would make all others look easy. So the furthest is set aside, and the rest compared anew, until
    none is left that there is advice on; never more than half of the sources.

    Reference: Rosner (1983), generalized extreme studentized deviate, for setting aside one after another.
    """
    names = {name for sources in cells.values() for name in sources}
    aside: set[str] = set()
    while True:
        rows = _standardise(cells, aside)
        far = [row for row in rows if row.name not in aside and _is_far(row.sums, row.relative, row.error)]
        if not far or len(aside) + 1 > len(names) // 2:
            return rows
        aside.add(max(far, key=lambda row: abs(math.log(max(row.relative, 1e-12)))).name)


def _standardise(cells: Cells, aside: Set[str]) -> list[SourceRow]:
    """Divide each source's loss by what the others have in its cells, so that sizes and times do not count.

    Args:
        cells: Losses of all sources.
        aside: Sources that are compared and that no other is compared with.

    Reference: indirect standardisation, as of mortality ratios.
    """
    totals: dict[str, Sums] = defaultdict(Sums)
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])  # own, expected, variance
    for sources in cells.values():
        reference = Sums()
        for name, sums in sources.items():
            totals[name].add(sums.count, sums.total, sums.squares, sums.not_finite)
            if name not in aside:
                reference.add(sums.count, sums.total, sums.squares, sums.not_finite)
        for name, sums in sources.items():
            inside = sums if name not in aside else Sums()
            others = reference.count - inside.count
            if others and sums.count:
                spread = Sums()
                for part in (reference, sums) if name in aside else (reference,):
                    spread.add(part.count, part.total, part.squares, part.not_finite)
                own = found[name]
                own[0] += sums.total
                own[1] += sums.count * (reference.total - inside.total) / others
                own[2] += sums.count * spread.deviation**2 * (1 + sums.count / others)
    rows = []
    for name, sums in totals.items():
        ours, expected, variance = found[name]
        relative, error = (ours / expected, math.sqrt(variance) / expected) if expected > 0 else (math.nan, math.nan)
        rows.append(SourceRow(name, sums, relative, error, _advise(sums, relative, error)))
    return rows


def _is_far(sums: Sums, relative: float, error: float) -> bool:
    """Tell whether a source's loss is clearly not that of the others."""
    if sums.count < LEAST_SAMPLES or not math.isfinite(relative):
        return False
    return abs(relative - 1) > ERRORS * error and not LOW <= relative <= HIGH


def _advise(sums: Sums, relative: float, error: float) -> str:
    seen = sums.count + sums.not_finite
    if seen and sums.not_finite / seen > NOT_FINITE:
        return f"quarantine: {sums.not_finite} of {seen} losses are not finite"
    if not _is_far(sums, relative, error):
        return ""
    if relative > HIGH:
        return "quarantine or look: damaged media, wrong captions or content unlike the rest; a lower weight till then"
    return "lower its weight or look: stills, duplicates or flat pictures teach little"


def ledger_section(runs: Sequence[tuple[str, LedgerRecord]]) -> str:
    """Show the ledgers of runs: a table of sources with advice, and those by size, time and caption.

    Args:
        runs: Name and ledger of each.

    Returns:
        HTML; empty without a ledger.
    """
    body = ""
    for name, ledger in runs:
        if not ledger.cells:
            continue
        heading = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
        steps = f'<p class="note">Steps {ledger.steps[0]:,} to {ledger.steps[1]:,}.</p>'
        rows = ledger.sources()
        advice = [row for row in rows if row.advice]
        shown = [_source_cells(row) for row in (advice + [row for row in rows if not row.advice])[:200]]
        columns = ["source", "samples", "loss", "deviation", "relative", "± error", "advice"]
        body += heading + steps + table(columns, shown, numeric=range(1, 6))
        if len(rows) > len(shown):
            body += f'<p class="note">{len(rows) - len(shown)} sources more, without advice.</p>'
        parts = "".join(
            _parts(ledger, what, title) for what, title in enumerate(("size", "part of the times", "caption"))
        )
        body += details("By size, part of the times and caption", parts)
    if not body:
        return ""
    note = (
        "Relative: a source's loss over that of the other sources at the same sizes, times and captions, those far "
        "from the rest left out one after another. Advice: "
        f"relative above {HIGH} or below {LOW} by more than {ERRORS:g} standard errors, from {LEAST_SAMPLES} samples "
        f"on; or more than {100 * NOT_FINITE:g} % of the losses not finite."
    )
    return section("Loss ledger", f'<p class="note">{note}</p>{body}', "ledger")


def _parts(ledger: LedgerRecord, what: int, title: str) -> str:
    rows = [_sum_cells(key, sums) for key, sums in ledger.by(what).items()]
    return f"<p></p>{table([title, 'samples', 'loss', 'deviation'], rows, numeric=range(1, 4))}"


def _source_cells(row: SourceRow) -> list[str]:
    cells = _sum_cells(row.name, row.sums)
    return [*cells, _number(row.relative), _number(row.error), escape(row.advice)]


def _sum_cells(name: str, sums: Sums) -> list[str]:
    return [f"<code>{escape(name)}</code>", f"{sums.count:,}", _number(sums.mean), _number(sums.deviation)]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"
