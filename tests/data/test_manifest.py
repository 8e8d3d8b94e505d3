from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data.manifest import Row, read_rows
from ltd.data.records import Columns
from ltd.data.write import encode_image


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder of three stills, one of them below ``heldout``."""
    data = encode_image(np.zeros((20, 20, 3), dtype=np.uint8))
    for name in ("a.png", "sub/b.png", "heldout/c.png"):
        (tmp_path / "media" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "media" / name).write_bytes(data)
    return tmp_path / "media"


def brief(rows: list[Row]) -> list[Any]:
    return [(row.number, row.path, row.captions, row.start, row.end, row.split) for row in rows]


RECORDS: list[dict[str, Any]] = [
    {"path": "film.mp4", "caption": " one ", "start": 1.5, "end": 2.0, "split": "heldout"},
    {"path": "sub/b.png", "captions": ["two", {"text": "zwei,\u2028\u00e4", "weight": 3}]},
    {"path": "heldout/c.png", "caption": ""},
]
EXPECTED = [
    (0, "film.mp4", (("one", 1.0),), 1.5, 2.0, "heldout"),
    (1, "sub/b.png", (("two", 1.0), ("zwei,\u2028\u00e4", 3.0)), None, None, "train"),
    (2, "heldout/c.png", (("", 1.0),), None, None, "train"),
]


def write_csv(path: Path, *, bom: bool = False) -> Path:
    captions = json.dumps(RECORDS[1]["captions"], ensure_ascii=False).replace('"', '""')
    lines = [
        "path,caption,captions,start,end,split,aesthetic",
        "film.mp4, one ,,1.5,2.0,heldout,5",
        f'sub/b.png,,"{captions}",,,,6',
        "heldout/c.png,,,,,,7",
    ]
    path.write_text("\r\n".join(lines) + "\r\n", "utf-8-sig" if bom else "utf-8")
    return path


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(records)
    parquet.write_table(table, path)
    return path


def test_the_same_rows_from_jsonl_csv_and_parquet(media: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (media / "film.mp4").touch()  # manifests are read without opening media
    jsonl = media / "m.jsonl"
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    jsonl.write_text(text, "utf-8-sig")  # with a byte order mark, as editors write it
    assert brief(read_rows(jsonl)) == EXPECTED
    assert brief(read_rows(write_csv(media / "m.csv"))) == EXPECTED
    assert "m.csv: columns that are not read: aesthetic" in caplog.text
    assert brief(read_rows(write_csv(media / "bom.csv", bom=True))) == EXPECTED
    texts = [{"text": "two", "weight": None}, {"text": "zwei,\u2028\u00e4", "weight": 3.0}]
    records = [{**RECORDS[0], "score": 1}, {"path": "sub/b.png", "captions": texts}, RECORDS[2]]
    names = ("path", "caption", "captions", "start", "end", "split", "score")
    full = [{name: record.get(name) for name in names} for record in records]
    assert brief(read_rows(write_parquet(media / "m.parquet", full))) == EXPECTED
    assert "m.parquet: columns that are not read: score" in caplog.text


def test_foreign_column_names_and_lists_of_texts(media: Path) -> None:
    columns = Columns(path="file", caption="texts")
    parquet = write_parquet(media / "m.parquet", [{"file": "a.png", "texts": ["x", "y"]}])
    assert read_rows(parquet, columns=columns)[0].captions == (("x", 1.0), ("y", 1.0))
    (media / "m.tsv").write_text("file\ttexts\na.png\tx, y\n")
    assert read_rows(media / "m.tsv", columns=columns)[0].captions == (("x, y", 1.0),)
    (media / "m.jsonl").write_text('{"file": "a.png", "texts": "x"}\n')
    assert read_rows(media / "m.jsonl", columns=columns)[0].captions == (("x", 1.0),)


def test_folders_globs_and_several_sources_are_numbered_on(media: Path, tmp_path: Path) -> None:
    (media / "a.txt").write_text("\ufeffshort\n")
    (media / "sub" / "b.captions.json").write_text('["x", {"text": "y", "weight": 0.5}]')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "d.jsonl").write_text('{"path": "../media/film.mp4", "caption": "", "start": 1}')
    listed = [
        ("a.png", (("short", 1.0),), "train"),
        ("heldout/c.png", (), "heldout"),
        ("sub/b.png", (("x", 1.0), ("y", 0.5)), "train"),
    ]
    for source in (media, f"{media}/**/*", f"{media}/**/*.png"):
        assert [(row.path, row.captions, row.split) for row in read_rows(source)] == listed
    (media / "film.mp4").touch()
    rows = read_rows([f"{media}/*.png", f"{media}/heldout/*.png", media / "sub" / "b.png", f"{tmp_path}/oth*/*.jsonl"])
    assert [(row.number, row.path, row.split) for row in rows] == [
        (0, "a.png", "train"),
        (1, "c.png", "heldout"),  # the folder that the glob names counts
        (2, "b.png", "train"),
        (3, "../media/film.mp4", "train"),
    ]
    assert all(row.file.is_file() for row in rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[]", "line 2: got list, needed an object"),
        ('{"path": "a.png"}', "line 2: caption: got None, needed text"),
        ('{"path": "a.png", "caption": 7}', "line 2: caption: got 7, needed text"),
        ('{"path": "a.png", "caption": "\\ud800"}', r"line 2: caption: got '\\ud800', which UTF-8 cannot store"),
        ('{"path": 3, "caption": "x"}', "line 2: path: got 3, needed the name of a media file"),
        ('{"path": "a.png", "caption": "x", "stop": 3}', "line 2: stop: unknown field; needed some of path"),
        ('{"path": "a.gif", "caption": "x"}', "line 2: path: got 'a.gif', needed one of .jpg"),
        ('{"path": "a.png", "caption": "x", "split": "test"}', "line 2: split: got 'test', needed train or heldout"),
        ('{"path": "a.png", "caption": "x", "start": -1}', "line 2: start: got -1, needed seconds"),
        ('{"path": "a.png", "caption": "x", "start": NaN}', "line 2: start: got nan, needed seconds"),
        ('{"path": "a.png", "caption": "x", "end": 1e999}', "line 2: end: got inf, needed seconds"),
        ('{"path": "a.png", "caption": "x", "end": 1' + "0" * 400 + "}", "line 2: end: got 1000.*, needed seconds"),
        ('{"path": "a.png", "caption": "x", "start": 2, "end": 1}', "line 2: end: got 1, needed more than start = 2"),
        ('{"path": "gone.png", "caption": "x"}', "1 media files do not exist .*gone.png; set --media-root"),
        ('{"path": "a.png", "caption": "x", "captions": ["y"]}', "line 2: caption: got captions too"),
        ('{"path": "a.png", "captions": "y"}', "line 2: captions: got 'y', needed a list"),
        ('{"path": "a.png", "captions": [1]}', "line 2: captions: got 1, needed text"),
        ('{"path": "a.png", "captions": [{"text": "y", "w": 1}]}', "line 2: captions: w: unknown field"),
        (
            '{"path": "a.png", "captions": [{"text": "y", "weight": 0}]}',
            "line 2: captions: weight: got 0, needed a fin",
        ),
        ('{"path": "a.png", "captions": [{"text": "y", "weight": NaN}]}', "line 2: captions: weight: got nan"),
        ('{"path": "a.png", "caption": "x", "start": 0}', "line 2: start: got 0 for the image a.png, needed none"),
        ('{"path": "a.png", "caption": "x", "end": 2.5}', "line 2: end: got 2.5 for the image a.png, needed none"),
        (
            '{"path": "sub/b.png", "caption": "z"}',
            "m.jsonl line 2 repeats .*m.jsonl line 1: sub/b.png, start None, end None; .*capti",
        ),
    ],
)
def test_wrong_lines_are_named(media: Path, line: str, message: str) -> None:
    path = media / "m.jsonl"
    path.write_text('{"path": "sub/b.png", "caption": "x"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.jsonl", b'{"path": "a.png", "caption": "x"}\n{"caption": "caf\xe9"}', "line 2: not UTF-8: byte 0xe9"),
        ("m.csv", b"path,caption\na.png,caf\xe9\n", "line 2: not UTF-8: byte 0xe9"),
        ("m.csv", b"", "got no column 'path' .columns: none.; set --path-column"),
        ("m.csv", b"file,caption\n", "got no column 'path' .columns: file, caption.; set --path-column"),
        ("m.csv", b"path,text\n", "got no column 'caption' or 'captions' .columns: path, text.; set --caption-column"),
        ("m.csv", b"path,caption,path\n", "got the column 'path' twice"),
        ("m.csv", b"path,caption\na.png,x,y\n", "line 2: got 3 cells, needed 2"),
        ("m.csv", b'path,caption\na.png,"x\n', "line 2: not CSV"),
        ("m.csv", b"path,caption,end\na.png,x,soon\n", "line 2: end: got 'soon', needed seconds"),
        ("m.csv", b"path,caption,end\na.png,x,inf\n", "line 2: end: got inf, needed seconds"),
        ("m.csv", b"path,captions\na.png,cat\n", "line 2: captions: not a JSON list"),
        ("m.csv", b"path,caption\n", "got no samples"),
        ("m.parquet", b"PAR1 of sorts", "not a Parquet file that can be read"),
    ],
)
def test_wrong_files_are_refused_in_one_line(media: Path, name: str, data: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (media / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        read_rows(media / name)
    assert "\n" not in str(caught.value)


def test_parquet_names_the_row(media: Path) -> None:
    path = write_parquet(media / "m.parquet", [{"path": "a.png", "caption": n} for n in (1, 2)])
    with pytest.raises(ConfigError, match="m.parquet row 1: caption: got 1, needed text"):
        read_rows(path)


def test_empty_and_missing_sources(tmp_path: Path, media: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_rows(tmp_path / "nothing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="got no samples"):
        read_rows([media, tmp_path / "empty"])
    with pytest.raises(ConfigError, match=r"\*.webp: the glob matches 0 files"):
        read_rows(f"{media}/*.webp")
    with pytest.raises(ConfigError, match="the glob matches 2 files, none of them media"):
        read_rows(f"{media}/[sh]*")
    with pytest.raises(ConfigError, match="sample 4 repeats sample 1"):
        read_rows([media, f"{media}/*.png"])


def test_captions_beside_media_are_checked(media: Path) -> None:
    (media / "a.captions.json").write_text('[{"text": "x", "weight": -1}]')
    with pytest.raises(ConfigError, match=r"a.captions.json: captions: weight: got -1"):
        read_rows(media)
    (media / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="a.captions.json: got a.txt too"):
        read_rows(media)
    (media / "a.captions.json").unlink()
    with pytest.raises(ConfigError, match="a.txt: caption is not UTF-8"):
        read_rows(media)
