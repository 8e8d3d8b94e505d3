"""What the README says it measured is what the pages that it names have, and every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\d)")


def rows() -> list[tuple[str, list[str]]]:
    """Rows of tables with the pages that they name; those of the quickstart's table with its page too."""
    found = []
    _, told, rest = README.partition("every figure with its network")
    assert told
    quickstart, _, _ = rest.partition("\n## ")
    for line in README.splitlines():
        pages = [target for target in LINK.findall(line) if target.endswith(".md")]
        pages += ["docs/proofs/quickstart.md"] if line in quickstart else []
        if line.startswith("| ") and pages:
            found.append((line, pages))
    return found


def figures(text: str) -> list[str]:
    """Decimal numbers: those that were measured, and aims, have a point."""
    plain = LINK.sub("", text)
    return re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", plain)


@pytest.mark.parametrize(("line", "pages"), rows(), ids=lambda value: value[:50] if isinstance(value, str) else "")
def test_figures_are_those_of_the_pages(line: str, pages: list[str]) -> None:
    text = "\n".join((ROOT / page).read_text() for page in pages)
    on_pages = [float(found.replace(",", "")) for found in NUMBER.findall(text)]
    for figure in figures(line):
        places = len(figure.partition(".")[2])
        assert any(abs(value - float(figure)) <= 0.5 * 10**-places + 1e-9 for value in on_pages), (figure, pages)


def test_some_rows_have_figures() -> None:
    assert sum(bool(figures(line)) for line, _ in rows()) >= 8


@pytest.mark.parametrize(
    "page", ["README.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text()):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
