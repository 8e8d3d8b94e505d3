"""A job of many sources, killed anywhere or split over processes, makes the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data import pieces, shards
from ltd.data.index import open_index
from ltd.data.manifest import Row
from ltd.data.shards import ShardOptions, index_existing, make_shards
from ltd.data.write import encode_image, encode_video
from tests.data.test_shards import ROWS, cut_rows, tree


def test_the_same_inputs_give_the_same_bytes_in_tars_of_a_size(film: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 3)):
        cut_rows(film.parent, tmp_path / name, ROWS, shard_size_mb=0.005, workers=workers)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert len(list((tmp_path / "a" / "train").glob("*.tar"))) > 1
    assert [e.key for e in open_index(str(tmp_path / "a" / "train")).entries] == [
        f"{n:08d}_film" for n in (0, 1, 3, 4, 5)
    ]


def test_a_killed_run_goes_on_and_a_finished_one_is_kept(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_rows(film.parent, tmp_path / "whole", ROWS)
    real, cuts = pieces.cut_video, []

    def counted(rows: Sequence[Row], *args: Any, limit: int = 99, **kwargs: Any) -> Any:
        for piece in real(rows, *args, **kwargs):
            if len(cuts) >= limit:
                raise KeyboardInterrupt
            cuts.append(piece.row.number)
            yield piece

    monkeypatch.setattr(pieces, "cut_video", lambda *a, **k: counted(*a, limit=2, **k))
    with pytest.raises(KeyboardInterrupt):
        cut_rows(film.parent, tmp_path / "out", ROWS)
    assert cuts == [0, 1] and not (tmp_path / "out" / "train").exists()
    monkeypatch.setattr(pieces, "cut_video", counted)
    cut_rows(film.parent, tmp_path / "out", ROWS)
    assert cuts == [0, 1, 2, 3, 4, 5]  # nothing is cut twice
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    cut_rows(film.parent, tmp_path / "out", ROWS)
    assert len(cuts) == 6
    (tmp_path / "out" / "train" / "000000.tar").unlink()
    cut_rows(film.parent, tmp_path / "out", ROWS)
    assert len(cuts) == 12 and tree(tmp_path / "out") == tree(tmp_path / "whole")
    cut_rows(film.parent, tmp_path / "out", ROWS[:1])
    assert len(open_index(str(tmp_path / "out" / "train")).entries) == 1
    assert not (tmp_path / "out" / "heldout").exists()


JOB = """
import os, signal, sys
import numpy as np
from ltd.data import pieces, shards
from ltd.data.curate.filters import FilterOptions
from ltd.data.curate.shots import ShotOptions
from ltd.data.shards import ShardOptions, make_shards

source, out, phase, count, workers = sys.argv[1:4] + [int(a) for a in sys.argv[4:]]
class Halves:
    name, size = "halves", (18, 24)
    def __call__(self, frames):
        n = sum(1 for _ in frames)
        return [(0, n // 2), (n // 2, n)]
def kill_after(module, name, fits):
    real, seen = getattr(module, name), []
    def counted(*args, **kwargs):
        result = real(*args, **kwargs)
        if fits(*args):
            seen.append(args)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, counted)
if phase == "pieces":
    kill_after(pieces, "write_bytes", lambda path, data: path.suffix == ".mp4")
elif phase == "shots":
    kill_after(pieces, "write_bytes", lambda path, data: path.parent.name == "shots")
elif phase == "tars":
    kill_after(shards, "index_tar", lambda path: True)
elif phase == "publish":
    kill_after(shards.os, "replace", lambda a, b: os.path.isdir(b))
options = ShardOptions(
    shard_size_mb=0.004, workers=workers, filters=FilterOptions(dedupe_bits=2), shots=ShotOptions(min_shot_s=0)
)
make_shards(source, out, options=options, detector=Halves())
"""


def run_job(source: Path, out: Path, phase: str = "none", count: int = 0, workers: int = 2) -> int:
    root = Path(shards.__file__).parents[2]
    arguments = [str(source), str(out), phase, str(count), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", JOB, *arguments], env=environment, check=False).returncode


@pytest.fixture
def library(film: Path) -> Path:
    """A folder of a film, a shorter one, some stills, an image twice and a file that is none."""
    folder = film.parent
    rng = np.random.default_rng(0)
    for number in range(6):
        picture = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        (folder / f"p{number}.png").write_bytes(encode_image(picture))
    shutil.copy(folder / "p1.png", folder / "p9.png")
    (folder / "heldout").mkdir()
    frames = np.stack(
        [np.roll(np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((8, 8, 1))), 4 * n, 1) for n in "1" * 9]
    )
    (folder / "heldout" / "s.mp4").write_bytes(encode_video(frames.astype(np.uint8), 12.0))
    (folder / "bad.mp4").write_bytes(b"no film")
    return folder


@pytest.mark.slow
def test_a_job_killed_anywhere_gives_the_same_bytes(library: Path, tmp_path: Path) -> None:
    assert run_job(library, tmp_path / "whole", workers=1) == 0
    expected = tree(tmp_path / "whole")
    report = json.loads(expected["make_shards.json"])
    assert report["filters"] == {"dedupe_bits": 1} and report["causes"] == {"undecodable": 1}
    assert len(report["splits"]["train"]["shards"]) > 2 and report["splits"]["heldout"]["samples"] == 2
    out = tmp_path / "out"  # killed in every phase in turn, with a number of workers of its own each time
    for phase, count, workers in (("shots", 1, 1), ("pieces", 2, 3), ("tars", 2, 2), ("publish", 1, 2)):
        assert run_job(library, out, phase, count, workers) == -signal.SIGKILL, phase
        assert not (out / "heldout").exists() or phase == "publish"
    assert run_job(library, out) == 0
    assert tree(out) == expected
    assert sorted(path.name for path in out.iterdir()) == ["heldout", "make_shards.json", "train"]


def test_finished_tars_are_kept_and_their_pieces_removed(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real, options = shards.index_tar, ShardOptions(shard_size_mb=0.01, workers=1)

    def counted(path: Path) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(f"{path.parent.name}/{path.name}")
        return real(path)

    monkeypatch.setattr(shards, "index_tar", counted)
    with pytest.raises(KeyboardInterrupt):
        make_shards(library, tmp_path / "out", options=options)
    (work,) = (tmp_path / "out").glob(".work-*")
    left = {path.name[:8] for path in (work / "pieces").iterdir() if path.suffix != ".json"}
    packed = {e.key[:8] for tar in made for e in open_index(str(work / tar)).entries}
    assert packed and not left & packed
    first = list(made)
    made.clear()
    # What a kill in the middle of a write leaves behind.
    for leftover in (work / "train" / "000000.tar.index.json", tmp_path / "out" / "make_shards.json"):
        Path(f"{leftover}.7-7.incomplete").touch()
    monkeypatch.setattr(shards, "index_tar", lambda path: (made.append(f"{path.parent.name}/{path.name}"), real(path)))
    report = make_shards(library, tmp_path / "out", options=options)
    total = sum(len(split["shards"]) for split in report["splits"].values())
    assert len(made) == total - 2 and not set(made) & set(first)
    assert not list((tmp_path / "out").rglob("*.incomplete"))


@pytest.mark.slow
def test_processes_write_and_index_the_same_bytes(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ShardOptions(shard_size_mb=0.02, workers=2)
    make_shards(library, tmp_path / "threads", options=options)
    monkeypatch.setattr(shards, "_PROCESS_BYTES", 0)
    in_this_one: list[Path] = []
    monkeypatch.setattr(shards, "_write_tar", lambda tar, path, pieces: in_this_one.append(path))
    make_shards(library, tmp_path / "processes", options=options)
    expected = tree(tmp_path / "threads")
    assert tree(tmp_path / "processes") == expected and not in_this_one
    for path in (tmp_path / "processes").rglob("*.index.json"):
        path.unlink()
    assert index_existing(tmp_path / "processes", workers=2)["tars"] == len(list((tmp_path / "threads").rglob("*.tar")))
    assert tree(tmp_path / "processes") == expected


def test_places_that_cannot_be_written_are_refused_in_one_line(library: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "file" / "out", "out cannot be written: Not a directory"),
        (tmp_path / "file", "file cannot be written: (Not a directory|File exists)"),
        (Path("/proc/out"), "cannot be written: "),
        (library / "out", "is a source's own folder or below it"),
        (library, "is a source's own folder or below it"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            make_shards(library, out, options=ShardOptions())
        assert str(caught.value).startswith("--out: ") and "\n" not in str(caught.value)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "make_shards.json").write_text("{")
    with pytest.raises(ConfigError, match="make_shards.json is damaged"):
        make_shards(library, tmp_path / "out", options=ShardOptions())
