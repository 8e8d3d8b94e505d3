"""Runs with and without metrics, on one process and two, and what they left: for tests of metrics while training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import train
from ltd import storage
from tests import launched

ROOT = Path(__file__).resolve().parents[2]
OFF = ("metrics.every=0",)
PAIR = ("parallel.engine=deepspeed", "parallel.precision=fp32")


def state(run_dir: Path, step: int = 4) -> dict[str, torch.Tensor]:
    reader = storage.Reader(storage.checkpoint_path(run_dir, step))
    return {f"{group}.{name}": x for group in reader.groups() for name, x in reader.read_full(group).items()}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def trained(run_dir: Path) -> list[dict[str, Any]]:
    """Rows without what an evaluation adds, and without clocks."""
    aside = ("eval/", "time/", "perf/")
    return [{key: value for key, value in row.items() if not key.startswith(aside)} for row in rows(run_dir)]


def measured(run_dir: Path) -> dict[int, dict[str, float]]:
    found = {r["step"]: {key: value for key, value in r.items() if key.startswith("eval/")} for r in rows(run_dir)}
    return {step: values for step, values in found.items() if values}


@dataclass(frozen=True)
class Runs:
    """A configuration made small, and its run with metrics."""

    config: Path
    small: tuple[str, ...]
    measured: tuple[str, ...] = ()

    def run(self, run_dir: Path, *overrides: str) -> Path:
        arguments = [str(self.config), f"run_dir={run_dir}", "parallel.engine=torch", *self.small, *overrides]
        assert train.main(arguments) == 0
        return run_dir

    def launch(self, run_dir: Path, *overrides: str) -> Path:
        launched.train(str(self.config), f"run_dir={run_dir}", *PAIR, *self.small, *overrides)
        return run_dir

    def pair(self, folder: Path) -> dict[str, Path]:
        """Run without metrics and with them."""
        return {"plain": self.run(folder / "plain", *OFF), "measured": self.run(folder / "measured", *self.measured)}


def check_training_goes_on(runs: dict[str, Path]) -> None:
    assert same(state(runs["plain"]), state(runs["measured"]))
    assert trained(runs["plain"]) == trained(runs["measured"])
    assert list(measured(runs["measured"])) == [2, 4] and not measured(runs["plain"])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
