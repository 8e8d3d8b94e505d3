"""Damaged checkpoints: every kind is named by file, and the older whole checkpoint beside it is offered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ltd import storage
from ltd.storage import Reader, Slice, StorageError, shards


def save(run_dir: Path, step: int) -> Path:
    path = storage.checkpoint_path(run_dir, step)
    with storage.atomic_directory(path) as incomplete:
        for rank in (0, 1):
            data = torch.full((3000,), float(step)) + torch.arange(3000.0) + rank
            names = ("a", "b")
            slices = [Slice("master", name, (2, 3000), rank * 3000, data) for name in names]
            storage.write_shard(incomplete, f"rank_{rank:05d}", slices)
        storage.write_manifest(incomplete, {"step": step})
    return path


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 4096)
    for step in (10, 20, 30):
        save(tmp_path, step)
    return tmp_path


def flip_byte(path: Path) -> None:
    data = bytearray((path / "rank_00001.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "rank_00001.safetensors").write_bytes(bytes(data))


def cut_shard(path: Path) -> None:
    file = path / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lengthen_shard(path: Path) -> None:
    file = path / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")


def remove_shard(path: Path) -> None:
    (path / "rank_00001.safetensors").unlink()


def remove_record(path: Path) -> None:
    (path / "rank_00001.json").unlink()


def cut_record(path: Path) -> None:
    file = path / "rank_00001.json"
    file.write_bytes(file.read_bytes()[:100])


def wrong_chunk_hash(path: Path) -> None:
    file = path / "rank_00001.json"
    record = json.loads(file.read_text())
    record["checksums"]["chunks"][1] = "0" * 32
    file.write_text(json.dumps(record))


def move_slice(path: Path) -> None:
    """Valid JSON that would put elements in the wrong place."""
    file = path / "rank_00001.json"
    file.write_text(file.read_text().replace('"start": 3000', '"start": 2999'))


def cut_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:50])


def change_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"step": 30', '"step": 31'))


def manifest_of_a_list(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def forget_shard(path: Path) -> None:
    """A manifest that lists less than was written, under a checksum of its own."""
    (path / "rank_00001.json").unlink()
    storage.write_manifest(path, {"step": 30})


DAMAGES: dict[Callable[[Path], None], str] = {
    flip_byte: r"rank_00001\.safetensors: checksum of bytes \d+ to \d+ differs",
    cut_shard: r"rank_00001\.safetensors: \d+ bytes, needed \d+",
    lengthen_shard: r"rank_00001\.safetensors: \d+ bytes, needed \d+",
    remove_shard: r"rank_00001\.safetensors: missing",
    remove_record: r"rank_00001\.json: missing",
    cut_record: r"rank_00001\.json: its checksum differs",
    wrong_chunk_hash: r"rank_00001\.json: its checksum differs",
    move_slice: r"rank_00001\.json: its checksum differs",
    cut_manifest: r"manifest\.json: cannot be read",
    change_manifest: r"manifest\.json: its checksum differs",
    manifest_of_a_list: r"manifest\.json: cannot be read",
    forget_shard: r"elements 3000 to 6000 of master/a are in no shard",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_the_older_whole_checkpoint_offered(run_dir: Path, damage: Callable[[Path], None]) -> None:
    newest = storage.checkpoint_path(run_dir, 30)
    damage(newest)
    remove_shard(storage.checkpoint_path(run_dir, 20))  # not whole either: the one before is offered
    with pytest.raises(StorageError, match=DAMAGES[damage]) as raised:
        Reader(newest).read_full("master")
    offered = storage.checkpoint_path(run_dir, 10)
    assert str(raised.value).endswith(f"resume={offered}, or fork={run_dir}@10")
    assert Reader(offered).read("master", "a", 0, 2).tolist() == [10.0, 11.0]


def test_where_none_is_left_that_is_said(run_dir: Path) -> None:
    oldest = storage.checkpoint_path(run_dir, 10)
    flip_byte(oldest)
    with pytest.raises(StorageError, match="there is no older whole one beside it"):
        storage.verify(oldest)


def test_a_read_checks_the_chunks_it_touches_and_verify_all(run_dir: Path) -> None:
    path = storage.checkpoint_path(run_dir, 30)
    flip_byte(path)
    reader = Reader(path)
    assert reader.read("master", "a", 3000, 3010).tolist() == [31.0 + i for i in range(10)]
    with pytest.raises(StorageError, match="checksum"):
        reader.read("master", "b", 5999, 6000)
    with pytest.raises(StorageError, match="checksum"):
        reader.read("master", "b", 5900, 5901)  # the same chunk, another element
    with pytest.raises(StorageError, match="checksum"):
        reader.verify()


def test_every_byte_of_every_file_counts(run_dir: Path) -> None:
    path = storage.checkpoint_path(run_dir, 30)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 23)):
            changed = bytearray(whole)
            changed[position] ^= 4
            file.write_bytes(bytes(changed))
            with pytest.raises(StorageError):
                storage.verify(path)
        file.write_bytes(whole)
    storage.verify(path)


def test_what_is_not_there_is_said_without_blaming_the_disk(run_dir: Path) -> None:
    reader = Reader(storage.checkpoint_path(run_dir, 30))
    with pytest.raises(StorageError, match="no tensor 'x' in group 'master'$"):
        reader.read("master", "x")
    with pytest.raises(StorageError, match="no group 'ema'; it holds master$"):
        reader.read_full("ema")


@pytest.mark.parametrize(
    ("file", "data", "told"),
    [
        ("config.yaml", b"a: [1", "cannot be read"),
        ("config.yaml", b"\xff\xfe\x00", "cannot be read"),
        ("config.yaml", b"- 1\n", "no format number"),
        ("config.yaml", b"format: 7\n", "format 7, this version of ltd reads 1"),
        ("model.safetensors", b"\x00" * 20, "damaged"),
    ],
)
def test_damaged_exports_are_named(tmp_path: Path, file: str, data: bytes, told: str) -> None:
    storage.save_model(tmp_path / "export", {"a": torch.ones(3)}, {"family": "x"})
    (tmp_path / "export" / file).write_bytes(data)
    with pytest.raises(StorageError, match=told):
        storage.load_model(tmp_path / "export")
