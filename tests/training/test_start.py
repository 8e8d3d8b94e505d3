"""Where a run starts: from another run, from a checkpoint of its own, where processes disagree; empty steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from ltd import storage
from ltd.config import ConfigError
from ltd.data import MicroBatch
from ltd.data.synthetic import make_toy_shards
from ltd.parallel import ParallelConfig
from ltd.parallel.layout import Layout
from ltd.training import session, start
from ltd.training.autoencoder import AutoencoderStage
from tests import launched

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug" / "autoencoder.yaml")


def arguments(shards: Path, run_dir: Path, *overrides: str, steps: int) -> list[str]:
    common = [f"run_dir={run_dir}", f"data.shards={shards}", f"steps={steps}", "evaluation.every=0"]
    return [CONFIG, *common, "checkpoint.every=2", "checkpoint.keep_last=null", "statistics_from=4", *overrides]


def run(shards: Path, run_dir: Path, *overrides: str, steps: int) -> int:
    return train.main(arguments(shards, run_dir, *overrides, steps=steps))


def steps_of(run_dir: Path) -> list[int]:
    return [storage.checkpoint_step(path) for path in storage.checkpoints(run_dir)]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def masters(run_dir: Path, step: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = storage.Reader(storage.checkpoint_path(run_dir, step)).read_full("master")
    return found


def test_two_processes_start_from_another_run_in_a_new_directory(shards: Path, tmp_path: Path) -> None:
    assert run(shards, tmp_path / "a", steps=2) == 0
    words = arguments(shards, tmp_path / "new" / "b", f"resume={tmp_path / 'a'}", steps=4)
    launched.train(*words, "parallel.engine=deepspeed")
    assert steps_of(tmp_path / "new" / "b") == [4]


def test_going_back_sets_the_newer_aside_once(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "run"
    assert run(shards, run_dir, steps=6) == 0
    before = masters(run_dir, 6)
    back = f"resume={storage.checkpoint_path(run_dir, 2)}"
    assert run(shards, run_dir, back, "optim.lr=1e-4", steps=5) == 0
    assert steps_of(run_dir) == [2, 4, 5]
    aside = run_dir / "checkpoints" / "step-00000006.abandoned"
    assert aside.is_dir() and "step-00000006 is now step-00000006.abandoned" in caplog.text
    caplog.clear()
    # The same command again, as a launcher gives it after a failure: on from 5, not from 2.
    assert run(shards, run_dir, back, "optim.lr=1e-4", steps=6) == 0
    assert "steps was 5 in the checkpoint and is 6 now" in caplog.text
    assert steps_of(run_dir) == [2, 4, 5, 6]
    assert any(not torch.equal(before[name], value) for name, value in masters(run_dir, 6).items())
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4, 5, 6]


def test_one_process_decides_where_all_start(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Layout):
        """The second of two processes, which sees no checkpoint yet."""

        def __init__(self) -> None:
            super().__init__(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)
            self.is_main = False

        def broadcast_object(self, value: object) -> object:
            assert value is None
            return main

    def fail(run: object) -> None:
        raise AssertionError("looked for a checkpoint by itself")

    monkeypatch.setattr(start, "_locate_start", fail)
    main: Any = start.Start(None, tmp_path / "step-00000004", {"step": 4}, True)  # type: ignore[type-var]
    assert start.find_start(None, Other()) is main  # type: ignore[type-var]
    main = ConfigError("resume: no")
    with pytest.raises(ConfigError, match="resume: no"):
        start.find_start(None, Other())  # type: ignore[type-var]


def test_a_step_whose_samples_all_failed_changes_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, seen = session.Guards.mask, []

    def masked(self: Any, batch: Any) -> MicroBatch:
        seen.append(batch)
        batch = mask(self, batch)
        return dataclasses.replace(batch, weight=batch.weight * 0) if len(seen) == 4 else batch

    monkeypatch.setattr(session.Guards, "mask", masked)
    assert run(shards, tmp_path / "run", "checkpoint.every=1", steps=5) == 0
    reader = {step: storage.Reader(storage.checkpoint_path(tmp_path / "run", step)) for step in (3, 4, 5)}
    groups = sorted(reader[3].groups())
    for group in groups:
        before, same, after = (reader[step].read_full(group) for step in (3, 4, 5))
        assert all(torch.equal(before[name], same[name]) for name in before), group
        if group != "buffer":
            assert any(not torch.equal(same[name], after[name]) for name in after), group
    manifests = [storage.read_manifest(reader[step].directory) for step in (3, 4)]
    assert manifests[0]["optimizer_step"] == manifests[1]["optimizer_step"] == 3
    assert manifests[0]["guards"] == manifests[1]["guards"]


def test_a_sample_is_left_out_of_its_own_data_set_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        make_toy_shards(
            tmp_path / f"set{seed}", num_videos=4, num_images=0, num_frames=9, height=32, width=32, seed=seed
        )
    terms, bad = AutoencoderStage.terms, set()
    masked: list[set[str]] = []
    mask = session.Guards.mask

    def noted(self: Any, batch: Any) -> MicroBatch:
        result = mask(self, batch)
        masked.append({name for name, weight in zip(batch.ids, result.weight.tolist(), strict=True) if not weight})
        return result

    def broken(self: AutoencoderStage, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        values = terms(self, tensors)
        first = not bad
        bad.add(1)
        return {**values, "loss": values["loss"] * float("nan")} if first else values

    monkeypatch.setattr(AutoencoderStage, "terms", broken)
    monkeypatch.setattr(session.Guards, "mask", noted)
    sets = f"data.datasets=[{{shards: {tmp_path / 'set0'}}}, {{shards: {tmp_path / 'set1'}}}]"
    views = "data.views=[{num_frames: 9, height: 32, width: 32}]"
    overrides = [sets, views, "data.shards=null", "data.global_batch=1", "guards.non_finite=skip"]
    assert run(tmp_path, tmp_path / "run", *overrides, steps=24) == 0
    (excluded,) = storage.read_manifest(storage.checkpoint_path(tmp_path / "run", 24))["guards"]["excluded"]
    assert set().union(*masked) == {excluded}
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert record["keys"] == [excluded.partition(":")[2]] and str(tmp_path / "set") in record["shards"][0]


def test_two_rewinds_in_one_interval_are_both_recorded(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, calls = AutoencoderStage.terms, []

    def broken(self: AutoencoderStage, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        values = terms(self, tensors)
        return {**values, "loss": values["loss"] * float("nan")} if len(calls) in (3, 5) else values

    monkeypatch.setattr(AutoencoderStage, "terms", broken)
    assert run(shards, tmp_path / "run", "guards.non_finite=rewind", steps=6) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [record["to"] for record in records] == [2, 2]


def test_the_heartbeat_hears_each_phase_of_a_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, int]] = []
    enter = session.Heartbeat.enter

    def noted(self: Any, phase: str, step: int) -> None:
        heard.append((phase, step))
        enter(self, phase, step)

    monkeypatch.setattr(session.Heartbeat, "enter", noted)
    assert run(shards, tmp_path / "run", steps=2) == 0
    phases = [phase for phase, step in heard if step == 2]
    assert phases == ["data", "forward", "forward", "backward", "optimizer", "save", "evaluate"]
