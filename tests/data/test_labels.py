"""Class labels and where samples are cut: read from tars, kept in indexes and caches, refused where they do not fit."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ltd.config import ConfigError
from ltd.data import DataConfig, ViewConfig, build_loader
from ltd.data.batch import Batch
from ltd.data.entries import Entries, Entry
from ltd.data.index import Index, index_tar, open_index
from ltd.data.index_file import decode_index, encode_index
from ltd.data.labels import check_labels, class_names, label_of_members, numbers_of, read_classes
from ltd.data.latent_join import finish_cache
from ltd.data.latent_writer import LatentCacheWriter
from ltd.data.latents import LatentCache
from ltd.data.manifest import number_classes, read_rows
from ltd.data.media import decode_cut, geometry_of
from ltd.data.mixture import open_sources
from ltd.data.plan import Placement
from ltd.data.shards import ShardOptions, make_shards
from ltd.data.windows import enumerate_windows
from ltd.data.write import encode_image
from tests.data.latent_cases import VIEWS, identity, write

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]


@pytest.mark.parametrize(
    ("cls", "about", "expected"),
    [
        (b"7\n", None, (7, "")),
        (b" tree frog ", None, (-1, "tree frog")),
        (b"3", b'{"label": 5}', (3, "")),  # webdataset's own member goes first
        (None, b'{"label": 5}', (5, "")),
        (None, b'{"label": "5"}', (5, "")),
        (None, b'{"label": 5, "class": "cat"}', (5, "cat")),
        (None, b'{"label": "cat"}', (-1, "cat")),
        (None, b'{"class": "cat"}', (-1, "cat")),
        (None, None, (-1, "")),
        # what other tools keep there is no label, and no bad sample either
        (b"\xff\xfe", None, (-1, "")),
        (b"-1", None, (-1, "")),
        (None, b'{"label": true}', (-1, "")),
        (None, b'{"label": 2.5}', (-1, "")),
        (None, b'{"label": [1, 2]}', (-1, "")),
        (None, b'{"label": 99999999999}', (-1, "")),
        (None, b"[1]", (-1, "")),
        (None, b"{", (-1, "")),
    ],
)
def test_members_that_say_a_class(cls: bytes | None, about: bytes | None, expected: tuple[int, str]) -> None:
    assert label_of_members(cls, about) == expected


def rows(*labels: tuple[int, str]) -> Entries:
    made = [Entry(f"k{n}", "image", 8, 8, 1, 0.0, (), {"png": (0, 1)}, 0, *label) for n, label in enumerate(labels)]
    return Entries.of(made)


def test_names_become_numbers_by_the_list_or_by_samples_that_have_both() -> None:
    entries = rows((-1, "b"), (0, "a"), (-1, ""), (4, ""), (1, "b"))
    assert numbers_of(entries, None).tolist() == [1, 0, -1, 4, 1]
    assert class_names(entries, None) == ("a", "b")
    assert numbers_of(entries, ("b", "a")).tolist() == [0, 0, -1, 4, 1], "a number that a sample has stays"
    assert numbers_of(rows((-1, "b")), None).tolist() == [-1]


def test_rows_keep_their_class_through_joining_and_taking() -> None:
    first, second = rows((-1, "b"), (0, "a")), rows((2, "c"), (-1, "a"), (3, ""))
    joined = Entries.concatenate([first, second.with_shard(1)])
    assert [(row.label, row.class_name) for row in joined] == [(-1, "b"), (0, "a"), (2, "c"), (-1, "a"), (3, "")]
    taken = joined.take(np.array([3, 2, 0]))
    assert [(row.label, row.class_name) for row in taken] == [(-1, "a"), (2, "c"), (-1, "b")]
    assert Entries.concatenate([rows((-1, "")), rows((1, "x"))])[1].class_name == "x"


def test_the_index_keeps_classes_and_one_without_is_as_before() -> None:
    entries = rows((-1, "b"), (5, "a"), (-1, ""))
    problem, found, _ = decode_index(encode_index(entries, [], tar="x", num_bytes=9), num_bytes=9, shard="x")
    assert problem == "" and found is not None
    assert [(row.label, row.class_name) for row in found] == [(-1, "b"), (5, "a"), (-1, "")]
    plain = encode_index(rows((-1, ""), (-1, "")), [], tar="x", num_bytes=9)
    with np.load(io.BytesIO(plain)) as file:
        assert "label" not in file.files and json.loads(file["header"].tobytes())["format"] == 2
    problem, found, _ = decode_index(plain, num_bytes=9, shard="x")
    assert found is not None and found.columns["label"].tolist() == [-1, -1] and found.classes == ()


def test_an_index_whose_classes_are_cut_off_is_refused() -> None:
    entries = rows((-1, "b"), (5, "a"))
    entries.classes = ("a",)
    data = encode_index(entries, [], tar="x", num_bytes=9)
    assert "a class that is none of the 1 named" in decode_index(data, num_bytes=9, shard="x")[0]


CATS = ("cat", "dog", "tree frog")


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (
            [(-1, ""), (-1, "")],
            None,
            r"num_classes: got 3, but none of the 2 samples of x\.tar has a label; .*index-only",
        ),
        ([(0, ""), (7, "")], None, r"num_classes: got 3, but sample 'k1' of x\.tar has label 7; needed 8 or more"),
        ([(0, ""), (-1, "tree fog")], CATS, r"none of the 3 known; the nearest: 'tree frog' \(sample 'k1' of x\.tar\)"),
        ([(0, "catt")], CATS, r"'catt', which is none of the 3 known; the nearest: 'cat'"),
        (
            [(0, ""), (-1, "cat")],
            None,
            r"sample 'k1' of x\.tar has the class 'cat' and no number; needed the class list",
        ),
        ([(1, "cat")], CATS, r"has label 1 and the class 'cat', which is number 0 by data\.classes"),
        ([(1, "cat"), (2, "cat")], None, r"'cat', which is number 1 by another sample"),
        ([(1, "")], (*CATS, "too many"), r"data\.classes: got 4 names for model\.num_classes = 3"),
    ],
)
def test_labels_that_a_model_cannot_take(labels: list[tuple[int, str]], classes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_labels(rows(*labels), classes, 3, lambda place: "x.tar")


def test_samples_without_a_label_beside_others_are_counted() -> None:
    assert check_labels(rows((0, ""), (-1, ""), (2, ""), (-1, "")), None, 3, lambda place: "x.tar") == 2
    assert check_labels(rows((-1, "dog"), (0, "cat")), CATS, 3, lambda place: "x.tar") == 0


def test_class_lists(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ntree frog\n")
    assert read_classes(str(tmp_path / "classes.txt")) == ("cat", "tree frog") == read_classes(("cat", "tree frog"))
    for given, message in (
        (("a", "a"), "'a' twice"),
        (("a", " "), "empty"),
        ((), "none at all"),
        ("no.txt", "not read"),
    ):
        with pytest.raises(ConfigError, match=f"data.classes: .*{message}"):
            read_classes(given)


def test_foreign_tars_give_labels(tmp_path: Path, write_tar: WriteTar) -> None:
    still = encode_image(np.zeros((8, 8, 3), dtype=np.uint8))
    members = {"a.png": still, "a.cls": b"4", "b.png": still, "b.json": b'{"label": "dog"}', "c.png": still}
    index_tar(write_tar(tmp_path / "x.tar", members))
    found = open_index(str(tmp_path / "x.tar")).entries
    assert [(row.label, row.class_name, sorted(row.members)) for row in found] == [
        (4, "", ["png"]),
        (-1, "dog", ["json", "png"]),
        (-1, "", ["png"]),
    ]


def test_manifests_and_shards_carry_classes(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(encode_image(np.full((8, 8, 3), ord(name), dtype=np.uint8)))
    (tmp_path / "m.csv").write_text("path,kind\na.png,dog\nb.png,cat\nc.png,\n")
    from ltd.data.records import Columns

    columns = Columns(label="kind")
    make_shards(tmp_path / "m.csv", tmp_path / "out", options=ShardOptions(), columns=columns)
    entries = open_index(str(tmp_path / "out" / "train")).entries
    assert [(row.label, row.class_name) for row in entries] == [(1, "dog"), (0, "cat"), (-1, "")]
    found = read_rows(tmp_path / "m.csv", None, columns)
    assert [row.label for row in number_classes(found, ("bird", "dog", "cat"))] == [1, 2, -1]
    with pytest.raises(ConfigError, match=r"m\.csv line 2: label: got the class 'dog'.*the nearest: 'dogs'"):
        number_classes(found, ("dogs", "cat"))
    (tmp_path / "m.jsonl").write_text('{"path": "a.png", "label": 1}\n{"path": "b.png", "label": "cat"}\n')
    with pytest.raises(ConfigError, match=r"m\.jsonl line 1: label: got the number 1, but other rows have names"):
        number_classes(read_rows(tmp_path / "m.jsonl"), None)
    with pytest.raises(ConfigError, match=r"line 1: label: got 1, needed less than 1"):
        number_classes(read_rows(tmp_path / "m.jsonl"), ("cat",))
    (tmp_path / "m.jsonl").write_text('{"path": "a.png", "label": [1]}\n')
    with pytest.raises(ConfigError, match=r"line 1: label: got \[1\], needed a class number"):
        read_rows(tmp_path / "m.jsonl")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [(0.5, 0.5), (0.1, 0.8), (1.0, 0.0)])
def test_the_cut_is_where_the_decoder_cut(crop: tuple[float, float], *, flip: bool) -> None:
    """Every pixel of the source tells its place; nothing is scaled along one axis, and left is as the model sees it."""
    y, x = np.mgrid[0:40, 0:60].astype(np.uint8)
    data = encode_image(np.stack([y * 4, x * 4, np.zeros_like(x)], axis=2))
    entry, view = Entry("k", "image", 60, 40, 1, 0.0), ViewConfig(num_frames=1, height=40, width=24)
    place = Placement(0, 1, crop, flip)
    frames = decode_cut(data, entry, view, place)
    height, width, top, left = geometry_of(entry, view, place)
    assert (height, width) == (40, 60)
    shown = frames[0, 0, 0] // 4
    assert shown[0] == top and shown[1] == (59 - left if flip else left)
    tall = ViewConfig(num_frames=1, height=16, width=60)
    frames = decode_cut(data, entry, tall, place)
    assert frames[0, 0, 0, 0] // 4 == geometry_of(entry, tall, place)[2]


def loaded(shards: Path, view: ViewConfig, **fields: Any) -> list[Batch]:
    config = DataConfig(shards=str(shards), global_batch=6, views=(view,), **fields)
    with build_loader(config, seed=1, global_rank=0, world_size=1) as loader:
        return [batches[0] for (batches, _), _ in zip(loader, range(4), strict=False)]  # type: ignore[misc]


def test_batches_of_media_carry_labels_and_cuts(toy: Path) -> None:
    index = {row.key: row for row in open_index(str(toy)).entries}
    for batch in loaded(toy, ViewConfig(num_frames=3, height=24, width=24)):
        assert batch.label is not None and batch.geometry is not None
        assert batch.label.tolist() == [index[key].label for key in batch.keys] == [int(k[3:]) % 8 for k in batch.keys]
        assert (batch.geometry[:, :2] == torch.tensor([40.0, 56.0])).all() and (batch.geometry[:, 2] == 0).all()
        assert len(set(batch.geometry[:, 3].tolist())) > 2 and (batch.geometry[:, 3] <= 34 - 24).all()
        part = batch.select([2, 0])
        assert part.label.tolist() == batch.label[[2, 0]].tolist()  # type: ignore[union-attr]


def test_the_cache_keeps_labels_and_cuts(tmp_path: Path, toy: Path) -> None:
    index = open_index(str(toy))
    windows = enumerate_windows(index, VIEWS, flip=True)
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    assert [row.label for row in cache.entries] == [window.entry.label for window in windows]
    chosen = np.arange(0, 26, 3)
    assert cache.load(chosen).geometry.tolist() == [list(windows[place].geometry) for place in chosen.tolist()]
    batch = loaded(tmp_path / "c", VIEWS[0])[0]
    by_key = {window.key: window for window in windows}
    assert batch.label is not None and batch.label.tolist() == [by_key[key].entry.label for key in batch.keys]
    names = [f"class {number}" for number in range(7, -1, -1)]
    config = DataConfig(shards=str(tmp_path / "c"), classes=tuple(names))
    assert open_sources(config).sources[0].entries.columns["label"].tolist() == cache.entries.columns["label"].tolist()


def old_cache(directory: Path) -> None:
    """Make of a cache what the release before wrote."""
    for name in ("manifest.json", "writing.json"):
        plain = json.loads((directory / name).read_text())
        assert plain.pop("format") == 3 and not plain.pop("text_parts")
        plain.pop("classes", None)
        (directory / name).write_text(json.dumps({"format": 2, **plain}))
    for name in ("label", "class_name", "source_height", "source_width", "crop_top", "crop_left"):
        (directory / "columns" / f"{name}.npy").unlink()


def test_a_cache_that_the_release_before_began_is_finished(tmp_path: Path, toy: Path) -> None:
    index = open_index(str(toy))
    windows = enumerate_windows(index, VIEWS)
    write(tmp_path / "c", index, windows, stop=9)
    marker, (part,) = tmp_path / "c" / "writing.json", (tmp_path / "c" / "parts").glob("*/records.jsonl")
    plain = json.loads(marker.read_text())
    assert plain.pop("format") == 3 and not plain.pop("text_parts")
    marker.write_text(json.dumps({"format": 2, **plain}))
    records = [json.loads(line) for line in part.read_text().splitlines()]
    new = ("label", "class", "geometry")
    part.write_text("".join(json.dumps({k: v for k, v in r.items() if k not in new}) + "\n" for r in records))
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    assert cache.manifest["format"] == 2 and cache.num_windows == len(windows)
    assert (cache.entries.columns["label"] == -1).all() and cache.load(np.arange(9)).geometry.isnan().all()


def test_a_cache_of_the_format_before_is_read_and_knows_no_labels(tmp_path: Path, toy: Path) -> None:
    index: Index = open_index(str(toy))
    windows = enumerate_windows(index, VIEWS)
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    now, digest = loaded(tmp_path / "c", VIEWS[0]), LatentCache(tmp_path / "c").manifest["identity"]
    old_cache(tmp_path / "c")
    before = loaded(tmp_path / "c", VIEWS[0])
    assert LatentCache(tmp_path / "c").manifest["identity"] == digest, "the order of samples stays"
    for ours, theirs in zip(now, before, strict=True):
        assert ours.keys == theirs.keys and torch.equal(ours.mean, theirs.mean)  # type: ignore[arg-type]
        assert theirs.label.tolist() == [-1] * 6 and theirs.geometry.isnan().all()  # type: ignore[union-attr]
    assert LatentCacheWriter(tmp_path / "c", identity(index), windows).complete, (
        "the job that made it has nothing to do"
    )
    with pytest.raises(ConfigError, match="none of the 37 samples of .*c has a label.*a latent cache is made again"):
        check_labels(LatentCache(tmp_path / "c").entries, None, 8, lambda place: str(tmp_path / "c"))
