"""The real wandb, offline: what its file holds, read back record by record; and what a sweep's agent starts."""

from __future__ import annotations

import json
import math
import re
import struct
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ltd import config as config_io
from ltd.config import ConfigError
from ltd.tracking import Tracker, TrackingConfig
from ltd.tracking.code_version import code_version
from ltd.tracking.histogram import Histogram
from ltd.tracking.sweep import check_sweep
from ltd.training.denoiser import DenoiserRun
from tests.tracking.made_runs import write_ramp

wandb = pytest.importorskip("wandb")
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = TrackingConfig(
    wandb="offline",
    project="moving",
    entity="team",
    group="trunk and cool-downs",
    job_type="cooldown",
    name="second",
    tags=("a", "b"),
    notes="what for",
    histograms_every=1,
)
CONFIG = {"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "steps": 4}


def make(run_dir: Path, **arguments: Any) -> Tracker:
    return Tracker(run_dir, SETTINGS, is_main=True, run_config=CONFIG, **arguments)


def wandb_records(path: Path) -> Iterator[Any]:
    """Read the records of a ``.wandb`` file (LevelDB's log format: 32 KiB blocks, pieces of crc, length, type)."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            record = b""
            yield message


def read_files(run_dir: Path, run_id: str) -> list[list[Any]]:
    """Records of each file of a run, oldest file first; W&B's own process may still be writing the last one."""
    end = time.monotonic() + 20
    while True:
        paths = sorted((run_dir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
        found = [list(wandb_records(path)) for path in paths]
        if all(any(record.HasField("exit") for record in records) for records in found) or time.monotonic() > end:
            return found
        time.sleep(0.1)


def history(records: list[Any]) -> dict[int, dict[str, Any]]:
    """Rows by W&B's own step, each with its ``step`` beside the metrics."""
    rows: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                inner = row
                for name in outer:
                    inner = inner.setdefault(name, {})
                inner[last] = json.loads(item.value_json)
            assert row["_step"] not in rows, "one row for each step"
            rows[row["_step"]] = row
    return rows


def written(run_dir: Path, *parts: tuple[int, int]) -> list[list[Any]]:
    """Log parts of a run, (first step, last step) each, each begun with the state that the one before left."""
    state = None
    for number, (first, last) in enumerate(parts):
        if number:
            time.sleep(1.1)  # W&B names its folder by the second; a resume within one is not what is tested
        track = make(run_dir, start_step=first, state=state)
        for step in range(first, last + 1):
            track.log(step, {"loss/denoise": 10.0 * number + step, "bad": math.nan})
        state = track.state()
        track.finish()
    assert state is not None
    return read_files(run_dir, state["wandb_id"])


def test_id_and_steps_are_kept_over_a_resume_and_a_resume_from_an_earlier_step(tmp_path: Path) -> None:
    first, second, third = written(tmp_path, (1, 4), (5, 6), (3, 7))
    found = [history(records) for records in (first, second, third)]
    assert [sorted(rows) for rows in found] == [[1, 2, 3, 4], [5, 6], [3, 4, 5, 6, 7]]
    for number, rows in enumerate(found):
        for step, row in rows.items():
            assert row["step"] == step and row["loss/denoise"] == 10.0 * number + step
            assert math.isnan(float(row["bad"]))
    ids = {record.run.run_id for records in (first, second, third) for record in records if record.HasField("run")}
    assert len(ids) == 1


def test_file_says_what_the_run_is(tmp_path: Path) -> None:
    (records,) = written(tmp_path, (1, 2))
    runs = [record.run for record in records if record.HasField("run")]
    first = runs[0]
    assert (first.project, first.entity, first.display_name) == ("moving", "team", "second")
    assert (first.run_group, first.job_type) == ("trunk and cool-downs", "cooldown")
    assert (sorted(first.tags), first.notes) == (["a", "b"], "what for")
    config = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    expected = {**CONFIG, "code_version": code_version()}
    assert {name: config[name] for name in expected} == expected
    metrics = [record.metric for record in records if record.HasField("metric")]
    assert [(metric.glob_name, metric.step_metric) for metric in metrics if metric.glob_name] == [("*", "step")]
    assert any(record.HasField("exit") for record in records), "it ended in order"


def test_videos_pictures_and_histograms_are_in_the_run(tmp_path: Path) -> None:
    write_ramp(tmp_path / "a.mp4", 9)
    Image.new("RGB", (6, 4), "red").save(tmp_path / "grid.png")
    track = make(tmp_path)
    for step in (1, 2):
        track.log(step, {"loss": 1.0})
        track.log_media(step, "samples", [(tmp_path / "a.mp4", "a <cat>"), (tmp_path / "a.mp4", "a dog")])
        track.log_media(step, "samples_grid", [(tmp_path / "grid.png", "grid")])
        track.log_histograms(step, {"histogram/w": Histogram([-1.0, 0.0, 2.0], [3, step])})
    track.finish()
    run_id = str(track.state()["wandb_id"])
    (records,) = read_files(tmp_path, run_id)
    row = history(records)[2]
    assert row["loss"] == 1.0
    assert row["histogram/w"] == {"_type": "histogram", "values": [3, 2], "bins": [-1.0, 0.0, 2.0]}
    files = next((tmp_path / "wandb").glob("offline-run-*")) / "files"
    samples = row["samples"]
    assert (samples["_type"], samples["count"], samples["captions"]) == ("videos", 2, ["a <cat>", "a dog"])
    for entry in samples["videos"]:
        assert (files / entry["path"]).read_bytes() == (tmp_path / "a.mp4").read_bytes()
    grid = row["samples_grid"]
    assert (grid["_type"], grid["width"], grid["height"], grid["captions"]) == ("images/separated", 6, 4, ["grid"])
    with Image.open(files / grid["filenames"][0]) as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def documented_sweep() -> dict[str, Any]:
    """The sweep of docs/tracking.md."""
    (text,) = re.findall(r"```yaml\n(program: .*?)```", (ROOT / "docs" / "tracking.md").read_text(), re.S)
    return dict(yaml.safe_load(text))


@pytest.mark.parametrize("macro", ["${args}", "${args_no_hyphens}"])
def test_the_agent_starts_the_documented_sweep_with_its_parameters(
    macro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's own agent makes the command; only the start of the process is caught."""
    agents = pytest.importorskip("wandb.wandb_agent")
    started: dict[str, Any] = {}
    monkeypatch.setattr(agents, "AgentProcess", lambda **given: started.update(given) or types.SimpleNamespace())
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "wandb" / "sweep-sweep1").mkdir(parents=True)
    sweep = documented_sweep()
    agent = agents.Agent.__new__(agents.Agent)
    command = [macro if part == "${args}" else part for part in sweep["command"]]
    vars(agent).update(_in_jupyter=False, _sweep_command=command, _function=None, _forward_signals=False)
    agent._run_processes = {}
    trial = {"optim.lr": {"value": 0.002}, "ema.decays": {"value": [0.9]}, "tracking.tags": {"value": ["x"]}}
    assert {*trial} >= {*sweep["parameters"]}
    agent._command_run({"run_id": "trial7", "program": sweep["program"], "args": trial})
    line = started["command"]
    assert line[:3] == ["/usr/bin/env", "python", "train.py"]
    monkeypatch.chdir(ROOT)
    for name, value in started["env"].items():
        monkeypatch.setenv(name, value)
    arguments = [item.removeprefix("--") for item in line[3:]]
    run = config_io.load(DenoiserRun, arguments[0], arguments[1:])
    assert (run.run_dir, run.tracking.wandb, run.tracking.tags) == ("runs/sweep/trial7", "online", ("x",))
    assert (run.optim.lr, run.ema.decays) == (0.002, (0.9,))
    check_sweep(config_io.to_dict(run))
    # A command without the macro would run with the file's values under the agent's name.
    lost = config_io.load(DenoiserRun, arguments[0], [item for item in arguments[1:] if "optim.lr" not in item])
    with pytest.raises(
        ConfigError, match=r"optim\.lr: is 0\.001, but the W&B sweep sets it to 0\.002; put \${args} or"
    ):
        check_sweep(config_io.to_dict(lost))


def test_fields_of_other_programs_and_runs_without_an_agent_are_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_SWEEP_PARAM_PATH", raising=False)
    check_sweep({"optim": {"lr": 1.0}})
    asked = {"wandb_version": 1, "evaluate.n": {"value": 3}, "optim.lr": {"value": 1}}
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(asked))
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "asked.yaml"))
    check_sweep({"optim": {"lr": 1.0}})
    with pytest.raises(ConfigError, match="optim.lr: is 2.0"):
        check_sweep({"optim": {"lr": 2.0}})
