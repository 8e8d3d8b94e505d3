"""The loss ledger read back: what is compared with what, the advice, and the table of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ltd.tracking.journal import Journal
from ltd.tracking.ledger import LEDGER, LedgerRecord, SourceRow, ledger_section, read_ledger
from ltd.tracking.report import build_page
from ltd.tracking.run_record import read_run

Loss = Callable[[str, str, int], float]


def write(run_dir: Path, loss: Loss, *, steps: int = 10, count: int = 20, bad: dict[str, int] | None = None) -> Path:
    """Write a ledger of four sources, one of which has longer clips than the others."""
    generator = np.random.default_rng(0)
    journal = Journal(run_dir / LEDGER, start_step=1)
    for step in range(1, steps + 1):
        cells = []
        for source in ("a/0.tar", "a/1.tar", "b/0.tar", "b/<odd>.tar"):
            for size in ("1x32x32", "9x32x32"):
                n = count if (source == "b/0.tar") == (size == "9x32x32") else 3
                for time in range(2):
                    values = loss(source, size, time) * (1 + 0.2 * generator.standard_normal(n))
                    failed = (bad or {}).get(source, 0) if step == steps else 0
                    sums = [n, float(values.sum()), float((values**2).sum()), failed]
                    cells.append([source, size, time, "caption" if time else "dropped", *sums])
        journal.append(step, {"from": step, "cells": cells})
    journal.close()
    return run_dir


def rows(record: LedgerRecord) -> dict[str, SourceRow]:
    return {row.name: row for row in record.sources()}


def alike(source: str, size: str, time: int) -> float:
    return (5.0 if size == "9x32x32" else 1.0) * (1 + time)


def test_harder_sizes_and_times_are_no_fault_of_a_source(tmp_path: Path) -> None:
    found = rows(read_ledger(write(tmp_path, alike)))
    assert found["b/0.tar"].sums.mean > 2 * found["a/0.tar"].sums.mean, "its clips are longer"
    assert all(row.relative == pytest.approx(1, abs=0.05) and not row.advice for row in found.values())


@pytest.mark.parametrize(("factor", "advice"), [(1.6, "quarantine or look"), (0.4, "lower its weight")])
def test_source_far_from_the_rest(tmp_path: Path, factor: float, advice: str) -> None:
    def loss(source: str, size: str, time: int) -> float:
        return alike(source, size, time) * (factor if source == "a/1.tar" else 1.0)

    found = rows(read_ledger(write(tmp_path, loss)))
    assert found["a/1.tar"].relative == pytest.approx(factor, rel=0.1) and advice in found["a/1.tar"].advice
    assert not any(row.advice for name, row in found.items() if name != "a/1.tar")


def test_few_samples_are_not_judged(tmp_path: Path) -> None:
    def loss(source: str, size: str, time: int) -> float:
        return 2.0 if source == "a/1.tar" else 1.0

    assert not rows(read_ledger(write(tmp_path, loss, steps=2, count=3)))["a/1.tar"].advice


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    found = rows(read_ledger(write(tmp_path, alike, bad={"b/0.tar": 2})))
    assert found["b/0.tar"].advice.startswith("quarantine: 16 of") or "not finite" in found["b/0.tar"].advice
    assert not found["a/0.tar"].advice


def test_first_half_is_left_out(tmp_path: Path) -> None:
    record = read_ledger(write(tmp_path, alike))
    assert record.steps == (6, 10)
    assert read_ledger(tmp_path, last=1.0).steps == (1, 10)
    assert read_ledger(tmp_path / "nothing") == LedgerRecord()


def test_sums_by_one_part(tmp_path: Path) -> None:
    record = read_ledger(write(tmp_path, alike), last=1.0)
    total = sum(row.sums.count for row in record.sources())
    for what in range(3):
        assert sum(sums.count for sums in record.by(what).values()) == total
    assert list(record.by(2)) == ["caption", "dropped"]
    assert record.by(1)["1"].mean == pytest.approx(2 * record.by(1)["0"].mean, rel=0.05)


def test_report_shows_the_table(tmp_path: Path) -> None:
    def loss(source: str, size: str, time: int) -> float:
        return alike(source, size, time) * (2 if source == "b/<odd>.tar" else 1)

    write(tmp_path, loss)
    row = {"step": 1, "loss/x": 1.0, "perf/mfu": 0.25, "perf/bucket/1x2x2/mfu": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    page, _ = build_page([read_run(tmp_path)])
    section = page[page.index('<section id="ledger">') :]
    assert "b/&lt;odd&gt;.tar" in section and "<odd>" not in page
    assert section.index("b/&lt;odd&gt;.tar") < section.index("a/0.tar"), "what is advised on comes first"
    assert "quarantine or look" in section and "above 1.3 or below 0.7" in section
    assert "median MFU" in page and "25 %" in page
    assert page.index("1 more curve") < page.index("perf/bucket/1x2x2/mfu"), "folded away"
    assert ledger_section([("x", LedgerRecord())]) == ""


def test_a_source_of_noise_does_not_make_the_others_look_easy(tmp_path: Path) -> None:
    def loss(source: str, size: str, time: int) -> float:
        return alike(source, size, time) * {"a/1.tar": 8.0, "b/<odd>.tar": 0.5}.get(source, 1.0)

    found = rows(read_ledger(write(tmp_path, loss, count=40)))
    assert found["a/1.tar"].relative == pytest.approx(8, rel=0.1) and "quarantine or look" in found["a/1.tar"].advice
    assert found["b/<odd>.tar"].relative == pytest.approx(0.5, rel=0.1)
    assert "lower its weight" in found["b/<odd>.tar"].advice
    for name in ("a/0.tar", "b/0.tar"):
        assert found[name].relative == pytest.approx(1, abs=0.1) and not found[name].advice


def test_half_of_the_sources_at_most_are_set_aside(tmp_path: Path) -> None:
    sources = {"a/0.tar": 1.0, "a/1.tar": 3.0, "b/0.tar": 9.0, "b/<odd>.tar": 27.0}
    found = rows(read_ledger(write(tmp_path, lambda source, size, time: sources[source], count=40)))
    assert all(math.isfinite(row.relative) for row in found.values())
    assert sorted(sources, key=lambda name: found[name].relative) == list(sources)
