"""Pieces of HTML that the report's sections share. Text that is not yet HTML is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ltd.tracking.charts import number


def value_cell(value: Any) -> str:
    """Write a plain value as a cell: numbers short, nothing as a dash."""
    if value is None or value == "":
        return '<span class="note">-</span>'
    return escape(number(value) if isinstance(value, float) else str(value))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Iterable[int] = ()) -> str:
    """Lay out rows.

    Args:
        columns: Column names, plain text.
        rows: Cells, HTML.
        numeric: Numbers of the columns to align to the right.

    Returns:
        A table that scrolls by itself where the page is narrow.
    """
    right = set(numeric)

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{cell}</{tag}>' if index in right else f"<{tag}>{cell}</{tag}>"
            for index, cell in enumerate(cells)
        )

    head = f"<thead><tr>{line('th', [escape(name) for name in columns])}</tr></thead>"
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="table"><table>{head}<tbody>{body}</tbody></table></div>'


def details(title: str, body: str, *, is_open: bool = False) -> str:
    """Fold HTML under a line of HTML."""
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>{body}</details>"


def section(title: str, body: str, anchor: str) -> str:
    """Put HTML under a heading; a section without a body is nothing."""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>' if body else ""
