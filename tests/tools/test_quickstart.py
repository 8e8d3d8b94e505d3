"""The quickstart's commands: every path under its root, reuse by age, and the proof's limits."""

from __future__ import annotations

import os
from pathlib import Path

from tools import quickstart
from tools.proofs import quickstart as proof

ROOT = Path(__file__).resolve().parents[2]


def test_every_script_and_config_of_the_commands_exists() -> None:
    for step in quickstart.steps(Path(quickstart.DEFAULT_ROOT)):
        files = [part for part in step.command[1:] if part.endswith((".py", ".yaml", ".txt")) and "runs/" not in part]
        assert files and all((ROOT / file).is_file() for file in files), step


def test_another_root_moves_everything(tmp_path: Path) -> None:
    for step in quickstart.steps(tmp_path):
        assert str(tmp_path) in " ".join(step.command)
        assert quickstart.DEFAULT_ROOT not in " ".join(step.command)


def test_a_step_is_done_when_its_outputs_are_newer_than_its_inputs(tmp_path: Path) -> None:
    given, made = tmp_path / "in", tmp_path / "out"
    step = quickstart.Step("x", ("true",), outputs=(made,), inputs=(given,))
    given.write_text("")
    assert not step.is_done()
    made.write_text("")
    os.utime(given, (1, 1))
    assert step.is_done()
    os.utime(made, (0, 0))
    assert not step.is_done()
    assert not quickstart.Step("y", ("true",)).is_done(), "a step without outputs decides itself"


def test_processes_share_the_cores() -> None:
    names = {step.name: quickstart.environment(step) for step in quickstart.steps(Path("x"))}
    assert "OMP_NUM_THREADS" in names["train the denoiser on two processes"]
    assert "OMP_NUM_THREADS" not in names["train the autoencoder"]


def test_misses_are_named() -> None:
    results = [
        {"name": "psnr", "value": 25.0, "floor": None},
        {"name": "clip_retrieval_top1_pixels", "value": 0.5, "floor": 1 / 16},
    ]
    assert proof.misses({"a": 500.0}, results, [1.9, 0.6]) == []
    results[0]["value"], results[1]["value"] = 23.9, 0.3
    found = proof.misses({"a": 500.0, "b": 500.0}, results, [0.6, 0.7])
    assert [line.split(" ")[0] for line in found] == ["wall", "held-out", "caption", "held-out"]
