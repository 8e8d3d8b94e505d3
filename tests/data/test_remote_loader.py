"""Training data over http: the same batches as from the disk, every byte fetched once, over a bad network too."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("urllib3", reason="reading over http needs the extra 'remote'")

from ltd.config import ConfigError
from ltd.data import Batch, DataConfig, ViewConfig, build_loader
from ltd.data.index import index_tar
from ltd.data.store import StoreConfig
from ltd.data.write import encode_image
from tools.proofs._flaky_server import Fault, FlakyServer, scattered, serve

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]
STILL = ViewConfig(num_frames=1, height=32, width=32)
SAMPLES, BATCH = 144, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tars of 24 noisy stills of about 28 kB."""
    from webdataset import TarWriter

    path, rng = tmp_path_factory.mktemp("served"), np.random.default_rng(0)
    for shard in range(6):
        with TarWriter(str(path / f"{shard}.tar"), encoder=False, mtime=0.0) as writer:
            for n in range(24):
                frame = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
                writer.write({"__key__": f"s{shard}_{n:02d}", "png": encode_image(frame), "txt": b"noise"})
        index_tar(path / f"{shard}.tar")
    return path


def read(shards: str, *, world: int, store: StoreConfig, workers: int = 0) -> dict[int, tuple[str, int]]:
    """Read one epoch on every rank: draw -> (key, sum of pixels). Workers would read into the next epoch."""
    config = DataConfig(
        shards=shards, views=(STILL,), global_batch=BATCH, open_shards=3, store=store, num_workers=workers
    )
    steps = SAMPLES // BATCH
    seen: dict[int, tuple[str, int]] = {}
    for rank in range(world):
        with build_loader(config, seed=0, global_rank=rank, world_size=world) as loader:
            for (batch,), info in itertools.islice(loader, steps):
                assert isinstance(batch, Batch) and batch.pixels is not None
                assert not info.bad, info.bad
                sums = batch.pixels.long().flatten(1).sum(1).tolist()
                seen.update(zip(batch.draws, zip(batch.keys, sums, strict=True), strict=True))
    return seen


def sent_over_used(server: FlakyServer, folder: Path) -> float:
    tars = [f"/{shard}.tar" for shard in range(6)]
    return sum(map(server.bytes_sent, tars)) / sum((folder / tar[1:]).stat().st_size for tar in tars)


@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("cached", [False, True])
def test_an_epoch_fetches_every_byte_once(folder: Path, tmp_path: Path, world: int, cached: bool) -> None:
    store = StoreConfig(cache_dir=str(tmp_path / "cache") if cached else None)
    with serve(folder) as server:
        seen = read(f"{server.url}/{{0..5}}.tar", world=world, store=store)
        assert 0.9 < sent_over_used(server, folder) <= 1.05
        if cached:  # another epoch comes from the disk
            before = server.bytes_sent()
            read(f"{server.url}/{{0..5}}.tar", world=1, store=store)
            assert server.bytes_sent("/0.tar") + server.bytes_sent("/1.tar") < before / 2
            assert sent_over_used(server, folder) <= 1.05
    assert seen == read(str(folder / "{0..5}.tar"), world=1, store=StoreConfig())
    assert len({key for key, _ in seen.values()}) == SAMPLES


@pytest.mark.parametrize("cached", [False, True])
def test_a_bad_network_changes_nothing(folder: Path, tmp_path: Path, cached: bool) -> None:
    faults = [
        Fault(kind="drop", after_bytes=5000),
        Fault(kind="reset", after_bytes=9000),
        Fault(kind="status", status=503),
        Fault(kind="status", status=403),
        Fault(kind="stall", after_bytes=2000),
    ]
    store = StoreConfig(
        cache_dir=str(tmp_path / "cache") if cached else None, backoff_s=0.01, timeout_s=0.3, chunk_mb=0.1
    )
    with serve(folder, scattered(faults, share=0.15, seed=1)) as server:
        seen = read(f"{server.url}/{{0..5}}.tar", world=2, store=store, workers=2)
        happened = {(fault.kind, fault.status) for fault in server.faults()}
    assert len(happened) >= 4, happened
    assert seen == read(str(folder / "{0..5}.tar"), world=1, store=StoreConfig())


def test_a_sample_that_cannot_be_fetched_keeps_its_slot(folder: Path) -> None:
    gone = Fault(kind="status", status=500)

    def faults(path: str, number: int) -> Fault | None:
        return gone if path == "/2.tar" and number >= 4 else None

    store = StoreConfig(retries=1, backoff_s=0.0)
    config: dict[str, Any] = {"views": (STILL,), "global_batch": BATCH, "store": store, "max_bad_fraction": 1.0}
    with serve(folder, faults) as server:
        data = DataConfig(shards=f"{server.url}/{{0..5}}.tar", **config)
        with build_loader(data, seed=0, global_rank=0, world_size=1) as loader:
            records = [bad for _, info in itertools.islice(loader, 6) for bad in info.bad]
        assert {(record.cause, record.shard) for record in records} == {("unreadable", f"{server.url}/2.tar")}
        assert len(records) > 15


def test_remote_shards_without_an_index_are_refused_with_the_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes((folder / "0.tar").read_bytes())
    with serve(tmp_path) as server:
        url = f"{server.url}/0.tar"
        with pytest.raises(
            ConfigError, match=f"{url} has no index .*run: python tools/make_shards.py --index-only {url}"
        ):
            read(url, world=1, store=StoreConfig())
        with pytest.raises(ConfigError, match="0.tar.index.npz: http cannot write"):
            index_tar(url)
        with pytest.raises(ConfigError, match="9.tar.*(no such path|does not exist)"):
            read(f"{server.url}/9.tar", world=1, store=StoreConfig())
