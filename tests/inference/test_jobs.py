"""Sampling jobs: the same files on any number of processes, after kills and failures; what a job says and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sample
from ltd.config import ConfigError
from ltd.data.decode import decode_image
from ltd.inference.generate import Request
from ltd.inference.jobs import SampleJob
from ltd.inference.sample_folder import SampleFolder
from ltd.shapes import VideoShape
from tests import launched
from tests.inference.jobs_worker import ARGUMENTS, PROMPTS, make_run

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"{number:04d}.{'mp4' if number < 4 else 'png'}" for number in range(8)]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which all the jobs of ``jobs_worker`` ran."""
    folder = tmp_path_factory.mktemp("jobs")
    launched.fork("tests.inference.jobs_worker", str(folder))
    return folder


def codes(worlds: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((worlds / "codes.json").read_text())["codes"]
    return found


def times(worlds: Path, name: str) -> dict[str, int]:
    """When the samples of a job were written that was started again."""
    found: dict[str, int] = json.loads((worlds / "codes.json").read_text())["times"][name]
    return found


def said(worlds: Path, name: str) -> list[str]:
    """What each process of a job wrote."""
    return [path.read_text() for path in sorted((worlds / "logs" / name).glob("log?"))]


def rows(folder: Path, name: str = "samples.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def same(left: Path, right: Path, names: list[str]) -> list[str]:
    return [name for name in names if (left / name).read_bytes() == (right / name).read_bytes()]


def stills(folder: Path, names: list[str]) -> list[np.ndarray]:
    return [decode_image((folder / name).read_bytes())[0].astype(int) for name in names]


@pytest.mark.dist
@pytest.mark.parametrize("name", ["two", "three"])
def test_files_are_the_same_on_any_number_of_processes(worlds: Path, name: str) -> None:
    assert set(codes(worlds)[name]) == {0}, said(worlds, name)
    names = [*NAMES, "samples.jsonl", "grid.png"]
    assert sorted(path.name for path in (worlds / name).iterdir()) == sorted([*names, "request.json"])
    assert same(worlds / "one", worlds / name, names) == names
    listed = rows(worlds / name)
    assert [row["file"] for row in listed] == NAMES and [row["prompt"] for row in listed] == 2 * list(PROMPTS)
    assert len({(worlds / name / file).read_bytes() for file in NAMES}) == 8, "no sample is another's"
    assert "8 of 8 samples in" in said(worlds, name)[0] and not any(said(worlds, name)[1:]), (
        "the main process alone speaks"
    )


@pytest.mark.dist
@pytest.mark.parametrize("name", ["pair", "pairs"])
def test_a_sequence_group_makes_what_one_process_makes(worlds: Path, name: str) -> None:
    assert set(codes(worlds)[name]) == {0}, said(worlds, name)
    assert rows(worlds / name) == rows(worlds / "one")
    for path in sorted((worlds / "one-seen").glob("*.pt")):
        one, shared = (torch.load(worlds / f"{w}-seen" / path.name, weights_only=True) for w in ("one", name))
        assert float((one - shared).abs().max() / one.std()) < 1e-5 and float(one.std()) > 0.05
    # 2x5x4 and 1x4x4 cells are 40 and 16 tokens, of which each member has half; five rows are two and three.
    alone = json.loads((worlds / "one-seen" / "seen0.json").read_text())
    assert set(alone["tokens"]) == {40, 16} and set(alone["rows"]) == {5, 4}
    for rank in range(4 if name == "pairs" else 2):
        seen = json.loads((worlds / f"{name}-seen" / f"seen{rank}.json").read_text())
        assert set(seen["tokens"]) == {20, 8} and set(seen["rows"]) == {2 + rank % 2, 2}
        # A pair of four processes makes every other batch: one of clips and one of stills, two steps each.
        assert len(seen["rows"]) == (2 if name == "pairs" else 4) and len(seen["tokens"]) == 2 * len(seen["rows"])


@pytest.mark.dist
def test_the_first_of_a_group_decodes_in_tiles(worlds: Path) -> None:
    assert codes(worlds)["tiled"] == [0] and codes(worlds)["tiled pair"] == [0, 0], said(worlds, "tiled pair")
    assert "decoded in 2 tiles" in said(worlds, "tiled pair")[0]
    for number in range(4):
        one, pair = (stills(worlds / name, [f"{number:04d}.png"])[0] for name in ("tiled", "tiled-pair"))
        assert one.shape == (64, 32, 3) and one.std() > 5 and np.abs(one - pair).max() <= 1


@pytest.mark.dist
def test_a_killed_job_ends_with_the_name_and_a_restart_makes_only_what_is_missing(worlds: Path) -> None:
    assert codes(worlds)["killed"] == [1, -9]
    assert "error: lost (dead, frozen or cut off): process 1 (host" in said(worlds, "killed")[0]
    before = times(worlds, "killed")
    assert sorted(before) == NAMES[:6], "the main process finished its share"
    assert codes(worlds)["killed again"] == [0, 0, 0]
    assert {name: (worlds / "killed" / name).stat().st_mtime_ns for name in before} == before
    names = [*NAMES, "samples.jsonl", "grid.png"]
    assert same(worlds / "one", worlds / "killed", names) == names
    assert not list((worlds / "killed").glob("*.incomplete"))


@pytest.mark.dist
def test_failed_samples_are_listed_the_rest_is_made_and_a_restart_retries(worlds: Path) -> None:
    assert codes(worlds)["failing"] == [1, 0]
    first = worlds / "failing-before"
    failed = rows(first, "failed.jsonl")
    text = "ValueError: text: 99 tokens, needed at most 48"
    assert [(row["number"], row["prompt"], row["num_frames"]) for row in failed] == [
        (1, "a blue square", 5),
        (5, "a blue square", 1),
        (6, "a green dot", 1),
    ]
    assert [row["error"] for row in failed][:2] == [text, text] and failed[2]["error"].startswith("not finite: lower")
    assert [row["number"] for row in failed] == [number for number in range(8) if not (first / NAMES[number]).exists()]
    assert [row["file"] for row in rows(first)] == [NAMES[number] for number in (0, 2, 3, 4, 7)]
    # What is not finite leaves its batch as it is; only samples of a batch that failed as a whole were made alone.
    assert same(worlds / "one", first, [NAMES[7]]) == [NAMES[7]]
    beside, alone = (stills(folder, [NAMES[4]])[0] for folder in (worlds / "one", first))
    assert np.abs(beside - alone).max() <= 1
    assert "3 of 8 samples failed" in said(worlds, "failing")[0]
    assert "sample 6 (a green dot) failed" in "".join(said(worlds, "failing"))
    assert codes(worlds)["failing again"] == [0, 0]
    assert not (worlds / "failing" / "failed.jsonl").exists() and rows(worlds / "failing") == rows(worlds / "one")
    mended = [NAMES[number] for number in (1, 5, 6, 7)]
    assert same(worlds / "one", worlds / "failing", mended) == mended
    seen = [json.loads((worlds / "failing-seen" / f"seen{rank}.json").read_text()) for rank in range(2)]
    batches = sorted(batch for found in seen for batch in found["batches"])
    assert batches == [[0, 1], [4, 5], [6, 7]], "a sample is made beside the same ones again"
    before = times(worlds, "failing")
    assert sorted(before) == [NAMES[number] for number in (0, 2, 3, 4, 7)]
    assert {name: (worlds / "failing" / name).stat().st_mtime_ns for name in before} == before, "kept"


@pytest.mark.dist
def test_a_group_gives_up_a_text_together(worlds: Path) -> None:
    assert codes(worlds)["one-sided"] == [1, 0], said(worlds, "one-sided")
    failed = [(row["number"], row["error"]) for row in rows(worlds / "one-sided", "failed.jsonl")]
    assert failed == [(1, "the text failed on another process of the sequence group")]
    assert [row["file"] for row in rows(worlds / "one-sided")] == ["0000.png", "0002.png", "0003.png"]


@pytest.mark.dist
def test_a_bug_or_too_little_memory_within_a_group_ends_all_with_its_name(worlds: Path) -> None:
    assert codes(worlds)["broken"] == [1, 1] and codes(worlds)["starved"] == [1, 1]
    assert "local rank 1" in (text := said(worlds, "broken")[0]) and "with KeyError: 'a bug'" in text
    assert "with OutOfMemoryError: CUDA out of memory" in said(worlds, "starved")[0]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", "error: --shapes: 8x32x32: num_frames must be 1 + k * 4"),
        ("host", "error: autoencoder: not on this host (on process 1)"),
        ("thin", "error: parallel.sequence: got 2, needed at most 1 for 1 latent rows"),
    ],
)
def test_a_mistake_that_concerns_all_ends_with_one_line_and_costs_nothing(
    worlds: Path, name: str, message: str
) -> None:
    assert codes(worlds)[name] == [2, 0]
    errors = [line for text in said(worlds, name) for line in text.splitlines() if "rror" in line]
    assert len(errors) == 1 and errors[0].startswith(message)
    assert not (worlds / name).exists()
    if name == "shape":  # it was tried in the folder of a finished job
        assert all((worlds / "two" / file).is_file() for file in NAMES)


@pytest.mark.dist
def test_a_world_that_groups_do_not_divide_is_refused(worlds: Path) -> None:
    assert codes(worlds)["odd"] == [2, 2, 2]
    assert "parallel.sequence: must divide the world size, got sequence 2 and world size 3" in said(worlds, "odd")[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


def call(run: Path, out: Path, *arguments: str) -> int:
    command = [str(run / "run"), "--prompts", str(run / "prompts.txt"), "--out", str(out), *ARGUMENTS]
    return sample.main([*command, "--shapes", "1x32x32", *arguments])


def test_files_that_no_job_wrote_are_not_touched(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0002.png").write_bytes(b"mine")
    with pytest.raises(SystemExit) as stop:
        call(run, tmp_path)
    assert stop.value.code == 2 and "holds 0002.png, which no job wrote" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["0002.png"]


def test_a_smaller_job_leaves_nothing_of_a_larger_one(run: Path, tmp_path: Path) -> None:
    assert call(run, tmp_path, "--per-prompt", "2") == 0
    (tmp_path / "samples.jsonl").unlink()  # as after a kill: the marker alone says how many there may be
    (tmp_path / "notes.txt").write_text("mine")
    assert call(run, tmp_path) == 0
    names = [*(f"{number:04d}.png" for number in range(4)), "grid.png", "notes.txt", "request.json", "samples.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_batches_of_other_sizes_give_the_same_to_rounding(run: Path, tmp_path: Path) -> None:
    names = [f"{number:04d}.png" for number in range(4)]
    made = []
    for size in ("1", "3", "16"):
        assert call(run, tmp_path / size, "--batch-size", size) == 0
        made.append(stills(tmp_path / size, names))
    for others in made[1:]:
        assert max(np.abs(a - b).max() for a, b in zip(made[0], others, strict=True)) <= 1


@pytest.mark.dist
def test_the_launcher_starts_sampling(run: Path, tmp_path: Path) -> None:
    """The documented command, on two processes, against one process without a launcher."""
    assert call(run, tmp_path / "one") == 0
    environment = {**os.environ, "PROGRAM": "sample.py", "PYTHON": sys.executable, "NPROC": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(ROOT / "launch" / "torchrun.sh"), str(run / "run"), "--prompts", str(run / "prompts.txt")]
    command += ["--out", str(tmp_path / "two"), *ARGUMENTS, "--shapes", "1x32x32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    assert same(tmp_path / "one", tmp_path / "two", names) == names


def test_each_of_several_processes_takes_its_own_device(run: Path) -> None:
    def pick(told: str, kind: str, world_size: int) -> object:
        layout: Any = SimpleNamespace(world_size=world_size, device=torch.device(kind, 1 if kind == "cuda" else None))
        command = [str(run / "run"), "--prompts", "p", "--out", "o", "--device", told]
        return sample.pick_device(sample.parse(command), layout)

    assert pick("cuda:3", "cuda", 1) == "cuda:3" and pick("cpu", "cuda", 2) == "cpu"
    assert pick("cuda", "cuda", 2) == torch.device("cuda", 1)
    for told, kind in (("cuda:3", "cuda"), ("cuda", "cpu")):
        with pytest.raises(ConfigError, match=f"--device: got {told} for 2 processes, .* needed {kind}"):
            pick(told, kind, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sequence", "0"), "parallel.sequence: got 0, needs 1 or more"),
        (("--sequence", "2"), "parallel.sequence: must divide the world size, got sequence 2 and world size 1"),
        (("--timeout", "0"), "parallel.timeout_s: seconds, got 0.0"),
        (("--tile", "20x32", "--tile-overlap", "8"), "tile: got (20, 32), needed multiples of 8"),
    ],
)
def test_bad_arguments(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(run, tmp_path / "out", *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_batches_are_a_function_of_the_requests_and_names_of_the_number() -> None:
    shapes = [VideoShape(5, 32, 32)] * 3 + [VideoShape(1, 32, 32)] * 2
    requests = tuple(Request(prompt=str(n), repetition=0, shape=shape, fps=8.0) for n, shape in enumerate(shapes))
    job = SampleJob(requests=requests, out=Path("x"), seed=0, batch_size=2, identity={}, columns={})
    assert [[number for number, _ in batch] for batch in job.batches()] == [[0, 1], [2], [3, 4]]
    assert all(request is requests[number] for batch in job.batches() for number, request in batch)
    folder = SampleFolder(Path("x"), requests, {})
    assert [folder.name(number) for number in (0, 3)] == ["0000.mp4", "0003.png"]


def test_a_sample_that_is_on_no_disk_here_is_reported(tmp_path: Path) -> None:
    requests = [Request(prompt=str(n), repetition=0, shape=VideoShape(1, 8, 8), fps=8.0) for n in range(3)]
    folder = SampleFolder(tmp_path, requests, {"seed": 1})
    assert folder.missing({"a": "b"}) == [0, 1, 2]
    folder.begin({"a": "b"})
    folder.write(1, np.full((1, 8, 8, 3), 7, np.uint8))
    assert folder.missing({"a": "b"}) == [0, 2] and folder.missing({"a": "c"}) == [0, 1, 2]
    found = folder.finish({2: "why"})
    assert found == {0: "written by a process, but not in --out here; needed a folder that all hosts share", 2: "why"}
    assert [row["file"] for row in rows(tmp_path)] == ["0001.png"]
    assert [(row["number"], row["seed"]) for row in rows(tmp_path, "failed.jsonl")] == [(0, 1), (2, 1)]


def test_a_damaged_sample_is_a_failure_and_not_the_end_of_the_others(tmp_path: Path) -> None:
    shapes = [VideoShape(1, 8, 8), VideoShape(1, 8, 8), VideoShape(5, 32, 32)]
    requests = [Request(prompt=str(n), repetition=0, shape=shape, fps=8.0) for n, shape in enumerate(shapes)]
    folder = SampleFolder(tmp_path, requests, {"segments": 2})
    folder.begin({"a": "b"})
    for number, shape in enumerate(shapes):
        folder.write(number, np.full((shape.num_frames, shape.height, shape.width, 3), 7, np.uint8))
    for name in ("0001.png", "0002.mp4"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    folder.look()
    folder.write_rows()
    found = folder.finish({})
    assert sorted(found) == [1, 2] and "0001.png of an earlier job is damaged (" in found[1]
    assert [row["file"] for row in rows(tmp_path)] == ["0000.png"] and folder.grid.exists()
    assert [row["number"] for row in rows(tmp_path, "failed.jsonl")] == [1, 2]


@pytest.mark.parametrize("text", ["{", "[1]", "1", '{"samples": "many"}'])
def test_a_damaged_marker_is_one_clear_message(tmp_path: Path, text: str) -> None:
    requests = [Request(prompt="p", repetition=0, shape=VideoShape(1, 8, 8), fps=8.0)]
    (tmp_path / "request.json").write_text(text)
    for act in (SampleFolder.missing, SampleFolder.begin):
        with pytest.raises(ConfigError, match=r"--out: .*request.json is damaged \("):
            act(SampleFolder(tmp_path, requests, {}), {"a": "b"})


@pytest.mark.parametrize("line", ["[1]", '{"file": 1}', "{"])
def test_rows_of_another_job_that_cannot_be_read_do_not_stop_this_one(tmp_path: Path, line: str) -> None:
    requests = [Request(prompt="p", repetition=0, shape=VideoShape(1, 8, 8), fps=8.0)]
    folder = SampleFolder(tmp_path, requests, {})
    folder.begin({"a": "b"})
    folder.write(0, np.full((1, 8, 8, 3), 7, np.uint8))
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    folder.begin({"a": "c"})
    assert [path.name for path in tmp_path.iterdir()] == ["request.json"] and folder.missing({"a": "c"}) == [0]
