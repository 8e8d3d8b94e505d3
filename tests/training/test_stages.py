"""Stages of one run: what changes where, resuming at and around boundaries, refusals; one process and two."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from ltd import config as config_io
from ltd import storage
from ltd.config import ConfigError
from ltd.data.synthetic import make_toy_shards
from ltd.training import loop
from ltd.training.autoencoder import AutoencoderRun
from ltd.training.denoiser import DenoiserRun
from ltd.training.replay import load_run, replay
from ltd.training.stages import at_step
from tests import launched
from tests.training.test_autoencoder_run import equal, rows, state, worst

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug" / "autoencoder_stages.yaml")
#: Sizes and length change after 2 steps, a discriminator joins after 4, and after 6 the decoder is trained alone.
BOUNDARIES = (2, 4, 6)
STEPS = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_toy_shards(folder, num_videos=16, num_images=8, num_frames=9, height=48, width=48, seed=0)
    return folder


def go_back(source: Path, run_dir: Path, step: int) -> None:
    """Copy a run as it was after a step."""
    shutil.copytree(source, run_dir)
    for path in storage.checkpoints(run_dir):
        if storage.checkpoint_step(path) > step:
            shutil.rmtree(path)
    storage.write_latest(run_dir, storage.checkpoint_path(run_dir, step))


def stages() -> list[dict[str, Any]]:
    found = config_io.to_dict(config_io.load(AutoencoderRun, CONFIG))["stages"]
    return [{**stage, "from_step": step} for stage, step in zip(found, BOUNDARIES, strict=True)]


def write_config(folder: Path, **changes: Any) -> str:
    tree = config_io.to_dict(config_io.load(AutoencoderRun, CONFIG))
    tree |= {"steps": STEPS, "stages": stages(), "statistics_from": 4} | changes
    tree["evaluation"]["every"] = 0
    tree["checkpoint"] |= {"every": 0, "keep_last": None}
    path = folder / "config.yaml"
    config_io.save(tree, path)
    return str(path)


def arguments(shards: Path, folder: Path, *overrides: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return [write_config(folder), f"run_dir={folder / 'run'}", f"data.shards={shards}", *overrides]


@pytest.fixture(scope="module")
def staged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    assert train.main(arguments(shards, folder)) == 0
    return folder / "run"


def test_each_stage_changes_what_it_says_and_nothing_else(staged: Path) -> None:
    found = rows(staged)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [storage.checkpoint_step(path) for path in storage.checkpoints(staged)] == [*BOUNDARIES, STEPS]
    assert ["loss/adversarial" in row for row in found] == [False] * 4 + [True] * 4
    # The high-frequency term is part of the loss from the discriminator's stage on.
    assert ["loss/high_frequency" in row for row in found] == [False] * 4 + [True] * 4
    assert found[7]["optim/lr"] < found[5]["optim/lr"] / 2
    before, after = (state(staged, step) for step in (6, STEPS))
    moved = [
        n for n in before["master"] if n in after["master"] and not torch.equal(before["master"][n], after["master"][n])
    ]
    assert moved and all(name.startswith("decoder.") for name in moved)
    kept = {**after.get("frozen", {}), **after.get("buffer", {}), **after["master"]}
    for name, value in before["master"].items():
        if name.startswith("encoder."):
            assert torch.equal(kept[name], value), name
    manifest = storage.read_manifest(storage.checkpoint_path(staged, STEPS))
    assert len(manifest["config"]["stages"]) == 3 and manifest["config"]["train"] == "all"


@pytest.mark.parametrize("stopped", [*BOUNDARIES])
def test_resuming_at_a_boundary_is_going_on_bit_for_bit(
    staged: Path, shards: Path, tmp_path: Path, stopped: int
) -> None:
    go_back(staged, tmp_path / "run", stopped)
    assert train.main(arguments(shards, tmp_path)) == 0
    assert equal(state(tmp_path / "run", STEPS), state(staged, STEPS))
    assert rows(tmp_path / "run") == rows(staged)


def test_saving_inside_a_stage_and_resuming_there_changes_nothing(staged: Path, shards: Path, tmp_path: Path) -> None:
    assert train.main(arguments(shards, tmp_path, "checkpoint.every=1")) == 0
    assert equal(state(tmp_path / "run", STEPS), state(staged, STEPS))
    for step in range(4, STEPS + 1):
        shutil.rmtree(storage.checkpoint_path(tmp_path / "run", step))
    storage.write_latest(tmp_path / "run", storage.checkpoint_path(tmp_path / "run", 3))
    assert train.main(arguments(shards, tmp_path)) == 0
    assert equal(state(tmp_path / "run", STEPS), state(staged, STEPS))


def test_a_signal_at_a_boundary_stops_the_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = loop._Loop._log

    def log(self: Any, done: int, *rest: Any) -> None:
        genuine(self, done, *rest)
        if done == 2:  # the flags of the step have been exchanged already
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop._Loop, "_log", log)
    assert train.main(arguments(shards, tmp_path)) == 0
    assert [storage.checkpoint_step(path) for path in storage.checkpoints(tmp_path / "run")] == [2]
    assert not (tmp_path / "run" / "model").exists()


def test_what_a_stage_thaws_begins_without_moments_and_resumes_bit_for_bit(
    staged: Path, shards: Path, tmp_path: Path
) -> None:
    later = [{"from_step": 2, "set": {"train": "all"}}]
    overrides = (f"data.shards={shards}", f"start_from={staged}", "train=decoder")
    for name in ("whole", "again"):
        folder = tmp_path / name
        folder.mkdir()
        path = write_config(folder, stages=later, steps=4)
        if name == "again":
            shutil.copytree(tmp_path / "whole" / "run", folder / "run")
            for step in (3, 4):
                shutil.rmtree(storage.checkpoint_path(folder / "run", step))
            storage.write_latest(folder / "run", storage.checkpoint_path(folder / "run", 2))
        assert train.main([path, f"run_dir={folder / 'run'}", *overrides, "checkpoint.every=1"]) == 0
    found = {step: state(tmp_path / "whole" / "run", step) for step in (1, 2, 3, 4)}
    assert equal(found[4], state(tmp_path / "again" / "run", 4))
    name = "encoder.conv_in.weight"
    assert torch.equal(found[1]["buffer"][name], found[2]["buffer"][name]) and name not in found[2]["master"]
    assert not torch.equal(found[2]["buffer"][name], found[3]["master"][name])
    # The first moment after one step from zero is that step's share of the gradient: no larger than (1 - beta1) times
    # the clipped gradient's norm of 1.
    assert 0 < float(found[3]["exp_avg"][name].norm()) <= 0.1 + 1e-6
    # Its average began at the frozen value: after one step it lies between that and the new one.
    before, after, average = found[2]["buffer"][name], found[3]["master"][name], found[3]["ema_0.95"][name]
    share = float(((average - before) * (after - before)).sum() / (after - before).square().sum())
    assert 0 < share < 1
    torch.testing.assert_close(average, before + share * (after - before), rtol=0, atol=1e-6)


def test_a_step_of_any_stage_can_be_taken_again(staged: Path, tmp_path: Path) -> None:
    run = load_run(staged, [])
    for step in (2, 3, 6, 8):
        assert set(replay(run, staged, step).differences().values()) == {0.0}
    shutil.copytree(staged, tmp_path / "run")
    shutil.rmtree(storage.checkpoint_path(tmp_path / "run", 4))
    with pytest.raises(
        ConfigError, match=r"--step: got 5, but the last checkpoint .*-00000002, is of the stage .* at 4"
    ):
        replay(run, tmp_path / "run", 5)


@pytest.mark.dist
def test_two_processes_go_through_the_stages(staged: Path, shards: Path, tmp_path: Path) -> None:
    sgd = ("optim.kind=sgd", "parallel.engine=deepspeed", "parallel.zero=2", "optim.lr=0.01")
    plain = [{**stage, "set": {k: v for k, v in stage["set"].items() if k != "adversarial"}} for stage in stages()]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = write_config(tmp_path / name, stages=plain)
        words = [path, f"run_dir={tmp_path / name / 'run'}", f"data.shards={shards}", *sgd]
        if name == "one":
            assert train.main([*words, "parallel.engine=torch", "parallel.zero=0"]) == 0
            continue
        launched.train(*words)
    one, two = (state(tmp_path / name / "run", STEPS)["master"] for name in ("one", "two"))
    assert worst(one, two) < 1e-5


def test_what_holds_at_a_step() -> None:
    run = config_io.load(AutoencoderRun, CONFIG)
    held = [at_step(run, step) for step in (0, 15, 16, 31, 32, 40)]
    assert [until for _, until in held] == [16, 16, 24, 32, 40, 40]
    assert [found.data.views[0].num_frames for found, _ in held] == [5, 5, 9, 9, 9, 9]
    assert [found.adversarial is None for found, _ in held] == [True, True, True, False, False, False]
    assert [found.train for found, _ in held] == ["all"] * 4 + ["decoder"] * 2
    assert [found.optim.lr for found, _ in held] == [1e-3] * 4 + [2e-4] * 2
    assert all(found.optim.warmup_steps == 10 and found.stages == () for found, _ in held)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([{"from_step": 0, "set": {}}], r"stages\[0\]\.from_step: got 0, needed 1 or more"),
        ([{"from_step": 8, "set": {}}], r"stages\[0\]\.from_step: got 8, needed more than 0 and less than steps \(8\)"),
        (
            [{"from_step": 3, "set": {}}, {"from_step": 3, "set": {}}],
            r"stages\[1\]\.from_step: got 3, needed more than 3",
        ),
        ([{"from_step": 3, "set": {"model": {"blocks": 2}}}], r"stages\[0\]\.set\.model: is one for the whole run"),
        (
            [{"from_step": 3, "set": {"parallel": {"sequence": 2}}}],
            r"stages\[0\]\.set\.parallel\.sequence: is one for the whole run",
        ),
        ([{"from_step": 3, "set": {"optim": {"lrr": 1}}}], r"stages\[0\]\.set\.optim\.lrr: unknown field"),
        ([{"from_step": 3, "set": {"optim": {"lr": "x"}}}], r"stages\[0\]\.set\.optim\.lr: expected float"),
        ([{"from_step": 3, "set": {"frames_per_chunk": 3}}], r"stages\[0\]\.set\.frames_per_chunk: got 3"),
        ([{"step": 3, "set": {}}], r"stages\[0\]\.step: unknown field"),
        ([{"from_step": 3, "set": {"optim": {"kind": "sgd"}}}], r"stages\[0\]\.set\.optim\.kind: changes from 'adamw'"),
        (
            [
                {"from_step": 3, "set": {"adversarial": {"discriminator": {"kind": "patch3d"}, "optim": {}}}},
                {"from_step": 5, "set": {"adversarial": {"discriminator": {"channels": 128}}}},
            ],
            r"stages\[1\]\.set\.adversarial\.discriminator: changes from",
        ),
        (
            [{"from_step": 3, "set": {"data": {"views": [{"num_frames": 4, "height": 32, "width": 32}]}}}],
            r"stages\[0\]\.set\.data\.views\[0\]: num_frames must be",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(tmp_path: Path, changed: list[dict[str, Any]], message: str) -> None:
    path = write_config(tmp_path, stages=changed)
    with pytest.raises(ConfigError, match=message):
        config_io.load(AutoencoderRun | DenoiserRun, path, [f"run_dir={tmp_path / 'run'}", "data.shards=nowhere"])
