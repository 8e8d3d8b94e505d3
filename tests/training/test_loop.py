"""The loop: stopping, resuming, accumulation and failures, on the debug autoencoder in this process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from ltd import autoencoders, storage
from ltd.autoencoders import AutoencoderLoss
from ltd.data.synthetic import make_toy_shards
from ltd.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug" / "autoencoder.yaml")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    for split, seed in (("train", 0), ("heldout", 1)):
        make_toy_shards(folder / split, num_videos=8, num_images=8, num_frames=9, height=32, width=32, seed=seed)
    return folder


def run(shards: Path, run_dir: Path, *overrides: str, steps: int = 6) -> int:
    common = [f"run_dir={run_dir}", f"data.shards={shards / 'train'}", f"evaluation.shards={shards / 'heldout'}"]
    return train.main([CONFIG, *common, f"steps={steps}", "checkpoint.every=3", "evaluation.every=4", *overrides])


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))} for line in lines]


def weights(run_dir: Path, group: str = "raw") -> dict[str, Tensor]:
    checkpoint = storage.latest_checkpoint(run_dir)
    assert checkpoint is not None
    reader = storage.Reader(checkpoint)
    return reader.read_full(storage.weights_group(reader, group))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    assert run(shards, run_dir) == 0
    return run_dir


def test_rows_are_one_per_step_with_the_promised_names(whole: Path) -> None:
    table = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in table] == [1, 2, 3, 4, 5, 6]
    needed = {"loss/autoencoder", "optim/grad_norm", "optim/lr", "time/step_s", "time/data_s", "perf/tokens_per_s"}
    assert all(needed | {"data/keys_hash"} <= row.keys() for row in table)
    assert [row["step"] for row in table if "eval/psnr_video_db" in row] == [1, 4, 6]
    assert len({row["data/keys_hash"] for row in table}) == 6


def test_export_is_what_load_returns(whole: Path) -> None:
    model = autoencoders.load(whole)
    raw = autoencoders.load(whole, weights="raw")
    assert equal(dict(raw.named_parameters()), weights(whole))
    assert equal(dict(model.named_parameters()), weights(whole, "ema"))
    assert not torch.equal(model.latent_norm.std, torch.ones_like(model.latent_norm.std))


def test_sigterm_saves_exits_with_zero_and_resumes_bit_for_bit(
    shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = Tracker.log

    def log(self: Tracker, step: int, values: dict[str, Any]) -> None:
        genuine(self, step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log)
        assert run(shards, tmp_path) == 0
    assert storage.latest_checkpoint(tmp_path) == storage.checkpoint_path(tmp_path, 5)
    assert not (tmp_path / "model").exists()
    assert run(shards, tmp_path) == 0
    assert rows(tmp_path) == rows(whole)
    assert equal(weights(tmp_path), weights(whole)) and equal(weights(tmp_path, "ema"), weights(whole, "ema"))


def test_finished_run_has_nothing_to_do(shards: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert run(shards, whole) == 0
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}


def test_accumulation_does_not_change_the_run(shards: Path, whole: Path, tmp_path: Path) -> None:
    assert run(shards, tmp_path, "parallel.accumulation=2") == 0
    for ours, theirs in zip(rows(tmp_path), rows(whole), strict=True):
        assert ours["data/keys_hash"] == theirs["data/keys_hash"]
        assert ours["loss/autoencoder"] == pytest.approx(theirs["loss/autoencoder"], rel=1e-4)
        assert ours["optim/grad_norm"] == pytest.approx(theirs["optim/grad_norm"], rel=1e-3)


def test_seed_changes_the_run(shards: Path, whole: Path, tmp_path: Path) -> None:
    assert run(shards, tmp_path, "seed=1", steps=1) == 0
    assert rows(tmp_path)[0]["data/keys_hash"] != rows(whole)[0]["data/keys_hash"]


def test_loss_that_is_not_finite_stops_before_the_step_and_names_the_samples(
    shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genuine = AutoencoderLoss.__call__
    calls = 0

    def broken(self: AutoencoderLoss, *inputs: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        terms = genuine(self, *inputs)
        return {name: value * float("nan") for name, value in terms.items()} if calls == 4 else terms

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderLoss, "__call__", broken)
        with pytest.raises(SystemExit) as stop:
            run(shards, tmp_path)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "stopped before the optimizer step" in message and "toy" in message
    records = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(r["step"], r["cause"], len(r["keys"])) for r in records] == [(4, "non_finite", 4)]
    assert run(shards, tmp_path) == 0, "the checkpoint of step 3 is whole"
    assert equal(weights(tmp_path), weights(whole))


def test_resume_never_refuses_to_write_over_a_run(
    shards: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(shards, whole, "resume=never", steps=9)
    assert stop.value.code == 2
    assert "run_dir" in capsys.readouterr().err


def test_shards_alone_are_enough_for_the_debug_config(shards: Path, tmp_path: Path) -> None:
    common = [f"run_dir={tmp_path}", f"data.shards={shards / 'train'}", "steps=2"]
    assert train.main([CONFIG, *common]) == 0
    assert len(rows(tmp_path)) == 2 and "eval/psnr_video_db" not in rows(tmp_path)[-1]


def test_refused_resume_leaves_the_run_as_it_was(shards: Path, whole: Path) -> None:
    before = (whole / "config.yaml").read_bytes()
    with pytest.raises(SystemExit):
        run(shards, whole, "model.channels=[16, 64]", steps=9)
    assert (whole / "config.yaml").read_bytes() == before
    autoencoders.load(whole)


def test_resume_from_another_run_starts_there_once(shards: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        run(shards, tmp_path, f"resume={whole}", steps=6)
    assert stop.value.code == 2 and not (tmp_path / "config.yaml").exists()
    assert run(shards, tmp_path, f"resume={whole}", steps=8) == 0
    assert [row["step"] for row in rows(tmp_path)] == [7, 8]
    assert run(shards, tmp_path, f"resume={whole}", steps=9) == 0
    assert [row["step"] for row in rows(tmp_path)] == [7, 8, 9], "its own checkpoint comes first"


def test_damage_of_the_right_length_is_found(shards: Path, tmp_path: Path) -> None:
    assert run(shards, tmp_path, steps=3) == 0
    shard = next((tmp_path / "checkpoints").rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(SystemExit) as stop:
        run(shards, tmp_path)
    assert stop.value.code == 2


def test_other_latent_scale_is_exported_anew(shards: Path, tmp_path: Path) -> None:
    assert run(shards, tmp_path, steps=2) == 0
    before = autoencoders.load(tmp_path).latent_norm.std
    assert run(shards, tmp_path, "latent_scale=shared", steps=2) == 0
    after = autoencoders.load(tmp_path).latent_norm.std
    assert torch.allclose(after, before.square().mean().sqrt().expand_as(before))
    assert run(shards, tmp_path, "latent_scale=pixels", steps=2) == 0
    assert autoencoders.load(tmp_path).latent_norm.std.std() > 0


def test_an_older_checkpoint_of_the_run_can_be_asked_for(shards: Path, tmp_path: Path) -> None:
    assert run(shards, tmp_path, steps=6) == 0
    newest = next(storage.checkpoint_path(tmp_path, 6).glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        run(shards, tmp_path, steps=7)
    assert run(shards, tmp_path, f"resume={storage.checkpoint_path(tmp_path, 3)}", steps=7) == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("override", "field"), [("optim.lr=.nan", "optim.lr"), ("seed=-1", "seed"), ("num_threads=0", "num_threads")]
)
def test_numbers_that_cannot_train_are_refused(
    shards: Path, tmp_path: Path, override: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(shards, tmp_path, override)
    assert stop.value.code == 2 and f"error: {field}: " in capsys.readouterr().err


@pytest.mark.parametrize("config", ["autoencoder", "denoiser"])
@pytest.mark.parametrize("empty", [False, True])
def test_held_out_data_that_are_not_there_are_named_before_anything_is_trained(
    config: str, empty: bool, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run_dir = tmp_path / "nothing", tmp_path / "run"
    if empty:
        folder.mkdir()
    overrides = [f"run_dir={run_dir}", f"data.shards={shards / 'train'}", f"evaluation.shards={folder}"]
    command = [str(ROOT / "configs" / "debug" / f"{config}.yaml"), *overrides, "steps=4", "parallel.engine=torch"]
    with pytest.raises(SystemExit):
        train.main([*command, "evaluation.every=4"])
    hint = "the directory holds no .tar" if empty else "no such path"
    error = capsys.readouterr().err
    assert f"error: evaluation.shards: got '{folder}': {hint}" in error and "data.shards" not in error
    assert not (run_dir / "config.yaml").exists()


def test_a_run_of_another_kind_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main([str(ROOT / "configs" / "debug" / "denoiser.yaml"), f"run_dir={whole}", "parallel.engine=torch"])
    assert stop.value.code == 2 and "is a checkpoint of kind 'autoencoder'" in capsys.readouterr().err
