from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data.entries import Entries
from ltd.data.index import Index, find_shards, index_path, index_tar, open_index, read_index
from ltd.data.write import encode_image, encode_video

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]
STILL = encode_image(np.full((6, 8, 3), 90, dtype=np.uint8))
CLIP = encode_video(np.full((9, 32, 40, 3), 60, dtype=np.uint8), 12)


def test_every_member_is_read_back_by_offset(tmp_path: Path, write_tar: WriteTar) -> None:
    members = {
        "a.png": STILL,
        "a.txt": " ä dog \n".encode(),
        "sub/b.mp4": CLIP,
        "sub/b.txt": b"cat",
        "sub/b.json": b"{}",
    }
    tar = write_tar(tmp_path / "x.tar", members)
    entries, bad = index_tar(tar)
    assert not bad
    assert [(e.key, e.kind, e.width, e.height, e.frames, e.fps, e.caption_chars) for e in entries] == [
        ("a", "image", 8, 6, 1, 0.0, (5,)),
        ("sub/b", "video", 40, 32, 9, 12.0, (3,)),
    ]
    index = open_index(str(tar))
    assert index.read(index.entries[1], "mp4") == CLIP
    assert index.read(index.entries[0], "png") == STILL
    assert [index.caption(entry) for entry in index.entries] == ["ä dog", "cat"]
    assert list(read_index(tar)[0]) == list(entries) and read_index(tar)[1] == bad


def test_bad_samples_are_left_out_by_cause(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = write_tar(
        tmp_path / "x.tar",
        {
            "../evil.png": STILL,
            "/etc/evil.png": STILL,
            "new\nline.png": STILL,
            "good.png": STILL,
            "good.txt": b"fine",
            "latin.png": STILL,
            "latin.txt": "caf\u00e9".encode("latin-1"),
            "empty.mp4": b"",
            "noise.mp4": b"\x00\x01" * 400,
            "wrong.png": CLIP,
            "alone.txt": b"no picture",
            "two.png": STILL,
            "two.mp4": CLIP,
        },
    )
    with tarfile.open(tar, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        again = tarfile.TarInfo("good.png")
        again.size = len(CLIP)
        archive.addfile(again, io.BytesIO(CLIP))
    entries, bad = index_tar(tar)
    assert [entry.key for entry in entries] == ["good"]
    assert {(b.key, b.cause) for b in bad} == {
        ("../evil.png", "unsafe_name"),
        ("/etc/evil.png", "unsafe_name"),
        ("new\nline.png", "unsafe_name"),
        ("link.png", "unsafe_name"),
        ("good", "duplicate"),
        ("latin", "caption_not_utf8"),
        ("empty", "empty"),
        ("noise", "undecodable"),
        ("wrong", "undecodable"),
        ("alone", "no_media"),
        ("two", "duplicate"),
    }
    assert index_path(tar).is_file()
    assert open_index(str(tar)).bad == bad


def test_a_truncated_tar_keeps_its_whole_samples(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.png": STILL, "b.mp4": CLIP})
    index_tar(tar)
    whole = tar.read_bytes()
    tar.write_bytes(whole[: whole.index(CLIP[:64]) + len(CLIP) // 2])
    with pytest.raises(
        ConfigError, match=r"truncated or rewritten tar\); run: python tools/make_shards.py --index-only"
    ):
        read_index(tar)
    entries, bad = index_tar(tar)
    assert [entry.key for entry in entries] == ["a"]
    assert [record.cause for record in bad] == ["truncated"]


def test_unusable_shards_say_what_to_do(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = write_tar(tmp_path / "sub" / "x.tar", {"a.png": STILL})
    (tmp_path / "empty").mkdir()
    zero, text = tmp_path / "zero.bin", tmp_path / "text.bin"
    zero.touch()
    text.write_bytes(b"this is no tar" * 100)
    cases: list[tuple[str, Callable[[], object]]] = [
        (f"{tar} has no index .*run: python tools/make_shards.py --index-only {tar}", lambda: open_index(str(tar))),
        ("the directory holds no .tar", lambda: find_shards(str(tmp_path / "empty"))),
        ("did you mean its folder sub?", lambda: find_shards(str(tmp_path))),
        ("no such path", lambda: find_shards(str(tmp_path / "nothing.tar"))),
        ("has zero bytes", lambda: index_tar(zero)),
        ("is not a plain tar", lambda: index_tar(text)),
        ("does not exist", lambda: index_tar(tmp_path / "nothing.tar")),
    ]
    for message, call in cases:
        with pytest.raises(ConfigError, match=message):
            call()


def test_a_damaged_index_names_the_command(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.png": STILL, "b.png": STILL})
    index_tar(tar)
    whole = index_path(tar).read_bytes()
    with np.load(io.BytesIO(whole)) as file:
        columns = dict(file)
    header = json.loads(columns["header"].tobytes())

    def changed(**values: object) -> bytes:
        buffer = io.BytesIO()
        text = json.dumps({**header, **{name: v for name, v in values.items() if name in header}})
        arrays = {name: v for name, v in values.items() if name not in header}
        np.savez(buffer, **{**columns, **arrays, "header": np.frombuffer(text.encode(), np.uint8)})  # type: ignore[arg-type]
        return buffer.getvalue()

    index_path(tar).write_bytes(changed())
    assert len(read_index(tar)[0]) == 2
    damaged = [whole[:60], b"nonsense", b"", b"[]", whole[: len(whole) // 2], changed(format=99), changed(samples=3)]
    damaged += [changed(width=columns["width"][:1]), changed(key=columns["key"][:1]), changed(extensions=["exe"])]
    for data in damaged:
        index_path(tar).write_bytes(data)
        with pytest.raises(ConfigError, match=r"run: python tools/make_shards\.py --index-only"):
            read_index(tar)


def test_patterns(tmp_path: Path, write_tar: WriteTar) -> None:
    tars = [write_tar(tmp_path / f"d{n // 2}" / f"{n:03d}.tar", {f"k{n}.png": STILL}) for n in range(4)]
    assert find_shards(str(tmp_path / "d{0,1}" / "*.tar")) == tuple(map(str, tars))
    assert find_shards(str(tmp_path / "d0" / "{000..001}.tar")) == tuple(map(str, tars[:2]))
    assert find_shards((str(tars[2]), str(tmp_path / "d1"))) == tuple(map(str, tars[2:]))
    for tar in tars:
        index_tar(tar)
    assert [entry.key for entry in Index(tars).entries] == ["k0", "k1", "k2", "k3"]


def test_weighted_captions_are_indexed_and_read(tmp_path: Path, write_tar: WriteTar) -> None:
    members = {
        "a.png": STILL,
        "a.txt": b"first",
        "a.captions.json": json.dumps([["first", 1.0], ["a longer one", 3.0]]).encode(),
        "b.png": STILL,
        "b.txt": b"",
        "c.png": STILL,
        "d.png": STILL,
        "d.captions.json": b'[["x", -1]]',
        "e.png": STILL,
        "e.captions.json": b'{"x": 1}',
    }
    tar = write_tar(tmp_path / "x.tar", members)
    entries, bad = index_tar(tar)
    assert [(e.key, e.caption_chars, e.captioned) for e in entries] == [
        ("a", (5, 12), True),
        ("b", (0,), False),
        ("c", (), False),
    ]
    assert {(b.key, b.cause) for b in bad} == {("d", "caption_invalid"), ("e", "caption_invalid")}
    index = open_index(str(tar))
    assert [index.captions(e) for e in index.entries] == [(("first", 1.0), ("a longer one", 3.0)), (("", 1.0),), ()]
    assert index.load(index.entries[0]) == (STILL, (("first", 1.0), ("a longer one", 3.0)))
    assert index.entries.captioned.tolist() == [True, False, False]


def test_a_damaged_header_in_the_middle_is_told(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.png": STILL, "b.png": STILL, "c.png": STILL})
    data = bytearray(tar.read_bytes())
    place = data.index(b"b.png")
    data[place + 100 : place + 160] = b"\xff" * 60
    tar.write_bytes(bytes(data))
    entries, bad = index_tar(tar)
    assert [entry.key for entry in entries] == ["a"]
    assert [record.cause for record in bad] == ["truncated"]


def test_columns_take_join_and_slice_like_rows(tmp_path: Path, write_tar: WriteTar) -> None:
    tars = [
        write_tar(tmp_path / f"{n}.tar", {f"ä{n}.png": STILL, f"ä{n}.txt": b"cap" * n, f"b{n}.mp4": CLIP})
        for n in range(3)
    ]
    for tar in tars:
        index_tar(tar)
    entries = Index(tars).entries
    rows = list(entries)
    assert [row.key for row in rows] == ["ä0", "b0", "ä1", "b1", "ä2", "b2"]
    assert [row.shard for row in rows] == [0, 0, 1, 1, 2, 2]
    assert entries[1:4] == rows[1:4] and entries[-1] == rows[-1]
    places = np.array([4, 0, 3, 4])
    assert list(entries.take(places)) == [rows[place] for place in places]
    assert list(Entries.of(rows)) == rows and Entries.of(rows).digest == entries.digest
    assert Entries.of(rows[::-1]).digest != entries.digest
    with pytest.raises(IndexError):
        entries[6]
