"""Forks: equal to the run they are from, a fork of a fork too; what they inherit, what is refused, cool-downs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import train
from ltd import config as config_io
from ltd import storage
from ltd.config import ConfigError
from ltd.data.synthetic import make_toy_shards
from ltd.diffusion import ParametrizationConfig
from ltd.interop.card import write_card
from ltd.parallel.histograms import bin_edges
from ltd.tracking import tracker as tracking
from ltd.training import fork
from ltd.training.denoiser import DenoiserRun, DenoiserStage
from ltd.training.replay import load_run, replay
from tools import convert_checkpoint, report
from tools.proofs._runs import different_shards

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug" / "denoiser.yaml")
COOLDOWN = str(ROOT / "configs" / "debug" / "denoiser_cooldown.yaml")
STEPS = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_toy_shards(folder, num_videos=16, num_images=16, num_frames=9, height=32, width=32, seed=0)
    return folder


def run(shards: Path, run_dir: Path, *overrides: str, steps: int = STEPS, config: str = CONFIG) -> int:
    common = [f"run_dir={run_dir}", f"data.shards={shards}", f"steps={steps}", f"evaluation.shards={shards}"]
    common += ["evaluation.every=3", "checkpoint.every=2", "checkpoint.keep_last=null", "parallel.engine=torch"]
    try:
        return train.main([config, *common, *overrides])
    except SystemExit as ended:
        return int(str(ended.code))


def rows(run_dir: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in found]
    assert steps == sorted(set(steps)), "one row per step, in order"
    clocks = ("time/", "perf/")
    return {row["step"]: {name: row[name] for name in row if not name.startswith(clocks)} for row in found}


def since(run_dir: Path, step: int) -> dict[int, dict[str, Any]]:
    return {number: row for number, row in rows(run_dir).items() if number > step}


def ancestors(run_dir: Path, step: int = STEPS) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = storage.read_manifest(storage.checkpoint_path(run_dir, step))["ancestors"]
    return found


@pytest.fixture(scope="module")
def trunk(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trunk") / "run"
    assert run(shards, run_dir) == 0
    return run_dir


def test_a_fork_and_its_fork_equal_the_trunk_bit_for_bit(shards: Path, trunk: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(shards, first, f"fork={trunk}@4") == 0
    assert run(shards, second, f"fork={first}@6") == 0
    for run_dir, step in ((first, 4), (second, 6)):
        assert rows(run_dir) == since(trunk, step) and len(rows(run_dir)) == STEPS - step
        assert different_shards(trunk, run_dir, STEPS) == ([], 1)
    found = ancestors(second)
    assert found == storage.read_lineage(second) and not (trunk / "lineage.json").exists()
    assert [(entry["run"], entry["step"], entry["overrides"]) for entry in found] == [
        (str(trunk), 4, {}),
        (str(first), 6, {}),
    ]
    assert [entry["fingerprint"] for entry in found] == [
        storage.fingerprint(storage.checkpoint_path(trunk, 4)),
        storage.fingerprint(storage.checkpoint_path(first, 6)),
    ]
    # Each step of a fork can be taken again, also those before its first checkpoint.
    assert set(replay(load_run(first, []), first, 5).differences().values()) == {0.0}


def test_a_fork_may_change_data_rate_and_averages(
    shards: Path, trunk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    child = tmp_path / "child"
    changes = ["data.global_batch=8", "optim.lr=2e-4", "ema.decays=[0.95,0.5]", "steps=6"]
    assert run(shards, child, f"fork={trunk}@4", *changes) == 0
    assert list(rows(child)) == [5, 6] and rows(child)[5]["loss/denoise"] != rows(trunk)[5]["loss/denoise"]
    (entry,) = ancestors(child, 6)
    assert sorted(entry["overrides"]) == ["data.global_batch", "ema.decays", "optim.lr", "steps"]
    assert "optim.lr was 0.001 in the run it is forked from and is 0.0002 now" in caplog.text
    assert "going on at step 4 of the new order" in caplog.text and "ema_0.5; it starts from the loaded" in caplog.text


def test_forks_within_and_at_the_end_of_a_stage_equal_the_trunk(shards: Path, tmp_path: Path) -> None:
    trunk = tmp_path / "trunk"
    stages = "stages=[{from_step: 6, set: {optim: {lr: 1.0e-4}}}]"
    assert run(shards, trunk, stages) == 0
    for step in (4, 6):
        child = tmp_path / f"child{step}"
        assert run(shards, child, stages, f"fork={trunk}@{step}", "resume=never") == 0
        assert rows(child) == since(trunk, step) and different_shards(trunk, child, STEPS) == ([], 1)


def test_a_fork_inherits_what_the_guards_know_and_the_counts_of_bad_samples(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, calls = DenoiserStage.terms, []

    def broken(self: Any, tensors: Any) -> Any:
        calls.append(1)
        values = terms(self, tensors)
        return {**values, "loss": values["loss"] * float("nan")} if len(calls) == 3 else values

    trunk, child, grandchild = (tmp_path / name for name in ("trunk", "child", "grandchild"))
    monkeypatch.setattr(DenoiserStage, "terms", broken)
    overrides = ["guards.non_finite=skip", "evaluation.every=0"]
    assert run(shards, trunk, *overrides) == 0
    assert run(shards, child, *overrides, f"fork={trunk}@4", steps=6) == 0
    assert run(shards, child, *overrides, f"fork={trunk}@4") == 0  # resumed: inherited counts once, not twice
    assert run(shards, grandchild, *overrides, f"fork={child}@6") == 0
    assert rows(trunk)[8]["guards/discarded"] == 1 and rows(trunk)[8]["data/bad"] > 0
    assert rows(child) == since(trunk, 4) and rows(grandchild) == since(trunk, 6)
    assert storage.read_manifest(storage.checkpoint_path(child, 8))["guards"]["excluded"]


def test_a_fork_goes_back_to_where_it_began_while_it_has_no_checkpoint(
    shards: Path, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, calls = DenoiserStage.terms, []

    def broken(self: Any, tensors: Any) -> Any:
        calls.append(1)
        values = terms(self, tensors)
        return {**values, "loss": values["loss"] * float("nan")} if len(calls) == 2 else values

    monkeypatch.setattr(DenoiserStage, "terms", broken)
    overrides = ["guards.non_finite=rewind", "evaluation.every=0", "checkpoint.every=0"]
    assert run(shards, tmp_path / "fork", *overrides, f"fork={trunk}@4") == 0
    assert list(rows(tmp_path / "fork")) == [5, 6, 7, 8]
    (record,) = [json.loads(line) for line in (tmp_path / "fork" / "quarantine.jsonl").read_text().splitlines()]
    assert record["to"] == 4 and len(calls) == 6


def test_a_fork_of_the_latest_starts_where_it_did_before_and_then_goes_on_by_itself(
    shards: Path,
    trunk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    shutil.copytree(trunk, parent)
    for step in (6, 8):
        shutil.rmtree(storage.checkpoint_path(parent, step))
    storage.write_latest(parent, storage.checkpoint_path(parent, 4))
    assert run(shards, child, f"fork={parent}", steps=6) == 0
    shutil.rmtree(child / "checkpoints")  # as if killed before its first one
    (child / "latest").unlink()
    assert run(shards, parent) == 0
    monkeypatch.chdir(tmp_path)
    assert run(shards, child, "fork=parent", steps=6) == 0  # named in another way
    assert list(rows(child)) == [5, 6] and ancestors(child, 6)[0]["step"] == 4
    assert run(shards, child, f"fork={parent}") == 0
    assert rows(child)[8] == rows(trunk)[8] and different_shards(child, trunk, STEPS) == ([], 1)
    assert run(shards, child, f"fork={parent}@6", steps=9) == 2
    assert "started from parent@4; change run_dir" in capsys.readouterr().err
    assert run(shards, trunk, f"fork={parent}@6", steps=9) == 2
    assert "a run that started anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fork={trunk}@5"], "fork: got {trunk}@5, but {trunk} keeps the steps 2, 4, 6, 8"),
        (["fork={trunk}/none@4"], "fork: got {trunk}/none@4, no whole checkpoint there"),
        (["fork={trunk}@four"], "no whole checkpoint there; needed RUN@STEP"),
        (["fork={trunk}@8"], "steps: got 8, but fork = {trunk}@8 has 8 already; raise steps"),
        (["fork={trunk}@4", "resume={trunk}"], "resume: got {trunk}, but fork = {trunk}@4 says where to start"),
        (["fork={trunk}@4", "model.width=128"], "model.width: is 128 now, but {trunk}/checkpoints/step-00000004"),
        # The tensors are the same, what they mean is not.
        (["fork={trunk}@4", "model.num_heads=2"], "model.num_heads: is 2 now"),
        (["fork={trunk}@4", "optim.kind=sgd"], "optim.kind"),
        (["fork={trunk}@4", "untrained_autoencoder.channels=[16,16]"], "autoencoder: autoencoder_hash is"),
        (["fork={trunk}@4", "objective.prediction.kind=x0"], "objective.prediction: is"),
    ],
)
def test_what_is_no_fork_of_this_model_is_refused(
    shards: Path,
    trunk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    if "optim.kind=sgd" in overrides:
        # AdamW's state is more than SGD needs: the other way round is refused.
        sgd = tmp_path / "sgd"
        assert run(shards, sgd, "optim.kind=sgd", steps=2) == 0
        overrides, message = [f"fork={sgd}@2"], "optim.kind: the checkpoint"
    given = [item.replace("{trunk}", str(trunk)) for item in overrides]
    assert run(shards, tmp_path / "fork", *given) == 2
    assert message.replace("{trunk}", str(trunk)) in capsys.readouterr().err
    assert not (tmp_path / "fork" / "checkpoints").exists() and not (tmp_path / "fork" / "lineage.json").exists()


def test_a_run_is_no_fork_of_itself_or_of_another_kind(trunk: Path) -> None:
    with pytest.raises(ConfigError, match="fork: got .*, which is run_dir itself"):
        fork.resolve_fork(f"{trunk}@4", f"{trunk}/")
    config = config_io.load(DenoiserRun, CONFIG)
    with pytest.raises(ConfigError, match="fork: A is a run of kind 'autoencoder', this one is of kind 'denoiser'"):
        fork.check_same_model({"kind": "autoencoder"}, config, "A")


def test_overrides_are_named_and_paths_of_the_run_itself_are_none() -> None:
    before = {"run_dir": "a/b", "fork": None, "data": {"shards": "a/b/toy", "x": [1]}, "optim": {"lr": 1.0}}
    now = {"run_dir": "c", "fork": "a/b@4", "data": {"shards": "c/toy", "x": [1, 2]}, "optim": {"lr": 2.0, "eps": 0.1}}
    assert fork.differences(before, now) == {"data.x": [[1], [1, 2]], "optim.lr": [1.0, 2.0], "optim.eps": [None, 0.1]}
    now["data"] = {"shards": "a/b/toy", "x": [1]}
    assert fork.differences(before, now)["data.shards"] == ["RUN_DIR/toy", "a/b/toy"]


def test_cool_downs_from_one_trunk(shards: Path, tmp_path: Path) -> None:
    trunk, short, long = (tmp_path / name for name in ("trunk", "short", "long"))
    plain = ["optim.warmup_steps=2", "optim.lr=1e-3"]
    assert run(shards, trunk, *plain, steps=6) == 0
    assert [row["optim/lr"] for row in rows(trunk).values()] == pytest.approx([5e-4, *[1e-3] * 5])
    for run_dir, start, count in ((short, 2, 3), (long, 4, 5)):
        overrides = [f"fork={trunk}@{start}", f"optim.cooldown_from={start}", *plain]
        assert run(shards, run_dir, *overrides, config=COOLDOWN, steps=start + count) == 0
        expected = [1e-3 * (count - n) / count for n in range(count)]
        assert [row["optim/lr"] for row in rows(run_dir).values()] == pytest.approx(expected)
        assert list(rows(run_dir)) == list(range(start + 1, start + count + 1))
    (entry,) = ancestors(short, 5)
    assert entry["overrides"]["optim.schedule"] == ["constant", "wsd"]
    assert entry["overrides"]["optim.cooldown_from"] == [None, 2] and entry["overrides"]["steps"] == [6, 5]


class FakeWandbRun:
    """A W&B run that notes how it was begun and what it got."""

    made: ClassVar[list[FakeWandbRun]] = []

    def __init__(self, run_dir: Path, *, run_config: Any, run_id: str | None, **rest: Any) -> None:
        self.id = run_id or f"id{len(self.made)}"
        self.given, self.config = run_id, run_config
        self.steps: list[int] = []
        self.made.append(self)

    def log(self, step: int, values: Any) -> None:
        self.steps.append(step)

    def finish(self) -> None:
        """Do nothing."""


def test_a_fork_is_a_wandb_run_of_its_own_that_names_its_parent(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeWandbRun.made.clear()
    monkeypatch.setattr(tracking, "WandbRun", FakeWandbRun)
    monkeypatch.setattr(tracking, "resolve_mode", lambda wanted: "offline")
    plain = ["evaluation.every=0"]
    assert run(shards, tmp_path / "a", *plain, steps=4) == 0
    assert run(shards, tmp_path / "b", *plain, f"fork={tmp_path / 'a'}@2", steps=4) == 0
    assert run(shards, tmp_path / "b", *plain, f"fork={tmp_path / 'a'}@2", steps=5) == 0
    first, second, third = FakeWandbRun.made
    assert (first.given, second.given, third.given) == (None, None, second.id) and second.id != first.id
    assert (first.steps, second.steps, third.steps) == ([1, 2, 3, 4], [3, 4], [5])
    assert first.config["ancestors"] == []
    for later in (second, third):
        assert [(entry["wandb_id"], entry["step"]) for entry in later.config["ancestors"]] == [(first.id, 2)]


def test_report_card_and_exported_folder_name_the_ancestors(shards: Path, trunk: Path, tmp_path: Path) -> None:
    middle, child, folder = tmp_path / "middle", tmp_path / "child", tmp_path / "folder"
    assert run(shards, middle, f"fork={trunk}@4", "optim.lr=2e-4", steps=6) == 0
    assert run(shards, child, f"fork={middle}@6", "optim.lr=2e-4", "ema.decays=[0.9]", steps=8) == 0
    state, second = (storage.fingerprint(storage.checkpoint_path(*at))[:12] for at in ((trunk, 4), (middle, 6)))
    expected = f"| Forked from | {trunk}@4 (state {state}; changed: optim.lr: 0.001 to 0.0002; steps: 8 to 6) -> "
    expected += f"{middle}@6 (state {second}; changed: ema.decays: [0.95] to [0.9]; steps: 6 to 8) |"
    assert convert_checkpoint.main([str(child), str(folder), "--to", "safetensors"]) == 0
    config = config_io.load(DenoiserRun, CONFIG)
    for source in (child, folder):
        said = convert_checkpoint._card(source, convert_checkpoint._configuration(source), "ema")
        write_card(tmp_path / "card.md", "dit", config.model, ParametrizationConfig(), said)
        assert expected in (tmp_path / "card.md").read_text().splitlines()
    said = convert_checkpoint._card(trunk, convert_checkpoint._configuration(trunk), "ema")
    assert "Forked from" not in said
    assert report.main([str(child), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    lineage = page[page.index('<section id="lineage">') : page.index('<section id="configuration">')]
    first, last = lineage.split("<tr>")[2:]
    assert f"{trunk}</td>" in first and state in first and "<code>optim.lr</code>: 0.001 → 0.0002" in first
    assert f"{middle}</td>" in last and second in last and "<code>ema.decays</code>: [0.95] → [0.9]" in last
    assert "optim.lr" not in last


def test_a_wandb_sweep_starts_runs_with_overrides(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    given = {"optim.lr": {"value": 0.002}, "ema.warmup": {"value": False}, "optim.betas": {"value": [0.8, 0.9]}}
    arguments = sweeps.create_sweep_command_args({"args": given})
    monkeypatch.setenv("WANDB_RUN_ID", "trial1")
    pytest.importorskip("wandb").teardown()  # what an earlier test of this process began keeps its environment
    for form in ("args", "args_no_hyphens"):
        # The interpolation is the configuration's: the agent leaves it alone.
        base = ["configs/debug/denoiser.yaml", f"run_dir={tmp_path}/{form}-${{oc.env:WANDB_RUN_ID}}"]
        command = [CONFIG, *sweeps.create_sweep_command(base)[1:]]
        common = [f"data.shards={shards}", "steps=1", "evaluation.every=0", "parallel.engine=torch"]
        common += ["tracking.wandb=offline"] if form == "args" else []
        assert train.main([*command, *common, *arguments[form]]) == 0
        config = config_io.load(DenoiserRun, tmp_path / f"{form}-trial1" / "config.yaml")
        assert (config.optim.lr, config.ema.warmup, config.optim.betas) == (0.002, False, (0.8, 0.9))
    manifest = storage.read_manifest(storage.checkpoint_path(tmp_path / "args-trial1", 1))
    assert manifest["tracker"]["wandb_id"] == "trial1", "the run is the agent's"


def test_histograms_count_every_weight_and_change_nothing(shards: Path, trunk: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run(shards, run_dir, "tracking.histograms_every=4") == 0
    assert rows(run_dir) == rows(trunk) and different_shards(run_dir, trunk, STEPS) == ([], 1)
    found = [json.loads(line) for line in (run_dir / "histograms.jsonl").read_text().splitlines()]
    names = [f"histogram/{kind}/{group}" for kind in ("master", "exp_avg") for group in ("decay", "no_decay")]
    assert [(row["step"], row["name"]) for row in found] == [(step, name) for step in (4, 8) for name in names]
    reader = storage.Reader(storage.checkpoint_path(run_dir, 8))
    for kind in ("master", "exp_avg"):
        values = torch.cat([value.flatten() for value in reader.read_full(kind).values()]).double().numpy()
        counts: dict[float, int] = {}
        for row in found:
            if row["step"] == 8 and row["name"].startswith(f"histogram/{kind}/"):
                for edge, count in zip(row["edges"], row["counts"], strict=False):
                    counts[edge] = counts.get(edge, 0) + count
        edges = np.array(bin_edges())
        expected = dict(zip(edges.tolist(), np.histogram(values, edges)[0].tolist(), strict=False))
        assert {edge: count for edge, count in counts.items() if count} == {e: c for e, c in expected.items() if c}
        assert sum(counts.values()) == len(values)
