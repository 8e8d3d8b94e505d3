"""Steps that must not be taken, on the debug autoencoder in this process: stop, skip and rewind, and what resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from ltd import storage
from ltd.data import MicroBatch
from ltd.training.autoencoder import AutoencoderStage
from ltd.training.guards import GuardConfig, Guards

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "debug" / "autoencoder.yaml")

Change = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]


def run(shards: Path, run_dir: Path, *overrides: str, steps: int = 10) -> int:
    common = [f"run_dir={run_dir}", f"data.shards={shards}", f"steps={steps}", "evaluation.every=0"]
    return train.main([CONFIG, *common, "checkpoint.every=1", "checkpoint.keep_last=null", *overrides])


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))} for line in lines]


def quarantine(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]


def state(run_dir: Path, step: int) -> dict[str, dict[str, Tensor]]:
    reader = storage.Reader(storage.checkpoint_path(run_dir, step))
    return {group: reader.read_full(group) for group in sorted(reader.groups())}


def equal(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[g][n], b[g][n]) for g in a for n in a[g])


def plant(patch: pytest.MonkeyPatch, change: Change, *, keys: tuple[str, ...] = ()) -> list[list[str]]:
    """Change the loss of each step; ``tensors["bad"]`` marks the keys. Returns the keys seen by step."""
    prepare, terms = AutoencoderStage.prepare, AutoencoderStage.terms
    seen: list[list[str]] = []

    def marked(self: AutoencoderStage, batch: MicroBatch) -> dict[str, Tensor]:
        seen.append(list(batch.keys))
        bad = torch.tensor([key in keys for key in batch.keys]) & (batch.weight > 0)
        return {**prepare(self, batch), "bad": bad}

    def changed(self: AutoencoderStage, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        values = terms(self, tensors)
        return {**values, "loss": change(tensors, values)}

    patch.setattr(AutoencoderStage, "prepare", marked)
    patch.setattr(AutoencoderStage, "terms", changed)
    return seen


def nan_where_bad(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
    return torch.where(tensors["bad"], torch.nan, values["loss"])


@pytest.fixture(scope="module")
def clean(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    run_dir = tmp_path_factory.mktemp("clean")
    with pytest.MonkeyPatch.context() as patch:
        seen = plant(patch, lambda tensors, values: values["loss"])
        assert run(shards, run_dir) == 0
    return run_dir, seen


@pytest.fixture(scope="module")
def bad(clean: tuple[Path, list[list[str]]]) -> str:
    """A sample of step 4 that comes again and was in no step before."""
    seen = clean[1]
    early, late = {key for step in seen[:3] for key in step}, {key for step in seen[4:] for key in step}
    return next(key for key in seen[3] if key in late and key not in early)


def test_skip_leaves_the_step_out_and_the_sample_from_then_on(
    shards: Path, clean: tuple[Path, list[list[str]]], bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, nan_where_bad, keys=(bad,))
    run_dir = tmp_path / "run"
    assert run(shards, run_dir, "guards.non_finite=skip") == 0
    table = rows(run_dir)
    assert [row["step"] for row in table] == list(range(1, 11))
    assert table[3]["loss/autoencoder"] == "nan" and table[3]["guards/discarded"] == 1
    assert "guards/discarded" not in table[2] and table[9]["guards/discarded"] == 1, "its next draw weighs nothing"
    assert [(r["step"], r["cause"], r["policy"], r["keys"]) for r in quarantine(run_dir)] == [
        (4, "non_finite", "skip", [bad])
    ]
    assert equal(state(run_dir, 3), state(clean[0], 3))
    assert equal(state(run_dir, 4), state(run_dir, 3)), "weights, moments and averages of the skipped step"
    assert not equal(state(run_dir, 5), state(run_dir, 4))
    whole = state(run_dir, 10)
    for later in range(6, 11):
        shutil.rmtree(storage.checkpoint_path(run_dir, later))
    (run_dir / "latest").unlink()
    assert run(shards, run_dir, "guards.non_finite=skip") == 0, "the exclusion is in the checkpoint of step 5"
    assert equal(state(run_dir, 10), whole) and rows(run_dir) == table


def test_rewind_takes_the_steps_again_without_the_sample(
    shards: Path, clean: tuple[Path, list[list[str]]], bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewound, reference = tmp_path / "rewound", tmp_path / "reference"
    with monkeypatch.context() as patch:
        plant(patch, nan_where_bad, keys=(bad,))
        assert run(shards, rewound, "guards.non_finite=rewind", "checkpoint.every=2") == 0
    records = quarantine(rewound)
    assert [(r["cause"], r["policy"], r["to"], r["keys"]) for r in records] == [("non_finite", "rewind", 2, [bad])]
    assert "step 4" in records[0]["message"]
    excluded = storage.read_manifest(storage.checkpoint_path(rewound, 10))["guards"]["excluded"]
    assert [name.partition(":")[2] for name in excluded] == [bad]
    # The medians know each step once: what was gone back from is forgotten.
    assert len(storage.read_manifest(storage.checkpoint_path(rewound, 10))["guards"]["losses"]) == 10
    with monkeypatch.context() as patch:
        original = Guards.__init__

        def excluding(self: Guards, config: GuardConfig, state: dict[str, Any] | None = None) -> None:
            original(self, config, state)
            self.exclude(excluded)

        patch.setattr(Guards, "__init__", excluding)
        start = storage.checkpoint_path(clean[0], 2)
        assert run(shards, reference, f"resume={start}", "checkpoint.every=2") == 0
    assert equal(state(rewound, 10), state(reference, 10))
    assert rows(rewound)[:2] == rows(clean[0])[:2]
    losses = [[row["loss/autoencoder"] for row in rows(path)[-8:]] for path in (rewound, reference)]
    assert losses[0] == losses[1]


def test_rewind_needs_a_checkpoint(
    shards: Path,
    clean: tuple[Path, list[list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(monkeypatch, nan_where_bad, keys=(clean[1][0][0],))
    with pytest.raises(SystemExit) as stop:
        run(shards, tmp_path, "guards.non_finite=rewind")
    assert stop.value.code == 1 and "no checkpoint to go back to" in capsys.readouterr().err


def test_stop_keeps_the_steps_before(
    shards: Path, clean: tuple[Path, list[list[str]]], bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, nan_where_bad, keys=(bad,))
    for _ in range(2):  # the same command meets the same step again
        with pytest.raises(SystemExit) as stop:
            run(shards, tmp_path, "checkpoint.every=0")
        assert stop.value.code == 1
        assert storage.latest_checkpoint(tmp_path) == storage.checkpoint_path(tmp_path, 3)
    assert equal(state(tmp_path, 3), state(clean[0], 3))
    assert run(shards, tmp_path, "guards.non_finite=skip") == 0


@pytest.mark.parametrize("cause", ["loss_spike", "gradient_spike"])
def test_spikes_follow_the_policy(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    def spike(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
        loss, at = values["loss"], (tensors["draws"] >= 44) & (tensors["draws"] < 48)
        worse = loss * 1000 if cause == "loss_spike" else loss + 1000 * (loss - loss.detach())
        return torch.where(at, worse, loss)

    seen = plant(monkeypatch, spike)
    assert run(shards, tmp_path, "guards.spike=skip", steps=14) == 0
    assert [(r["step"], r["cause"], sorted(r["keys"])) for r in quarantine(tmp_path)] == [(12, cause, sorted(seen[11]))]
    assert equal(state(tmp_path, 12), state(tmp_path, 11))
    assert rows(tmp_path)[11]["guards/discarded"] == 1
