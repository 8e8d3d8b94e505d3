"""The table that every proof measures: what it is, its rows, and which of them miss their limit.

A proof module stands beside this file and exposes ``NAME`` (the page's file name) and ``measure() -> Proof``. It states
its limits itself: a row that breaks one is named in ``misses``, and ``python -m tools.proofs`` then exits 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Proof:
    """One measured table.

    Attributes:
        title: Heading of the page; one line.
        columns: Column names.
        rows: Cells, one sequence per row and as long as ``columns``.
        misses: One line per limit that was missed: which row, what it measured, what it needed. Empty: all held.
        notes: What a reader must know: what was compared, sizes, limits, what is not shown. Markdown, may be empty.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    misses: list[str] = field(default_factory=list)
    notes: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"proof {self.title!r}: a row has {len(row)} cells, needs {len(self.columns)}: {row}")


def format_cell(cell: Cell) -> str:
    """Write one cell: three significant digits for numbers, yes/no for truth values, a dash for nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.3g}"
    return str(cell).replace("|", "\\|").replace("\n", " ")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Lay rows out as a Markdown table; columns that hold only numbers are aligned to the right."""
    texts = [[format_cell(cell) for cell in row] for row in rows]
    widths = [max([3, len(name), *(len(row[i]) for row in texts)]) for i, name in enumerate(columns)]
    numeric = [
        all(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in rows) and bool(rows)
        for i in range(len(columns))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    return "\n".join([line(list(columns)), line(rule), *(line(row) for row in texts)])


def render(proof: Proof, header: Sequence[str]) -> str:
    """Write a proof as a Markdown page.

    Args:
        proof: The table.
        header: Lines on how it was made (command, machine, versions); no dates, so that equal results give equal pages.

    Returns:
        The page's text, ending in a newline.
    """
    verdict = [f"**Missed:** {miss}" for miss in proof.misses] or ["Every limit held."]
    parts = [f"# {proof.title}", "\n".join(f"- {line}" for line in header), markdown_table(proof.columns, proof.rows)]
    parts += verdict
    if proof.notes:
        parts.append(proof.notes.strip())
    return "\n\n".join(parts) + "\n"
