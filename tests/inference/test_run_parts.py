"""What is read of a run: the fields of its last step, and one checkpoint for as long as a job runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sample
from ltd import config, storage
from ltd.config import ConfigError
from ltd.diffusion import ShiftConfig
from ltd.inference.run_parts import find_weights, read_run_parts
from ltd.shapes import VideoShape
from ltd.training.denoiser import DenoiserRun

ROOT = Path(__file__).resolve().parents[2]
STAGES = """stages=[
  {from_step: 3, set: {objective: {shift: {factor: 3.0}}, data: {views: [{num_frames: 17, height: 64, width: 96}]}}},
  {from_step: 6, set: {objective: {shift: {factor: 5.0}}}}]"""


def write(run_dir: Path, step: int, *overrides: str, name: str = "denoiser") -> Path:
    """Write the manifest of a checkpoint, which is all that is read here."""
    given = [f"run_dir={run_dir}", "steps=9", f"autoencoder={run_dir}/ae", "untrained_autoencoder=null", *overrides]
    run = config.load(DenoiserRun, ROOT / "configs" / "debug" / f"{name}.yaml", given)
    path = storage.checkpoint_path(run_dir, step)
    path.mkdir(parents=True)
    storage.write_manifest(path, {"step": step, "config": config.to_dict(run), "lineage": {}}, shard_names=[])
    return path


@pytest.mark.parametrize(("step", "factor"), [(2, 1.0), (3, 1.0), (4, 3.0), (6, 3.0), (7, 5.0), (9, 5.0)])
def test_a_run_with_stages_is_sampled_as_its_last_step_was_trained(tmp_path: Path, step: int, factor: float) -> None:
    """A checkpoint at a boundary belongs to the stage before: the one that begins there has trained nothing yet."""
    write(tmp_path, step, STAGES)
    first = ((VideoShape(9, 32, 32), None), (VideoShape(1, 32, 32), None))
    parts = read_run_parts(tmp_path)
    assert parts.shift == ShiftConfig(factor=factor)
    assert parts.views == (first if step <= 3 else ((VideoShape(17, 64, 96), None),))
    args = sample.parse([str(tmp_path), "--prompts", "p", "--out", "o"])
    assert sample.read_sampler(args).shift == ShiftConfig(factor=factor)


def test_a_run_of_packs_says_no_sizes(tmp_path: Path) -> None:
    write(tmp_path, 4, name="denoiser_packed")
    assert read_run_parts(tmp_path).views == ()
    (tmp_path / "prompts.txt").write_text("a red disc\n")
    words = [str(tmp_path), "--prompts", str(tmp_path / "prompts.txt"), "--out", "o"]
    with pytest.raises(ConfigError, match=r"--shapes: missing, .* \(data.batching.kind is packed\)"):
        sample.plan(sample.parse(words))
    assert [r.shape for r in sample.plan(sample.parse([*words, "--shapes", "1x64x32"]))] == [VideoShape(1, 64, 32)]


def test_a_job_stays_with_the_checkpoint_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on gives all processes the same weights, and those whose hash is in request.json."""
    early = write(tmp_path / "run", 2)
    (tmp_path / "prompts.txt").write_text("a red disc\n")
    read: list[dict[str, Any]] = []

    def going_on(run: Path, **options: Any) -> None:
        if not read:
            write(tmp_path / "run", 4)  # as if training had saved
        read.append({"run": run, "guide": options["guide"]})
        raise ConfigError("enough")

    monkeypatch.setattr(sample, "load_generator", going_on)
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    found, job, *_ = sample.read_job(sample.parse([str(tmp_path / "run"), *words]))
    assert found.run == early and job.identity["run"] == str(tmp_path / "run")
    assert job.identity["checkpoint"] == storage.fingerprint(early)
    with pytest.raises(SystemExit):
        sample.main([str(tmp_path / "run"), *words, "--guide", str(tmp_path / "run")])
    assert read == [{"run": early, "guide": early}]
    late = storage.checkpoint_path(tmp_path / "run", 4)
    assert find_weights(tmp_path / "run") == late and find_weights(early) == early
    assert sample.read_job(sample.parse([str(early), *words]))[0].run == early
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        find_weights(tmp_path)
