from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data import cut, shards
from ltd.data.cut import CutOptions, scaled
from ltd.data.decode import decode_clip, decode_image
from ltd.data.index import open_index
from ltd.data.manifest import Row, read_rows
from ltd.data.shards import ShardOptions, index_existing, make_shards
from ltd.data.write import encode_image

Numbers = Callable[[np.ndarray], list[int]]


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cut_rows(media: Path, out: Path, rows: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
    manifest = write_manifest(media / "manifest.jsonl", [{"caption": "c", **row} for row in rows])
    return make_shards(manifest, out, options=ShardOptions(**options))


def test_shots_hold_exactly_the_frames_of_the_source(film: Path, tmp_path: Path, numbers_of: Numbers) -> None:
    spans = [(0, 9), (9, 40), (40, 41), (30, 60), (150, 200)]  # touching, one frame, overlapping, to the end
    rows = [{"path": "film.mp4", "start": round(a / 24, 6), "end": round(b / 24, 6)} for a, b in spans]
    cut_rows(film.parent, tmp_path / "out", rows, cut=CutOptions(size=48))
    index = open_index(str(tmp_path / "out" / "train"))
    source = film.read_bytes()
    for entry, (start, stop) in zip(index.entries, spans, strict=True):
        about = json.loads(index.read(entry, "json"))
        assert (about["start_frame"], about["end_frame"], entry.frames) == (start, stop, stop - start)
        assert (entry.width, entry.height, entry.fps) == (64, 48, 24.0)
        for backend in ("decord", "pyav"):
            frames = decode_clip(index.read(entry, "mp4"), start=0, num_frames=stop - start, backend=backend)  # type: ignore[arg-type]
            assert numbers_of(frames) == list(range(start, stop))
        expected = decode_clip(source, start=start, num_frames=stop - start, height=48, width=64)
        assert np.abs(frames.astype(float) - expected).mean() < 4  # two lossy codecs apart


def test_far_shots_are_sought_not_decoded(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers_of: Numbers
) -> None:
    monkeypatch.setattr(cut, "_GAP", 20)
    rows = [{"path": "film.mp4", "start": a / 24, "end": b / 24} for a, b in ((120, 126), (3, 8))]
    cut_rows(film.parent, tmp_path / "out", rows)
    index = open_index(str(tmp_path / "out" / "train"))
    found = [numbers_of(decode_clip(index.read(e, "mp4"), start=0, num_frames=e.frames)) for e in index.entries]
    assert found == [list(range(120, 126)), list(range(3, 8))]  # in the order of the manifest


def test_splits_captions_and_provenance(film: Path, tmp_path: Path) -> None:
    still = np.zeros((40, 60, 3), dtype=np.uint8)
    (film.parent / "a.png").write_bytes(encode_image(still))
    (film.parent / "b.jpeg").write_bytes(encode_image(still + 200, "jpg"))
    rows = [
        {"path": "a.png", "caption": " black  "},
        {"path": "b.jpeg", "caption": "grey", "split": "heldout"},
        {"path": "film.mp4", "end": 0.5, "split": "heldout"},
        {"path": "film.mp4", "caption": "whole"},
    ]
    report = cut_rows(film.parent, tmp_path / "out", rows, cut=CutOptions(size=20))
    train, heldout = (open_index(str(tmp_path / "out" / split)) for split in ("train", "heldout"))
    assert [(e.key, e.kind, train.caption(e)) for e in train.entries] == [
        ("00000000_a", "image", "black"),
        ("00000003_film", "video", "whole"),
    ]
    assert [(e.media, e.width, e.height, e.frames) for e in heldout.entries] == [
        ("jpg", 30, 20, 1),
        ("mp4", 26, 20, 12),
    ]
    about = json.loads(train.read(train.entries[0], "json"))
    assert about["source"] == "a.png" and about["source_size"] == [60, 40] and len(about["source_sha256"]) == 64
    assert {k: report["splits"]["train"][k] for k in ("images", "videos", "frames")} == {
        "images": 1,
        "videos": 1,
        "frames": 201,
    }


def test_media_that_need_no_change_are_copied(film: Path, tmp_path: Path) -> None:
    data = encode_image(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8), "jpg")
    (film.parent / "a.jpg").write_bytes(data)
    cut_rows(film.parent, tmp_path / "out", [{"path": "a.jpg"}, {"path": "film.mp4"}], cut=CutOptions(size=96))
    index = open_index(str(tmp_path / "out" / "train"))
    assert index.read(index.entries[0], "jpg") == data
    assert index.read(index.entries[1], "mp4") == film.read_bytes()
    assert json.loads(index.read(index.entries[1], "json"))["transform"] == {"copied": True}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


ROWS = [
    {"path": "film.mp4", "start": n / 2, "end": n / 2 + 0.5, "split": "heldout" if n == 2 else "train"}
    for n in range(6)
]


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
    real, cuts = shards.cut_video, []

    def counted(rows: Sequence[Row], *args: Any, limit: int = 99, **kwargs: Any) -> Any:
        for piece in real(rows, *args, **kwargs):
            if len(cuts) >= limit:
                raise KeyboardInterrupt
            cuts.append(piece.row.number)
            yield piece

    monkeypatch.setattr(shards, "cut_video", lambda *a, **k: counted(*a, limit=2, **k))
    with pytest.raises(KeyboardInterrupt):
        cut_rows(film.parent, tmp_path / "out", ROWS)
    assert cuts == [0, 1] and not (tmp_path / "out" / "train").exists()
    monkeypatch.setattr(shards, "cut_video", counted)
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


def test_foreign_folders_are_never_replaced(film: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    with pytest.raises(ConfigError, match="that this tool did not make; choose another"):
        cut_rows(film.parent, tmp_path / "out", ROWS)


def test_bad_sources_are_left_out_and_counted(film: Path, tmp_path: Path) -> None:
    media = film.parent
    (media / "zero.mp4").touch()
    (media / "cut.mp4").write_bytes(film.read_bytes()[:3000])
    (media / "noise.png").write_bytes(b"no image")
    rows = [{"path": name} for name in ("zero.mp4", "cut.mp4", "noise.png")]
    late = {"path": "film.mp4", "start": 100.0}
    report = cut_rows(media, tmp_path / "out", [*rows, late, {"path": "film.mp4", "end": 1.0}])
    assert [record["error"].split(":")[0] for record in report["skipped"]] == [
        "empty",
        "undecodable",
        "undecodable",
        "outside_source",
    ]
    assert report["splits"]["train"]["samples"] == 1
    with pytest.raises(ConfigError, match="none of the 3 samples can be made"):
        cut_rows(media, tmp_path / "none", rows)


def test_a_folder_of_media(film: Path, tmp_path: Path) -> None:
    folder = film.parent
    (folder / "film.txt").write_text("numbers\n")
    (folder / "heldout").mkdir()
    (folder / "heldout" / "b.v2.png").write_bytes(encode_image(np.zeros((20, 20, 3), dtype=np.uint8)))
    report = make_shards(folder, tmp_path / "out", options=ShardOptions())
    train, heldout = (open_index(str(tmp_path / "out" / split)) for split in ("train", "heldout"))
    assert [(e.key, train.caption(e)) for e in train.entries] == [("00000000_film", "numbers")]
    assert [(e.key, e.caption_chars) for e in heldout.entries] == [("00000001_b_v2", None)]
    assert report["splits"]["heldout"]["uncaptioned"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: got list, needed an object"),
        ('{"path": "film.mp4"}', "line 2: caption: got None, needed text"),
        ('{"path": "film.mp4", "caption": "x", "stop": 3}', "line 2: stop: unknown field; needed some of path"),
        ('{"path": "film.gif", "caption": "x"}', "line 2: path: got 'film.gif', needed one of .jpg"),
        ('{"path": "film.mp4", "caption": "x", "split": "test"}', "line 2: split: got 'test', needed train or heldout"),
        ('{"path": "film.mp4", "caption": "x", "start": -1}', "line 2: start: got -1, needed seconds"),
        (
            '{"path": "film.mp4", "caption": "x", "start": 2, "end": 1}',
            "line 2: end: got 1, needed more than start = 2",
        ),
        ('{"path": "gone.mp4", "caption": "x"}', "1 media files do not exist .*gone.mp4; set --media-root"),
    ],
)
def test_wrong_manifests_name_the_line(film: Path, line: str, message: str) -> None:
    path = film.parent / "m.jsonl"
    path.write_text('{"path": "film.mp4", "caption": "x"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_rows(path)


def test_empty_and_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(ConfigError, match="got no samples"):
        read_rows(tmp_path)


def test_existing_tars_are_indexed(film: Path, tmp_path: Path) -> None:
    cut_rows(film.parent, tmp_path / "out", ROWS)
    before = tree(tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.jsonl"):
        path.unlink()
    assert index_existing(tmp_path / "out") == {"tars": 2, "samples": 6, "bad": {}}
    assert tree(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConfigError, match="no such path"):
        index_existing(tmp_path / "out")


@pytest.mark.parametrize(
    ("size", "even", "expected"),
    [(None, False, (125, 71)), (None, True, (124, 72)), (36, True, (64, 36)), (500, False, (125, 71))],
)
def test_scaling(size: int | None, even: bool, expected: tuple[int, int]) -> None:
    assert scaled(125, 71, size, even=even) == expected


def test_colour_tags_survive_the_cut(film: Path, tmp_path: Path) -> None:
    """A BT.709 source must not be read as BT.601 after it is cut: red would turn orange."""
    import av

    red = np.zeros((64, 64, 3), dtype=np.uint8)
    red[..., 0] = 220
    path = film.parent / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "4"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = 1
        for _ in range(6):
            frame = av.VideoFrame.from_ndarray(red, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
    cut_rows(film.parent, tmp_path / "out", [{"path": "red.mp4", "start": 0.0, "end": 0.25}], cut=CutOptions(size=32))
    index = open_index(str(tmp_path / "out" / "train"))
    for backend in ("decord", "pyav"):
        source, shot = (
            decode_clip(data, start=0, num_frames=2, backend=backend)[:, 5:-5, 5:-5].mean(axis=(0, 1, 2))  # type: ignore[arg-type]
            for data in (path.read_bytes(), index.read(index.entries[0], "mp4"))
        )
        assert np.abs(source - shot).max() < 4


def test_image_scaling_keeps_the_picture(film: Path, tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:80, 0:120]
    picture = np.stack([rows * 2, columns * 2, rows + columns], -1).astype(np.uint8)
    (film.parent / "a.png").write_bytes(encode_image(picture))
    cut_rows(film.parent, tmp_path / "out", [{"path": "a.png"}], cut=CutOptions(size=40))
    index = open_index(str(tmp_path / "out" / "train"))
    small = decode_image(index.read(index.entries[0], "png"))[0].astype(float)
    assert np.abs(small - picture.reshape(40, 2, 60, 2, 3).mean(axis=(1, 3))).max() < 3
