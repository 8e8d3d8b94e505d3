"""What every benchmark measures: rows of one work, timed in interleaved rounds, and the table made of them.

A bench module stands beside this file and exposes ``KIND`` (the page it belongs to), ``NAME``, ``SHAPES``,
``TINY_SHAPES`` and ``LAYOUT`` (said above the table: what sizes, on how many processes split in which way) and
``measure(repeats, *, tiny=False) -> list[Row]``; ``summary(rows) -> list[str]`` may add lines below the table, and
``missing() -> str`` may say why it cannot run here. Tiny sizes show that a bench runs. Rows of the same ``work`` are
compared with the row marked ``ours``; ratios are paired per round, so a load that lasts several rounds falls on all
systems alike.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tools.proofs.table import markdown_table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system at one work.

    Attributes:
        work: What was done; rows with the same text are compared.
        system: Who did it, with the version and the settings that matter.
        cpu_s: CPU seconds per 1,000 items, children included, one per round; none where it is not measured.
        wall_s: Wall seconds per 1,000 items, one per round.
        ours: Whether this is the row the others are compared with.
        psnr_db: Fidelity to the exact result, None where it is exact or has no meaning.
        missing: Why the system was not measured; "" where it was.
        figures: What else was measured, one per round, by the name of a column of its own.
    """

    work: str
    system: str
    cpu_s: Sequence[float] = ()
    wall_s: Sequence[float] = ()
    ours: bool = False
    psnr_db: float | None = None
    missing: str = ""
    figures: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.wall_s) == bool(self.missing) or (self.cpu_s and len(self.cpu_s) != len(self.wall_s)):
            raise ValueError(f"bench row {self.system!r}: needs one wall time per round, or why it is missing")


@dataclass(frozen=True, kw_only=True)
class System:
    """A way to do a work.

    Attributes:
        name: Becomes ``Row.system``.
        run: Does the work once and returns the number of items done; None where the system is not installed.
        missing: Why ``run`` is None.
        ours: Whether the others are compared with it.
        psnr_db: Becomes ``Row.psnr_db``.
        before: Called before each timed run, untimed (to make a cache cold, say).
    """

    name: str
    run: Callable[[], int] | None
    missing: str = ""
    ours: bool = False
    psnr_db: float | None = None
    before: Callable[[], None] | None = None


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def interleave(work: str, systems: Sequence[System], *, repeats: int) -> list[Row]:
    """Time systems in rounds: each round runs every system once, in an order that turns from round to round.

    Args:
        work: Becomes ``Row.work``.
        systems: What to time; children that they start must have ended when ``run`` returns, or their CPU is not seen.
        repeats: Rounds, after one that warms up and is thrown away.

    Returns:
        A row per system, in the order given.
    """
    cpu: dict[str, list[float]] = {system.name: [] for system in systems}
    wall: dict[str, list[float]] = {system.name: [] for system in systems}
    present = [system for system in systems if system.run is not None]
    for turn in range(repeats + 1):
        shift = turn % max(1, len(present))
        for system in present[shift:] + present[:shift]:
            if system.before is not None:
                system.before()
            assert system.run is not None
            cpu_start, wall_start = cpu_seconds(), time.perf_counter()
            items = system.run()
            wall_s, cpu_s = time.perf_counter() - wall_start, cpu_seconds() - cpu_start
            if turn:
                cpu[system.name].append(cpu_s / items * 1000)
                wall[system.name].append(wall_s / items * 1000)
    return [
        Row(
            work=work,
            system=system.name,
            cpu_s=cpu[system.name],
            wall_s=wall[system.name],
            ours=system.ours,
            psnr_db=system.psnr_db,
            missing=system.missing,
        )
        for system in systems
    ]


def spread(values: Sequence[float]) -> str:
    """Write the median and, in brackets, the smallest and largest of some rounds."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def ratio(values: Sequence[float], ours: Sequence[float]) -> str:
    """Write a peer's time over ours, paired per round: median and, in brackets, smallest and largest."""
    pairs = [value / own for value, own in zip(values, ours, strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f}-{max(pairs):.2f})"


def bench_table(rows: Sequence[Row], *, mark: str = "") -> str:
    """Lay rows out as a Markdown table.

    Args:
        rows: Measured and missing systems.
        mark: Put behind every figure's system, where the figures must not be trusted.

    Returns:
        The table; a ratio above 1 means that ours is faster.
    """
    reference: Mapping[str, Row] = {row.work: row for row in rows if row.ours and not row.missing}
    columns = [
        "work",
        "system",
        "CPU s / 1,000",
        "wall s / 1,000",
        "CPU ratio to ours",
        "wall ratio to ours",
    ]
    fidelity = ["PSNR dB"] if any(row.psnr_db is not None for row in rows) else []
    others = list(dict.fromkeys(name for row in rows for name in row.figures))
    cells: list[list[str]] = []
    for row in rows:
        if row.missing:
            rest = ["-"] * (3 + len(fidelity) + len(others))
            cells.append([row.work, row.system, f"missing: {row.missing}", *rest])
            continue
        own = reference.get(row.work)
        ratios = ["-", "-"]
        if own is not None and own is not row:
            pairs = ((row.cpu_s, own.cpu_s), (row.wall_s, own.wall_s))
            ratios = [ratio(times, own_times) if times and own_times else "-" for times, own_times in pairs]
        psnr = ["-" if row.psnr_db is None else f"{row.psnr_db:.1f}"] * len(fidelity)
        figures = [spread(row.figures[name]) if row.figures.get(name) else "-" for name in others]
        name = f"{row.system} (ours)" if row.ours else row.system
        cpu = spread(row.cpu_s) if row.cpu_s else "-"
        cells.append([row.work, name + mark, cpu, spread(row.wall_s), *ratios, *psnr, *figures])
    return markdown_table([*columns, *fidelity, *others], cells)
