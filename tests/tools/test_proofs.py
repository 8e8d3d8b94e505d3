"""How proofs are laid out and run; what they measure is tested where it is built."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from tools.proofs import __main__ as runner
from tools.proofs.table import Proof, format_cell, markdown_table, render

ROWS = [("a|b", 12, 0.000123456, True), ("c", 3, 2.0, None)]


def test_table_is_aligned_markdown_with_numbers_to_the_right() -> None:
    assert markdown_table(("name", "n", "difference", "held"), ROWS).splitlines() == [
        "| name |   n | difference | held |",
        "| ---- | --: | ---------: | ---- |",
        "| a\\|b |  12 |   0.000123 | yes  |",
        "| c    |   3 |          2 | -    |",
    ]
    assert format_cell(1.5e-7) == "1.5e-07"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a row has 1 cells, needs 2"):
        Proof("x", ("a", "b"), [(1,)])


def test_a_page_names_every_miss() -> None:
    page = render(Proof("T", ("a",), [(1,)], misses=["row 1: 3 over 2"], notes="why"), ["Command: x"])
    assert page.startswith("# T\n\n- Command: x\n\n")
    assert "**Missed:** row 1: 3 over 2" in page
    assert page.endswith("why\n")
    assert "Every limit held." in render(Proof("T", ("a",), [(1,)]), [])


@pytest.mark.parametrize(("misses", "code"), [([], 0), (["row 2: too large"], 1)])
def test_a_miss_fails_the_command_and_is_printed(
    misses: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = types.SimpleNamespace(NAME="good", measure=lambda: Proof("Good", ("a",), [(1,)]))
    other = types.SimpleNamespace(NAME="other", measure=lambda: Proof("Other", ("a",), [(2,)], misses=misses))
    monkeypatch.setattr(runner, "proof_modules", lambda: {"good": good, "other": other})
    assert runner.main(["--out", str(tmp_path)]) == code
    assert all(miss in capsys.readouterr().out for miss in misses)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == ["good.md", "other.md"]
    runner.main(["--out", str(tmp_path)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first, "equal results give equal pages"
    assert runner.main(["good", "--out", str(tmp_path / "one")]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["good.md"]
    assert runner.main(["god"]) == 2
    assert "no proof named god; there are: good, other" in capsys.readouterr().err


def test_every_proof_here_can_be_found() -> None:
    modules = runner.proof_modules()
    files = {path.stem for path in Path(runner.__file__).parent.glob("[a-z]*.py")} - runner.NOT_PROOFS
    assert len(modules) == len(files)
    assert all(callable(module.measure) for module in modules.values())
