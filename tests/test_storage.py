"""Storage: any range comes back from any layout of slices; damage is named; nothing half-written is visible."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from ltd import storage
from ltd.storage import Reader, Slice, StorageError


def write(directory: Path, cuts: list[int], tensors: dict[str, torch.Tensor]) -> None:
    with storage.atomic_directory(directory) as incomplete:
        bounds = [0, *cuts, max(t.numel() for t in tensors.values())]
        for rank, (start, stop) in enumerate(itertools.pairwise(bounds)):
            slices = [
                Slice("master", name, tuple(t.shape), start, t.flatten()[start:stop])
                for name, t in tensors.items()
                if start < t.numel()
            ]
            storage.write_shard(incomplete, f"rank-{rank:05d}", slices)
        storage.write_manifest(incomplete, {"step": 3})


def test_any_range_from_any_layout(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(5, 7), "b": torch.randn(35).bfloat16(), "c": torch.tensor(2.0)}
    for index, cuts in enumerate([[], [10], [1, 2, 34]]):
        directory = tmp_path / str(index)
        write(directory, cuts, tensors)
        reader = Reader(directory)
        full = reader.read_full("master")
        assert all(
            torch.equal(full[name], tensor) and full[name].dtype == tensor.dtype for name, tensor in tensors.items()
        )
        for start, stop in [(0, 35), (3, 4), (9, 31), (33, 35)]:
            assert torch.equal(
                reader.read("master", "a.weight", start, stop), tensors["a.weight"].flatten()[start:stop]
            )
        storage.verify(directory)


def test_missing_slice_and_damage_are_named(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    write(directory, [10], {"a": torch.randn(35)})
    with pytest.raises(StorageError, match="no tensor 'x' in group 'master'"):
        Reader(directory).read("master", "x")
    shard = directory / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(StorageError, match=r"rank-00001\.safetensors: checksum differs"):
        storage.verify(directory)
    (directory / "rank-00001.json").unlink()
    with pytest.raises(StorageError, match="elements 10 to 35 of master/a are in no shard"):
        Reader(directory).read("master", "a")


def test_failure_leaves_the_previous_directory(tmp_path: Path) -> None:
    path = tmp_path / "model"
    storage.save_model(path, {"w": torch.ones(2)}, {"kind": "x"})
    with pytest.raises(RuntimeError), storage.atomic_directory(path) as incomplete:
        (incomplete / "half").write_text("x")
        raise RuntimeError
    tensors, config = storage.load_model(path)
    assert torch.equal(tensors["w"], torch.ones(2)) and config["kind"] == "x"
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_latest_falls_back_to_the_newest_whole(tmp_path: Path) -> None:
    assert storage.latest_checkpoint(tmp_path) is None
    for step in (10, 20):
        write(storage.checkpoint_path(tmp_path, step), [], {"a": torch.randn(3)})
    (tmp_path / "checkpoints" / "step-00000030").mkdir()
    assert storage.latest_checkpoint(tmp_path) == storage.checkpoint_path(tmp_path, 20)
    storage.write_latest(tmp_path, storage.checkpoint_path(tmp_path, 10))
    assert storage.latest_checkpoint(tmp_path) == storage.checkpoint_path(tmp_path, 10)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", [], {"a": torch.randn(3)})
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(StorageError, match="format 99, this version of ltd reads 1"):
        Reader(tmp_path / "c")
