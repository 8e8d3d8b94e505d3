"""The proof of metrics while training: what it compares, and that it finds a difference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tools.proofs import _runs, evaluation


def run(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    (folder / name).mkdir()
    text = "".join(json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows, start=1))
    (folder / name / "metrics.jsonl").write_text(text)
    return folder / name


def test_differences_of_figures_and_of_training_are_found(tmp_path: Path) -> None:
    first = {"loss/denoise": 1.0, "time/step_s": 3.0}
    measured = run(tmp_path, "measured", first, {**first, "eval/fvd": 2.0, "time/evaluate_s": 2.0})
    other = run(tmp_path, "other", first, {**first, "eval/fvd": 2.5, "time/evaluate_s": 9.0})
    plain = run(tmp_path, "plain", first, {**first, "time/step_s": 1.0})
    worse = run(tmp_path, "worse", first, {**first, "loss/denoise": 1.1})
    assert evaluation.difference(measured, measured) == 0 and evaluation.difference(measured, other) == 0.5
    assert math.isinf(evaluation.difference(measured, plain)) and math.isinf(evaluation.difference(plain, plain))
    assert evaluation.time_share(measured) == pytest.approx(0.25)
    assert _runs.different_rows(plain, measured, aside=("eval/",)) == []
    assert _runs.different_rows(plain, measured) == [2]
    assert _runs.different_rows(plain, worse, aside=("eval/",)) == [2]
