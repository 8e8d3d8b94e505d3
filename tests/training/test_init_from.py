"""Runs that start from the weights of another: what they begin with, what they record, what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from ltd import config as config_io
from ltd import denoisers, storage
from ltd.config import ConfigError
from ltd.denoisers import Dit
from ltd.tracking.lineage_section import lineage_section
from ltd.tracking.run_record import read_run
from ltd.training.denoiser import DenoiserRun
from tests import launched
from tools import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug" / "denoiser.yaml")
SMALL = ("toy_data.num_samples=8", "toy_data.num_heldout=2", "data.global_batch=2", "evaluation.every=0")


def arguments(run_dir: Path, *overrides: str, steps: int, engine: str = "torch") -> list[str]:
    return [CONFIG, f"run_dir={run_dir}", f"steps={steps}", f"parallel.engine={engine}", *SMALL, *overrides]


def start(run_dir: Path, *overrides: str, steps: int) -> int:
    return train.main(arguments(run_dir, *overrides, steps=steps))


def tensors(run_dir: Path, step: int, group: str) -> dict[str, Tensor]:
    return storage.Reader(storage.checkpoint_path(run_dir, step)).read_full(group)


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("source") / "run"
    assert start(run_dir, "optim.lr=0.02", "optim.warmup_steps=0", steps=3) == 0
    return run_dir


def grown(image_run: Path, *more: str) -> tuple[str, ...]:
    accept = "[position_scale]"
    options = ("init_from.grow_depth=true", f"init_from.accept={accept}", "model.depth=3")
    return (f"init_from.path={image_run}", *options, "model.position_scale=[0.5,1,1]", "optim.lr=0", *more)


def assert_starts_as(run_dir: Path, expected: dict[str, Tensor]) -> None:
    now = tensors(run_dir, 1, "master")
    assert all(torch.equal(now[name], value) for name, value in expected.items())
    assert any(value.abs().max() > 0.01 for name, value in expected.items() if name.startswith("final."))
    assert any(name.startswith("blocks.2.") for name in now.keys() - expected.keys())
    gates = now["blocks.2.modulation.linear.weight"]
    assert not gates.any()


@pytest.mark.parametrize(("weights", "group"), [("ema", "ema_0.95"), ("raw", "master")])
def test_a_run_begins_with_the_chosen_weights_and_keeps_their_lineage(
    weights: str, group: str, image_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ltd"):
        assert start(tmp_path / "run", *grown(image_run, f"init_from.weights={weights}"), steps=1) == 0
    expected = tensors(image_run, 3, group)
    assert_starts_as(tmp_path / "run", expected)
    report = json.loads((tmp_path / "run" / "init_from.json").read_text())
    checkpoint = storage.checkpoint_path(image_run, 3)
    record = {
        "path": str(image_run),
        "files": str(checkpoint),
        "weights": weights,
        "fingerprint": storage.fingerprint(checkpoint),
    }
    assert {name: report[name] for name in record} == record
    assert report["counts"] == {"copied": len(expected), "drawn": len(report["tensors"]) - len(expected)}
    assert [change["field"] for change in report["fields"]] == ["depth", "position_scale"]
    assert "init_from: model.depth: 2 -> 3: the new blocks" in caplog.text
    manifest = storage.read_manifest(storage.checkpoint_path(tmp_path / "run", 1))
    assert manifest["lineage"]["init_from"] == record and "autoencoder_hash" in manifest["lineage"]
    fork, folder = tmp_path / "fork", tmp_path / "folder"
    changes = [f"fork={tmp_path / 'run'}@1", *grown(image_run)[1:], "init_from=null", "optim.lr=0.01"]
    assert train.main(arguments(fork, *[x for x in changes if not x.startswith("init_from.")], steps=2)) == 0
    assert convert_checkpoint.main([str(fork), str(folder), "--to", "safetensors"]) == 0
    said = f"{image_run}, {weights} (state {record['fingerprint'][:12]})"
    for source in (tmp_path / "run", fork, folder):
        card = convert_checkpoint._card(source, convert_checkpoint._configuration(source), "ema")
        assert card["Began with weights of"] == said
    for source in (tmp_path / "run", fork):
        record_read = read_run(source)
        assert {name: record_read.init_from[name] for name in record} == record
        section = lineage_section([record_read])
        assert record["fingerprint"][:12] in section and f"weights alone ({weights})" in section


def test_resuming_ignores_it_even_when_it_is_gone(image_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(image_run, source)
    overrides = (*grown(source), "optim.lr=0.01", "optim.warmup_steps=0")
    assert start(tmp_path / "whole", *overrides, steps=3) == 0
    assert start(tmp_path / "parts", *overrides, "checkpoint.every=1", steps=3) == 0
    for step in (2, 3):
        shutil.rmtree(storage.checkpoint_path(tmp_path / "parts", step))
    (tmp_path / "parts" / "latest").write_text("step-00000001")
    shutil.rmtree(source)
    assert start(tmp_path / "parts", *overrides, "checkpoint.every=1", steps=3) == 0
    whole, parts = (tensors(tmp_path / name, 3, "master") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    lineage = storage.read_manifest(storage.checkpoint_path(tmp_path / "parts", 3))["lineage"]
    assert lineage["init_from"]["path"] == str(source)


def test_exported_folders_do_too(image_run: Path, tmp_path: Path) -> None:
    assert convert_checkpoint.main([str(image_run), str(tmp_path / "converted"), "--to", "safetensors"]) == 0
    loaded = denoisers.load(image_run)
    assert isinstance(loaded, Dit)
    denoisers.save(loaded, tmp_path / "saved")
    for name in ("converted", "saved"):
        assert start(tmp_path / f"from_{name}", *grown(tmp_path / name), steps=1) == 0
        assert_starts_as(tmp_path / f"from_{name}", loaded.state_dict())


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_every_zero_stage_begins_with_the_same_weights(zero: int, image_run: Path, tmp_path: Path) -> None:
    more = (f"parallel.zero={zero}", "parallel.activation_checkpointing=full", "parallel.sequence=2")
    launched.train(*arguments(tmp_path / "run", *grown(image_run, *more), steps=1, engine="deepspeed"))
    assert_starts_as(tmp_path / "run", tensors(image_run, 3, "ema_0.95"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from.path=nowhere"], "init_from: nowhere: neither an exported folder"),
        (["init_from.weights=ema_0.5"], "init_from: weights: got 'ema_0.5', but"),
        (["model.width=96"], "init_from: model.width: got 96, the weights have 64; no rule"),
        (["model.depth=3"], "init_from: model.depth: got 3, the weights have 2; set grow_depth"),
        (["init_from.accept=[widht]"], "init_from.accept: got 'widht', needed names out of"),
        (["objective.path.kind=gvp"], "init_from: objective.path: got GvpPathConfig"),
        (["objective.prediction.kind=eps"], "init_from: objective.prediction: got NoisePredictionConfig"),
        (
            ["untrained_autoencoder.latent_channels=12", "model.latent_channels=12"],
            "init_from: autoencoder: autoencoder_hash is",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run_begins(
    overrides: list[str], message: str, image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        start(tmp_path / "run", f"init_from.path={image_run}", *overrides, steps=1)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_another_autoencoder_and_more_channels_are_taken_when_accepted(image_run: Path, tmp_path: Path) -> None:
    channels = ("untrained_autoencoder.latent_channels=12", "model.latent_channels=12")
    accept = "init_from.accept=[autoencoder,objective.prediction]"
    more = (*channels, accept, "objective.prediction.kind=eps", "optim.lr=0")
    assert start(tmp_path / "run", f"init_from.path={image_run}", *more, steps=1) == 0
    now, before = tensors(tmp_path / "run", 1, "master"), tensors(image_run, 3, "ema_0.95")
    weight = now["patch_embedding.weight"]
    assert torch.equal(weight[:, :8], before["patch_embedding.weight"]) and not weight[:, 8:].any()


def test_it_does_not_go_with_another_run_to_resume(
    image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        start(tmp_path / "run", f"init_from.path={image_run}", f"resume={image_run}", steps=5)
    assert "init_from: resume = " in capsys.readouterr().err


def test_a_fork_goes_on_with_the_weights_that_its_parent_began_with(
    image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = (*grown(image_run), "optim.lr=0.01", "optim.warmup_steps=0", "checkpoint.every=1")
    trunk, child, grandchild = (tmp_path / name for name in ("trunk", "child", "grandchild"))
    assert start(trunk, *overrides, steps=3) == 0
    assert start(child, *overrides, f"fork={trunk}@1", steps=3) == 0
    assert start(grandchild, *overrides, f"fork={child}@2", steps=3) == 0
    whole = tensors(trunk, 3, "master")
    for run_dir in (child, grandchild):
        parts = tensors(run_dir, 3, "master")
        assert all(torch.equal(parts[name], value) for name, value in whole.items())
        manifest = storage.read_manifest(storage.checkpoint_path(run_dir, 3))
        assert manifest["lineage"]["init_from"]["path"] == str(image_run)
        assert manifest["ancestors"][-1]["overrides"] == {}
    with pytest.raises(SystemExit):
        start(tmp_path / "other", *overrides, "init_from.weights=raw", f"fork={trunk}@1", steps=3)
    assert f"init_from: fork = {trunk}@1 brings weights too; leave init_from out" in capsys.readouterr().err


def test_a_run_of_another_kind_and_a_stage_are_refused(tmp_path: Path) -> None:
    tree: dict[str, Any] = config_io.to_dict(config_io.load(DenoiserRun, CONFIG, ["init_from.path=x"]))
    assert tree["init_from"]["weights"] == "ema"
    tree["stages"] = [{"from_step": 2, "set": {"init_from": {"path": "y"}}}]
    with pytest.raises(ConfigError, match="set.init_from: is one for the whole run"):
        config_io.from_dict(DenoiserRun, tree)
    autoencoder = str(ROOT / "configs" / "debug" / "autoencoder.yaml")
    quick = ("toy_data.num_samples=4", "toy_data.num_heldout=2", "data.global_batch=2", "statistics_from=2")
    assert train.main([autoencoder, f"run_dir={tmp_path / 'a'}", "steps=1", *quick, "evaluation.every=0"]) == 0
    with pytest.raises(ConfigError, match="is a run of kind 'autoencoder', needed a denoiser's"):
        denoisers.open_weights(tmp_path / "a")
