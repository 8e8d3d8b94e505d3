"""One row per step after any resume, JSON that other programs read, and W&B that never stops a run."""

from __future__ import annotations

import io
import json
import logging
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ltd import __version__
from ltd.config import ConfigError
from ltd.tracking import Journal, Tracker, TrackingConfig, read_journal
from ltd.tracking import code_version as code
from ltd.tracking.code_version import code_version
from ltd.tracking.histogram import Histogram
from ltd.tracking.wandb_run import has_key, resolve_mode
from tests.tracking.made_runs import write_ramp


def tracker(run_dir: Path, *, wandb: str = "disabled", is_main: bool = True, **arguments: Any) -> Tracker:
    config = TrackingConfig(wandb=wandb, tags=("test",))  # type: ignore[arg-type]
    return Tracker(run_dir, config, is_main=is_main, run_config={"optim": {"lr": 0.1}}, **arguments)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_rows_reach_the_file_at_once(tmp_path: Path) -> None:
    track = tracker(tmp_path)
    track.log(0, {"loss/denoise": 1.5})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0, "loss/denoise": 1.5, "data/bad": 0}]


def test_resume_keeps_exactly_one_row_per_step(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    for step in range(8):
        first.quarantine(step, [{"key": f"k{step}", "cause": "truncated", "message": "m"}])
        first.log(step, {"loss": float(step)})
    # Killed in the middle of a row, after a checkpoint that goes on at step 5.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    second = tracker(tmp_path, start_step=5, state=first.state())
    for step in range(5, 10):
        second.log(step, {"loss": float(step)})
    second.finish()
    found = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(10))
    assert [row["loss"] for row in found] == [float(step) for step in range(10)]
    assert [row["key"] for row in rows(tmp_path / "quarantine.jsonl")] == [f"k{step}" for step in range(5)]
    assert found[9]["data/bad"] == found[9]["data/bad/truncated"] == 5, "counts go on from the rows that were kept"
    assert not list(tmp_path.glob("*.incomplete"))


def test_reopening_where_nothing_is_dropped_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0,   "by": "hand"}\n')
    before = path.stat().st_ino
    Journal(path, start_step=1).close()
    assert path.read_text() == '{"step": 0,   "by": "hand"}\n'
    assert path.stat().st_ino == before


def test_a_step_has_one_row(tmp_path: Path) -> None:
    track = tracker(tmp_path, start_step=3)
    with pytest.raises(ValueError, match="step 2 was logged after step 2"):
        track.log(2, {"loss": 1.0})
    track.log(3, {"loss": 1.0})
    with pytest.raises(ValueError, match="step 3 was logged after step 3"):
        track.log(3, {"loss": 1.0})


def test_numbers_that_json_lacks_are_strings_that_float_reads(tmp_path: Path) -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(math.nan), "e": np.float32(0.5)}
    tracker(tmp_path).log(0, {**values, "f": np.float64("inf"), "g": torch.tensor(3), "h": True, "i": "0" * 64})
    row = rows(tmp_path / "metrics.jsonl")[0]
    assert [row[name] for name in "abcdefghi"] == ["nan", "inf", "-inf", "nan", 0.5, "inf", 3, True, "0" * 64]
    assert math.isnan(float(row["a"]))
    assert float(row["c"]) == -math.inf


def test_what_is_no_plain_value_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    track = tracker(tmp_path)
    with pytest.raises(TypeError, match="cannot write object as JSON"):
        track.log(0, {"loss": 1.0, "bad": object()})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_broken_line_inside_a_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"loss": 1}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: needs a JSON object with a 'step'"):
        tracker(tmp_path, start_step=1)
    assert list(read_journal(tmp_path / "missing.jsonl")) == []


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    track = tracker(tmp_path / "run", is_main=False, wandb="offline")
    track.log(0, {"loss": 1.0})
    track.quarantine(0, [{"cause": "x"}])
    track.log_media(0, "samples", [(tmp_path / "a.png", "a")])
    track.finish()
    assert not (tmp_path / "run").exists()
    assert track.state() == {"wandb_id": None}


def test_media_are_noted_relative_to_the_run(tmp_path: Path) -> None:
    tracker(tmp_path / "run").log_media(4, "samples/video", [(tmp_path / "run/samples/a.mp4", "a cat")])
    assert rows(tmp_path / "run/media.jsonl") == [
        {"step": 4, "name": "samples/video", "path": "samples/a.mp4", "caption": "a cat"}
    ]


class FakeRun:
    """What this package uses of a W&B run; ``step`` is where an online run stands."""

    def __init__(self, fail_on: str | None, step: int) -> None:
        self.id, self.step, self.fail_on = "fakeid", step, fail_on
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, row: dict[str, Any], step: int) -> None:
        if self.fail_on == "log":
            raise RuntimeError("service gone")
        self.rows.append((step, row))

    def finish(self) -> None:
        if self.fail_on == "finish":
            raise RuntimeError("service gone")


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A module in wandb's place that records what it is asked."""
    fake = types.SimpleNamespace(inits=[], run=None, fail_on=None, step=0, __spec__=sys.modules[__name__].__spec__)

    def init(**arguments: Any) -> FakeRun:
        fake.inits.append(arguments)
        if fake.fail_on == "init":
            raise OSError("no route")
        fake.run = FakeRun(fake.fail_on, fake.step)
        return fake.run

    fake.init = init
    fake.Settings = dict
    fake.Video = lambda path, caption, format: ("video", path, caption, format)
    fake.Image = lambda path, caption: ("image", path, caption)
    fake.Histogram = lambda np_histogram: ("histogram", *np_histogram)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_wandb_failing_is_one_warning_and_no_lost_row(
    where: str, fake_wandb: types.SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb.fail_on = where
    with caplog.at_level(logging.WARNING):
        track = tracker(tmp_path, wandb="online")
        for step in range(3):
            track.log(step, {"loss": 1.0})
        track.finish()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert len(caplog.records) == 1
    assert "metrics go to metrics.jsonl only" in caplog.text


def test_wandb_gets_numbers_media_and_only_steps_it_has_not_seen(
    fake_wandb: types.SimpleNamespace, tmp_path: Path
) -> None:
    fake_wandb.step = 4
    track = tracker(tmp_path, wandb="online", start_step=3, state={"wandb_id": "old"})
    assert fake_wandb.inits[0]["id"] == "old"
    assert fake_wandb.inits[0]["resume"] == "allow"
    assert fake_wandb.inits[0]["config"] == {"optim": {"lr": 0.1}, "code_version": code_version()}
    track.log(3, {"loss": 1.0})
    track.log(4, {"loss": math.nan})
    track.log_media(4, "samples", [(tmp_path / "a.mp4", "cat"), (tmp_path / "b.png", "dog")])
    assert [step for step, _ in fake_wandb.run.rows] == [4, 4]
    assert math.isnan(fake_wandb.run.rows[0][1]["loss"]), "W&B takes NaN as a number"
    video, image = fake_wandb.run.rows[1][1]["samples"]
    assert video == ("video", str(tmp_path / "a.mp4"), "cat", "mp4")
    assert image == ("image", str(tmp_path / "b.png"), "dog")


def test_auto_is_online_with_a_key_and_offline_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_key()
    assert resolve_mode("auto") == "offline"
    assert resolve_mode("disabled") is None
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert resolve_mode("auto") == "online"
    assert resolve_mode("offline") == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert resolve_mode("auto") == "online"


def test_missing_wandb_is_a_clear_error_only_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_mode("disabled") is None
    assert not caplog.records
    assert resolve_mode("auto") is None
    assert "ltd[train]" in caplog.text
    with pytest.raises(ConfigError, match=r"tracking\.wandb: 'online' needs the package wandb.*ltd\[train\]"):
        tracker(tmp_path, wandb="online")


def test_histograms_are_rows_of_their_own_and_reach_wandb_without_empty_ends(
    fake_wandb: types.SimpleNamespace, tmp_path: Path
) -> None:
    config = TrackingConfig(wandb="online", histograms_every=2)
    track = Tracker(tmp_path, config, is_main=True, run_config={})
    track.log(2, {"loss": 1.0})
    track.log_histograms(2, {"histogram/a": Histogram([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0], [0, 4, 0, 1, 0])})
    track.finish()
    row = {"step": 2, "name": "histogram/a", "edges": [-1.0, 0.0, 1.0, 2.0], "counts": [4, 0, 1]}
    assert rows(tmp_path / "histograms.jsonl") == [row]
    assert fake_wandb.run.rows[-1] == (2, {"step": 2, "histogram/a": ("histogram", row["counts"], row["edges"])})
    assert Histogram([0.0, 1.0, 2.0], [0, 0]).trimmed() == Histogram([0.0, 1.0], [0])
    with pytest.raises(ValueError, match="got 2 for 2 counts"):
        Histogram([0.0, 1.0], [1, 1])
    # A run that goes on before them drops them, also where it makes none any more.
    Tracker(tmp_path, TrackingConfig(), is_main=True, run_config={}, start_step=2).finish()
    assert rows(tmp_path / "histograms.jsonl") == []


def test_code_is_named_by_its_commit_or_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = code.find_commit()
    assert code_version() == (f"ltd {__version__}" if commit is None else f"commit {commit}")
    monkeypatch.setenv("PATH", "")
    assert code.find_commit() is None
    assert code_version() == f"ltd {__version__}"


def test_code_below_the_repository_of_another_project_has_not_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    file = tmp_path / "site-packages" / "code_version.py"
    file.parent.mkdir()
    file.touch()
    (tmp_path / "own.py").touch()
    git("init", "-q")
    git("add", "own.py")
    git("commit", "-q", "-m", "theirs")
    monkeypatch.setattr(code, "__file__", str(file))
    assert code_version() == f"ltd {__version__}"
    git("add", ".")
    git("commit", "-q", "-m", "the code too")
    assert code_version() == f"commit {git('rev-parse', 'HEAD')[:12]}"


def test_missing_tensorboard_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking\.tensorboard: true needs the package.*ltd\[tensorboard\]"):
        Tracker(tmp_path, TrackingConfig(tensorboard=True), is_main=True, run_config={})
    Tracker(tmp_path, TrackingConfig(tensorboard=True), is_main=False, run_config={})  # writes nothing, needs nothing
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_has_the_rows_of_the_journal_once_after_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrackingConfig(tensorboard=True, histograms_every=1)
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    write_ramp(tmp_path / "a.mp4", 9)
    for first, last in ((1, 6), (4, 8)):
        track = Tracker(tmp_path, config, is_main=True, run_config={"optim": {"lr": 0.1}}, start_step=first)
        for step in range(first, last + 1):
            track.log(step, {"loss/denoise": 10.0 * first + step, "data/keys_hash": "ab", "bad": math.inf})
            track.log_histograms(step, {"histogram/w": Histogram([-1.0, 0.0, 2.0], [3, step])})
            track.log_media(step, "samples/grid", [(tmp_path / "a.png", "red")])
            track.log_media(step, "samples/video", [(tmp_path / "a.mp4", "grows brighter"), (tmp_path / "a.png", "x")])
        track.finish()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    journal = {row["step"]: row["loss/denoise"] for row in rows(tmp_path / "metrics.jsonl")}
    assert {event.step: event.value for event in found.Scalars("loss/denoise")} == journal
    assert [event.step for event in found.Scalars("loss/denoise")] == list(range(1, 9))
    assert set(found.Tags()["scalars"]) == {"loss/denoise", "bad", "data/bad"}
    assert {event.value for event in found.Scalars("bad")} == {math.inf}
    assert [(event.step, event.width, event.height) for event in found.Images("samples/grid")][-1] == (8, 6, 4)
    event = found.Images("samples/video/0")[-1]
    moving = Image.open(io.BytesIO(event.encoded_image_string))
    assert (event.step, moving.format, moving.n_frames, moving.size, moving.info["duration"]) == (
        8,
        "GIF",
        9,
        (48, 32),
        120,
    )  # type: ignore[attr-defined]
    stills = []
    for number in range(9):
        moving.seek(number)
        stills.append(float(np.asarray(moving.convert("L")).mean()))
    assert stills == pytest.approx([10.0 * number for number in range(9)], abs=4), "the frames, in order"
    assert [event.step for event in found.Images("samples/video/1")][-1] == 8
    text = found.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert json.loads(text) == {"optim": {"lr": 0.1}, "code_version": code_version()}
    last = found.Histograms("histogram/w")[-1]
    assert (last.step, last.histogram_value.num, list(last.histogram_value.bucket_limit)) == (8, 11, [0.0, 2.0])


def test_tensorboard_failing_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ltd.tracking.tracker.check_tensorboard", lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace())
    track = Tracker(tmp_path, TrackingConfig(tensorboard=True), is_main=True, run_config={})
    for step in (1, 2):
        track.log(step, {"loss": 1.0})
    track.finish()
    assert len(rows(tmp_path / "metrics.jsonl")) == 2
    assert len(caplog.records) == 1 and "tensorboard failed to start" in caplog.text


def test_a_fork_counts_on_from_the_bad_samples_before_it(tmp_path: Path) -> None:
    trunk = tracker(tmp_path / "trunk")
    trunk.quarantine(1, [{"cause": "truncated"}])
    child = tracker(tmp_path / "child", start_step=2, state={"inherited_bad": trunk.state()["bad"]})
    child.quarantine(2, [{"cause": "truncated"}, {"cause": "decode"}])
    again = tracker(tmp_path / "child", start_step=3, state=child.state())
    again.log(3, {})
    row = rows(tmp_path / "child" / "metrics.jsonl")[-1]
    assert (row["data/bad"], row["data/bad/truncated"], row["data/bad/decode"]) == (3, 2, 1)
    assert again.state()["bad"] == {"truncated": 2, "decode": 1}
