"""Proof: what is read over a bad network is what lies there, and costs little more than its bytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from ltd.data import Batch, DataConfig, ViewConfig, build_loader
from ltd.data.index import index_tar
from ltd.data.store import Store, StoreConfig
from ltd.data.write import encode_image
from tools.proofs._flaky_server import Fault, Faults, FlakyServer, no_faults, scattered, serve
from tools.proofs.table import Cell, Proof

NAME = "reading"
ROOT = Path(__file__).resolve().parents[2]
COLUMNS = [
    "how it is read",
    "fault",
    "requests",
    "faults",
    "retries",
    "bytes sent / bytes used",
    "limit",
    "all bytes equal",
]

_NUM_SHARDS, _SHARD_BYTES = 4, 4 * 2**20
_NUM_READS, _THREADS = 200, 4
_CHUNK_MB = 0.5
_SHARE = 0.2  # of the requests fail
_CONFIG = StoreConfig(backoff_s=0.002, backoff_max_s=0.02, timeout_s=0.3, chunk_mb=_CHUNK_MB)

#: Faults of one kind each, and the most bytes the server may send per byte used. Only what is lost on its way with a
#: broken connection, or sent by a server that knows no ranges, may come on top.
FAULTS: dict[str, tuple[list[Fault], float]] = {
    "none": ([], 1.001),
    "connection dropped": ([Fault(kind="drop", after_bytes=n) for n in (0, 20_000, 200_000)], 1.001),
    "connection reset": ([Fault(kind="reset", after_bytes=n) for n in (0, 20_000, 200_000)], 1.2),
    "stall": ([Fault(kind="stall", after_bytes=n) for n in (0, 20_000)], 1.001),
    "503": ([Fault(kind="status", status=503)], 1.001),
    "429 with Retry-After": ([Fault(kind="status", status=429, retry_after_s=0)], 1.001),
    "403": ([Fault(kind="status", status=403)], 1.001),
    "answer too short": ([Fault(kind="short", after_bytes=n) for n in (1, 20_000)], 1.001),
    "range ignored": ([Fault(kind="ignore_range")], 8.0),
    "all but the last one": (
        [
            Fault(kind="drop", after_bytes=20_000),
            Fault(kind="reset", after_bytes=20_000),
            Fault(kind="status", status=503),
            Fault(kind="status", status=429, retry_after_s=0),
            Fault(kind="short", after_bytes=20_000),
        ],
        1.2,
    ),
}


@dataclass(frozen=True)
class Found:
    """What one way of reading cost."""

    used: int  #: Bytes that were asked for.
    retries: int | None  #: Retries, where one process read.
    equal: bool  #: Whether all bytes were those of the files.


def make_files(folder: Path) -> dict[str, bytes]:
    """Write the files that are read; the same bytes each time."""
    files = {f"{n}.tar": random.Random(n).randbytes(_SHARD_BYTES) for n in range(_NUM_SHARDS)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


def faults_of(kind: str) -> Faults:
    """Return the faults of a row of ``FAULTS``."""
    faults, _ = FAULTS[kind]
    return scattered(faults, share=_SHARE, seed=0) if faults else no_faults


def row(way: str, kind: str, server: FlakyServer, found: Found, limit: float) -> tuple[list[Cell], list[str]]:
    """Write a row of the table.

    Args:
        way: How it was read.
        kind: Fault.
        server: Server that was read from; its log gives requests and bytes.
        found: What was read.
        limit: Most bytes sent per byte used.

    Returns:
        The row; the limits it misses.
    """
    ratio = server.bytes_sent() / found.used
    faults = len(server.faults())
    cells: list[Cell] = [way, kind, len(server.requests()), faults, found.retries]
    cells += [f"{ratio:.4f}", f"{limit:.3f}", found.equal]
    misses = [f"{way}, {kind}: {ratio:.4f} bytes sent per byte used, needed at most {limit}"] if ratio > limit else []
    if not found.equal:
        misses.append(f"{way}, {kind}: bytes differ")
    if kind != "none" and not faults:
        misses.append(f"{way}, {kind}: no fault happened")
    return cells, misses


def read_ranges(url: str, files: dict[str, bytes], config: StoreConfig = _CONFIG) -> Found:
    """Read ranges of random place and size with several threads of one store, and compare."""
    store, draw = Store(config), random.Random(1)
    names = sorted(files)
    reads = [(draw.choice(names), draw.randrange(_SHARD_BYTES), draw.randrange(1, 300_000)) for _ in range(_NUM_READS)]

    def read(item: tuple[str, int, int]) -> bool:
        name, offset, size = item
        return store.read(f"{url}/{name}", offset, size) == files[name][offset : offset + size]

    with ThreadPoolExecutor(_THREADS) as pool:
        equal = all(pool.map(read, reads))
    counted = store.counters.as_dict()
    return Found(counted["bytes_read"], counted["retries"], equal)


_PROCESSES = """
import hashlib, json, os, sys
from ltd.data.store import Store, StoreConfig
url, folder, processes, names, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), *map(json.loads, sys.argv[4:])
children = []
for number in range(processes):
    children.append(os.fork())
    if children[-1] == 0:
        store = Store(StoreConfig(cache_dir=folder, **options))
        for name in names[number % len(names):] + names[:number % len(names)]:
            size = store.size(f"{url}/{name}")
            data = b"".join(store.read(f"{url}/{name}", n, 50_000) for n in range(0, size, 50_000))
            os.write(1, f"{name} {hashlib.sha256(data).hexdigest()}\\n".encode())
        os._exit(0)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def start_processes(url: str, cache: Path, names: list[str], processes: int) -> subprocess.Popen[str]:
    """Start processes that each read all files whole through one node cache and print their hashes."""
    options = {"backoff_s": 0.002, "backoff_max_s": 0.02, "timeout_s": 2.0, "chunk_mb": _CHUNK_MB}
    arguments = [url, str(cache), str(processes), json.dumps(names), json.dumps(options)]
    command = [sys.executable, "-c", _PROCESSES, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


def read_by_processes(url: str, cache: Path, files: dict[str, bytes], processes: int) -> Found:
    """Let processes read all files through one node cache at once, and compare."""
    process = start_processes(url, cache, sorted(files), processes)
    lines = sorted(process.communicate(timeout=120)[0].split("\n")[:-1])
    expected = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in files.items()] * processes
    return Found(sum(map(len, files.values())), None, process.returncode == 0 and lines == sorted(expected))


def read_killed(server: FlakyServer, cache: Path, files: dict[str, bytes], kills: int) -> Found:
    """Kill a process while it downloads, several times, then let another finish."""
    total = sum(map(len, files.values()))
    for kill in range(1, kills + 1):
        process = start_processes(server.url, cache, sorted(files), 1)
        deadline = time.monotonic() + 60
        while server.bytes_sent() < total * kill / (kills + 1) and time.monotonic() < deadline:
            time.sleep(0.001)
        _kill_group(process)
    return read_by_processes(server.url, cache, files, 1)


def _kill_group(process: subprocess.Popen[Any]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


_EPOCH, _BATCH = 144, 24


def make_tars(folder: Path) -> tuple[str, ...]:
    """Write six indexed tars of 24 noisy stills of about 28 kB."""
    draw, names = np.random.default_rng(0), tuple(f"{shard}.tar" for shard in range(6))
    for name in names:
        with TarWriter(str(folder / name), encoder=False, mtime=0.0) as writer:
            for place in range(_EPOCH // 6):
                frame = draw.integers(0, 255, (96, 96, 3), dtype=np.uint8)
                writer.write({"__key__": f"{name[0]}_{place}", "png": encode_image(frame), "txt": b"noise"})
        index_tar(folder / name)
    return names


def load_epoch(shards: Sequence[str], world: int, store: StoreConfig) -> dict[int, tuple[str, int]]:
    """Load one epoch on every rank of a world: draw -> key and sum of pixels."""
    view = ViewConfig(num_frames=1, height=32, width=32)
    data = DataConfig(shards=tuple(shards), views=(view,), global_batch=_BATCH, open_shards=3, store=store)
    seen: dict[int, tuple[str, int]] = {}
    for rank in range(world):
        with build_loader(data, seed=0, global_rank=rank, world_size=world) as loader:
            for batches, _ in itertools.islice(loader, _EPOCH // _BATCH):
                for batch in batches:
                    assert isinstance(batch, Batch) and batch.pixels is not None
                    sums = batch.pixels.long().flatten(1).sum(1).tolist()
                    seen.update(zip(batch.draws, zip(batch.keys, sums, strict=True), strict=True))
    return seen


def loader_rows(scratch: Path) -> Iterator[tuple[list[Cell], list[str]]]:
    """Load an epoch over http at 1, 3 and 8 ranks, each rank with a store of its own; bytes used are whole tars."""
    folder = scratch / "tars"
    folder.mkdir()
    names = make_tars(folder)
    expected = load_epoch([str(folder / name) for name in names], 1, StoreConfig())
    used = sum((folder / name).stat().st_size for name in names)
    for cached, world in itertools.product((False, True), (1, 3, 8)):
        cache = str(scratch / f"loader-{world}") if cached else None
        with serve(folder) as server:
            found = load_epoch([f"{server.url}/{name}" for name in names], world, StoreConfig(cache_dir=cache))
            served = FlakyServer(server.url, [request for request in server.log if request.path.endswith(".tar")])
        way = f"loader, one epoch, {world} rank{'s' if world > 1 else ''}, {'node cache' if cached else 'ranges'}"
        yield row(way, "none", served, Found(used, None, found == expected), 1.05)


def measure() -> Proof:
    """Read over every fault, without and with a node cache."""
    logging.getLogger("ltd.data").setLevel(logging.ERROR)  # hundreds of retries are meant
    try:
        return _measure()
    finally:
        logging.getLogger("ltd.data").setLevel(logging.NOTSET)


def _measure() -> Proof:
    rows: list[list[Cell]] = []
    misses: list[str] = []

    def add(found_row: tuple[list[Cell], list[str]]) -> None:
        rows.append(found_row[0])
        misses.extend(found_row[1])

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "remote"
        folder.mkdir()
        files = make_files(folder)
        for kind, (_, limit) in FAULTS.items():
            with serve(folder, faults_of(kind)) as server:
                add(row("ranges, 4 threads", kind, server, read_ranges(server.url, files), limit))
        for processes, kind, limit in ((1, "none", 1.001), (4, "none", 1.001), (4, "connection dropped", 1.001)):
            with serve(folder, faults_of(kind)) as server:
                cache = Path(scratch) / f"cache-{processes}-{kind}"
                found = read_by_processes(server.url, cache, files, processes)
                add(row(f"node cache, {processes} process{'es' if processes > 1 else ''}", kind, server, found, limit))
        slow = Fault(kind="slow", bytes_per_s=8e6)
        with serve(folder, lambda path, number: slow) as server:
            found = read_killed(server, Path(scratch) / "cache-killed", files, kills=3)
            add(row("node cache, process killed 3 times", "slow server", server, found, 1.05))
        for loaded in loader_rows(Path(scratch)):
            add(loaded)
    return Proof("Data read over a bad network is whole and fetched once", COLUMNS, rows, misses, _notes())


def _notes() -> str:
    return (
        f"A server on this machine serves {_NUM_SHARDS} files of {_SHARD_BYTES // 2**20} MiB and fails {_SHARE:.0%} of "
        f"the requests in the way named, chosen by a seed. Ranges: {_NUM_READS} reads of up to 300 kB at random "
        "places. Node cache: every process reads every file whole, in pieces; bytes used are those of the files, once. "
        f"Loader: {_EPOCH} stills in six tars, global batch {_BATCH}, every rank with a store of its own; bytes used "
        "are those of the tars, headers and padding included, the indexes beside them left out. "
        "Requests, faults and bytes sent are the server's own count of what it handed to its sockets, so they hold "
        "what was lost on its way (reset) or thrown away (range ignored: whole files come for pieces of them). "
        f"`data.store`: timeout_s {_CONFIG.timeout_s}, chunk_mb {_CHUNK_MB}, back-off from {_CONFIG.backoff_s} s; the "
        "defaults are slower to give up."
    )
