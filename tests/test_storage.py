"""Storage: any range comes back from any layout of slices; nothing half-written is visible; old formats are read."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltd import storage
from ltd.storage import Fill, Reader, Slice, StorageError, StorageWriteError, shards
from ltd.storage.tensor_file import DTYPES, TensorFileWriter


def write(directory: Path, cuts: list[int], tensors: dict[str, torch.Tensor], **manifest: Any) -> None:
    with storage.atomic_directory(directory) as incomplete:
        bounds = [0, *cuts, max(t.numel() for t in tensors.values())]
        for rank, (start, stop) in enumerate(itertools.pairwise(bounds)):
            slices = [
                Slice("master", name, tuple(t.shape), start, t.flatten()[start:stop])
                for name, t in tensors.items()
                if start < t.numel()
            ]
            storage.write_shard(incomplete, f"rank-{rank:05d}", slices)
        storage.write_manifest(incomplete, {"step": 3, **manifest})


def test_any_range_from_any_layout_and_chunk_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a.weight": torch.randn(500, 7), "b": torch.randn(3500).bfloat16(), "c": torch.tensor(2.0)}
    layouts = [[], [10], [1, 2, 3400], [1000, 2000, 3000]]
    for index, (cuts, chunk_bytes) in enumerate(itertools.product(layouts, (4096, 2**24))):
        monkeypatch.setattr(shards, "CHUNK_BYTES", chunk_bytes)
        directory = tmp_path / str(index)
        write(directory, cuts, tensors)
        reader = Reader(directory)
        full = reader.read_full("master")
        assert all(
            torch.equal(full[name], tensor) and full[name].dtype == tensor.dtype for name, tensor in tensors.items()
        )
        for start, stop in [(0, 3500), (3, 4), (9, 3100), (3300, 3500), (5, 5)]:
            for name in ("a.weight", "b"):
                assert torch.equal(reader.read("master", name, start, stop), tensors[name].flatten()[start:stop])
        storage.verify(directory)


def test_fills_go_into_other_dtypes_and_memory_formats_and_may_overlap(tmp_path: Path) -> None:
    image, steps = torch.randn(2, 3, 4, 5), torch.arange(10)
    write(tmp_path / "c", [7], {"image": image, "steps": steps})
    targets = {
        "format": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "dtype": torch.zeros(60, dtype=torch.float64),
        "again": torch.zeros(100),
    }
    steps_read = torch.zeros(5, dtype=torch.int64)
    fills = [
        Fill("master", "image", start, targets[key]) for key, start in (("format", 0), ("dtype", 60), ("again", 5))
    ]
    Reader(tmp_path / "c").fill([*fills, Fill("master", "steps", 4, steps_read)])
    assert torch.equal(targets["format"], image) and targets["format"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(targets["dtype"], image.flatten()[60:].double())
    assert torch.equal(targets["again"], image.flatten()[5:105])
    assert steps_read.tolist() == [4, 5, 6, 7, 8]


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 5), "y": torch.arange(7, dtype=torch.int8), "z": torch.randn(4).bfloat16()}
    write(tmp_path / "c", [], tensors)
    found = load_file(tmp_path / "c" / "rank-00000.safetensors")
    assert {key: value.dtype for key, value in found.items()} == {
        f"master/{name}@0": tensor.dtype for name, tensor in tensors.items()
    }
    assert all(torch.equal(found[f"master/{name}@0"], tensor.flatten()) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_streamed_files_are_what_the_library_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"one": torch.randint(0, 2, (3, 5)).to(dtype), "none": torch.zeros(0, 2), "point": torch.tensor(1.5)}
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    with TensorFileWriter(tmp_path / "file.safetensors", shapes) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        for name, value in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == value.dtype and found.shape == value.shape
            assert torch.equal(found.flatten().view(torch.uint8), value.flatten().view(torch.uint8))


def test_a_streamed_file_wants_every_tensor_as_announced(tmp_path: Path) -> None:
    shapes = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
    for steps, told in (
        ([("b", 3)], "not the next tensor, 'a' is"),
        ([("a", 3)], "needed torch.float32"),
        ([("a", 2)], "'b' was never written"),
    ):
        with pytest.raises(ValueError, match=told), TensorFileWriter(tmp_path / "f", shapes) as writer:
            for name, size in steps:
                writer.write(name, torch.zeros(size))


def test_failure_leaves_the_previous_directory(tmp_path: Path) -> None:
    path = tmp_path / "model"
    storage.save_model(path, {"w": torch.ones(2)}, {"kind": "x"})
    with pytest.raises(RuntimeError), storage.atomic_directory(path) as incomplete:
        (incomplete / "half").write_text("x")
        raise RuntimeError
    tensors, config = storage.load_model(path)
    assert torch.equal(tensors["w"], torch.ones(2)) and config["kind"] == "x"
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_everything_is_flushed_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    genuine, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        genuine(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    incomplete = storage.begin_directory(tmp_path / "c")
    storage.write_shard(incomplete, "rank", [Slice("master", "a", (3,), 0, torch.ones(3))])
    storage.write_manifest(incomplete, {})
    storage.commit_directory(tmp_path / "c")
    at = events.index("renamed")
    assert events.count("renamed") == 1 and events[at - 1] == "c.incomplete" and events[at + 1] == tmp_path.name
    flushed = [name.split(".")[0] + "." + name.split(".")[1] for name in events[:at]]
    assert {"rank.safetensors", "rank.json", "manifest.json"} <= set(flushed)


def test_a_file_too_large_says_what_it_needed(tmp_path: Path) -> None:
    """The kernel refuses the write itself, at a limit of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(StorageWriteError, match=r"rank\.safetensors: needed \d{7} bytes, \d+ are free .*too large"):
            storage.write_shard(tmp_path, "rank", [Slice("master", "a", (2**18,), 0, torch.ones(2**18))])
        with pytest.raises(StorageWriteError, match=r"model\.safetensors: needed \d{7} bytes"):
            storage.save_model(tmp_path / "model", {"a": torch.ones(2**18)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "model").exists()


def test_file_systems_without_direct_writes_are_written_through_the_cache(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip("no file system in memory")
    folder = memory / f"ltd-test-{os.getpid()}"
    folder.mkdir()
    try:
        write(folder / "c", [10], {"a": torch.arange(35.0)})
        assert Reader(folder / "c").read("master", "a").tolist() == list(range(35))
    finally:
        shutil.rmtree(folder)


def test_latest_falls_back_to_the_newest_whole(tmp_path: Path) -> None:
    assert storage.latest_checkpoint(tmp_path) is None
    for step in (10, 20):
        write(storage.checkpoint_path(tmp_path, step), [], {"a": torch.randn(3)})
    (tmp_path / "checkpoints" / "step-00000030").mkdir()
    assert storage.latest_checkpoint(tmp_path) == storage.checkpoint_path(tmp_path, 20)
    storage.write_latest(tmp_path, storage.checkpoint_path(tmp_path, 10))
    assert storage.latest_checkpoint(tmp_path) == storage.checkpoint_path(tmp_path, 10)


@pytest.mark.parametrize(
    ("last", "every", "removed"),
    [(None, None, []), (2, None, [10, 20, 30]), (1, 20, [10, 30]), (3, 20, [10]), (0, None, [10, 20, 30, 40])],
)
def test_what_is_kept(tmp_path: Path, last: int | None, every: int | None, removed: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        write(storage.checkpoint_path(tmp_path, step), [], {"a": torch.randn(3)})
    newest = storage.checkpoint_path(tmp_path, 50)
    expired = storage.expired(tmp_path, newest, keep_last=last, keep_every=every)
    assert [storage.checkpoint_step(path) for path in expired] == removed
    for path in expired:
        storage.remove_checkpoint(path)
    assert len(storage.checkpoints(tmp_path)) == 5 - len(removed)


def write_format_1(directory: Path, tensors: dict[str, dict[str, torch.Tensor]], config: dict[str, Any]) -> None:
    """What the first format was: one group ``ema``, one SHA-256 per file, no list of shards."""
    directory.mkdir(parents=True)
    for rank in (0, 1):
        flat, records = {}, {}
        for group, named in tensors.items():
            for name, value in named.items():
                start, stop = (0, 4) if rank == 0 else (4, value.numel())
                key = f"{group}/{name}@{start}"
                flat[key] = value.flatten()[start:stop].contiguous()
                records[key] = {"group": group, "name": name, "shape": list(value.shape), "start": start}
        file = directory / f"rank_{rank:05d}.safetensors"
        save_file(flat, file)
        record = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "slices": records}
        file.with_suffix(".json").write_text(json.dumps(record))
    manifest = {"format": 1, "step": 3, "optimizer_step": 3, "ema": "ema" in tensors, "config": config}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_format_1_is_read_and_left_as_it_is(tmp_path: Path) -> None:
    path = storage.checkpoint_path(tmp_path, 3)
    tensors = {group: {"w": torch.randn(3, 5), "b": torch.randn(9)} for group in ("master", "exp_avg", "ema")}
    config = {"kind": "denoiser", "model": {"width": 8}, "ema": {"decay": 0.999, "warmup": True}}
    write_format_1(path, tensors, config)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    reader = Reader(path)
    assert reader.groups() == {"master", "exp_avg", "ema_0.999"} and reader.averages() == ["ema_0.999"]
    assert reader.manifest["config"]["ema"] == {"decays": [0.999], "warmup": True}
    assert torch.equal(reader.read("ema_0.999", "w", 2, 11), tensors["ema"]["w"].flatten()[2:11])
    for weights, group in (("raw", "master"), ("ema", "ema"), ("ema_0.999", "ema")):
        found, found_config = storage.read_run(tmp_path, weights)
        assert all(torch.equal(found[name], value) for name, value in tensors[group].items())
        assert found_config["model"] == {"width": 8}
    storage.verify(path)
    digests = [json.loads(before[f"rank_0000{rank}.json"])["sha256"] for rank in (0, 1)]
    assert storage.fingerprint(path) == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert before == {file.name: file.read_bytes() for file in path.iterdir()}


def test_format_1_without_averages_and_with_damage(tmp_path: Path) -> None:
    config = {"kind": "x", "model": {}, "ema": {"decay": 0.9, "warmup": True}}
    path = storage.checkpoint_path(tmp_path, 3)
    write_format_1(path, {"master": {"w": torch.randn(9)}}, config)
    assert Reader(path).averages() == []
    with pytest.raises(StorageError, match="got 'ema', but .* holds raw$"):
        storage.read_run(tmp_path, "ema")
    shard = path / "rank_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(StorageError, match=r"rank_00001\.safetensors: checksum"):
        Reader(path).read("master", "w")


def test_newer_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", [], {"a": torch.randn(3)})
    manifest = tmp_path / "c" / "manifest.json"
    plain = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(plain | {"format": 99, "ltd": "7.1"}))
    told = "format 99, written by ltd 7.1; .* reads formats up to 2: install the version that wrote it, or a newer one"
    with pytest.raises(StorageError, match=told):
        Reader(tmp_path / "c")


def test_reads_and_writes_that_stop_early_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does above 2 GiB, and on some network file systems."""
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(shards, "CHUNK_BYTES", 2**16)

    def read_little(descriptor: int, buffers: list[memoryview], position: int) -> int:
        return preadv(descriptor, [buffers[0][:1000]], position)

    def write_little(descriptor: int, data: memoryview, position: int) -> int:
        return pwrite(descriptor, data[:8192], position)

    monkeypatch.setattr(os, "preadv", read_little)
    monkeypatch.setattr(os, "pwrite", write_little)
    tensor = torch.randn(50_000)
    write(tmp_path / "c", [20_000], {"a": tensor})
    assert torch.equal(Reader(tmp_path / "c").read("master", "a", 3, 49_000), tensor[3:49_000])


@pytest.mark.parametrize("chunk_bytes", [4096, 8192, 2**24])
def test_values_copied_while_writing_make_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", chunk_bytes)
    kinds = [(700, torch.float32), (0, torch.float32), (3000, torch.float64), (5, torch.int8), (4097, torch.bfloat16)]
    slices = [
        Slice(group, f"{size}", (size,), 0, torch.randn(size).mul(50).to(dtype))
        for group in ("master", "ema")
        for size, dtype in kinds
    ]
    image = storage.ShardImage(slices)
    for name, at_write in (("now", False), ("late", True), ("again", True)):
        image.fill(slices, at_write=at_write)
        storage.write_image(tmp_path, name, image)
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("now", "late", "again")]
    assert files[0] == files[1] == files[2]
    late = storage.ShardImage(slices)
    late.fill(slices, at_write=True)
    storage.write_image(tmp_path, "fresh", late)
    assert (tmp_path / "fresh.safetensors").read_bytes() == files[0]
    assert (tmp_path / "fresh.json").read_bytes() == (tmp_path / "now.json").read_bytes()
