"""Whole remote files in a folder of the machine: one download for all its processes, whatever dies meanwhile."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ltd.config import ConfigError
from ltd.data import node_cache
from ltd.data.store import ChangedError, ReadError, Store, StoreConfig
from tools.proofs._flaky_server import Fault, Faults, always, no_faults, scattered, sequence, serve

SIZE = 300_000
#: Processes that each read two files whole and print their hashes; forked, so that Python starts but once.
_READ_ALL = """
import glob, hashlib, os, sys, time
from ltd.data.store import Store, StoreConfig
folder, url, size, processes = sys.argv[1:]
children = []
for _ in range(int(processes)):
    children.append(os.fork())
    if children[-1] == 0:
        store = Store(StoreConfig(cache_dir=folder, backoff_s=0.01, timeout_s=5, chunk_mb=0.1))
        for name in ("0.tar", "1.tar"):
            data = b"".join(store.read(f"{url}/{name}", offset, 10_000) for offset in range(0, int(size), 10_000))
            os.write(1, (hashlib.sha256(data).hexdigest() + "\\n").encode())
        while len(glob.glob(folder + "/*.lock")) > 1 or glob.glob(folder + "/*.part"):
            time.sleep(0.01)  # the last reader is served before the file is whole
        os._exit(0)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    folder = tmp_path / "remote"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.tar").write_bytes(random.Random(number).randbytes(SIZE))
    return folder


def config_of(tmp_path: Path, **fields: object) -> StoreConfig:
    options = {"cache_dir": str(tmp_path / "cache"), "backoff_s": 0.001, "backoff_max_s": 0.01, "timeout_s": 0.5}
    return StoreConfig(**(options | {"chunk_mb": 0.05} | fields))


def kept(tmp_path: Path, ending: str = ".data") -> list[str]:
    return sorted(path.name[:5] for path in (tmp_path / "cache").iterdir() if path.name.endswith(ending))


def start(tmp_path: Path, url: str, processes: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _READ_ALL, str(tmp_path / "cache"), url, str(SIZE), str(processes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_four_processes_at_once_download_each_file_once(tmp_path: Path, remote: Path) -> None:
    faults = scattered([Fault(kind="drop", after_bytes=90_000), Fault(kind="status")], share=0.3, seed=1)
    with serve(remote, faults) as server:
        process = start(tmp_path, server.url, 4)
        hashes = process.communicate(timeout=60)[0].split()
        assert process.returncode == 0
        expected = [hashlib.sha256((remote / name).read_bytes()).hexdigest() for name in ("0.tar", "1.tar")]
        assert sorted(hashes) == sorted(expected * 4)
        assert len(server.faults()) > 1
        for name in ("/0.tar", "/1.tar"):
            # Each process learns the size of a file by its first byte.
            assert server.bytes_sent(name) == SIZE + 4
    assert kept(tmp_path) == ["0.tar", "1.tar"] and not kept(tmp_path, ".part")
    assert [path.name for path in (tmp_path / "cache").glob("*.lock")] == ["folder.lock"]


def test_threads_of_a_process_download_a_file_once(tmp_path: Path, remote: Path) -> None:
    data = (remote / "0.tar").read_bytes()
    with serve(remote) as server, ThreadPoolExecutor(8) as pool:
        store, url = Store(config_of(tmp_path)), f"{server.url}/0.tar"
        offsets = random.Random(0).choices(range(SIZE), k=200)
        assert list(pool.map(lambda n: store.read(url, n, 3000), offsets)) == [data[n : n + 3000] for n in offsets]
        assert server.bytes_sent() - sum(served.sent == 1 for served in server.requests()) == SIZE
        assert store.read(url, SIZE, 10) == b""


def test_a_killed_download_goes_on_at_its_last_byte(tmp_path: Path, remote: Path) -> None:
    with serve(remote, sequence(None, Fault(kind="slow", bytes_per_s=200_000))) as server:
        process = start(tmp_path, server.url, 1)
        folder, deadline = tmp_path / "cache", time.monotonic() + 30
        while not any(part.stat().st_size > 60_000 for part in folder.glob("*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (part,) = folder.glob("*.part")
        assert part.stat().st_size < SIZE
        length, asked = part.stat().st_size, len(server.requests())
        store = Store(config_of(tmp_path, chunk_mb=8.0))
        assert store.read(f"{server.url}/0.tar", 5, SIZE) == (remote / "0.tar").read_bytes()[5:]
        first, rest = server.requests()[asked:]
        assert (first.start, first.sent) == (0, 1)
        assert (rest.start, rest.sent) == (length, SIZE - length)


def test_readers_are_served_what_has_come_already(tmp_path: Path, remote: Path) -> None:
    with serve(remote, sequence(None, Fault(kind="slow", bytes_per_s=60_000))) as server:
        store, url = Store(config_of(tmp_path, chunk_mb=8.0, timeout_s=5.0)), f"{server.url}/0.tar"
        begin = time.monotonic()
        assert store.read(url, 10, 1000) == (remote / "0.tar").read_bytes()[10:1010]
        assert time.monotonic() - begin < 2  # the whole file takes 5 s
        assert kept(tmp_path) == [] and kept(tmp_path, ".part") == ["0.tar"]


def read_one(store: Store, url: str, number: int) -> None:
    store.read(f"{url}/{number}.tar", 0, 10)
    settle(store)


def settle(store: Store) -> None:
    """Wait for downloads: readers are served before they have ended."""
    deadline = time.monotonic() + 10
    while store._cache is not None and store._cache._jobs:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_least_recently_used_make_room(tmp_path: Path, remote: Path) -> None:
    limit = 2.5 * SIZE / 2**30
    with serve(remote) as server:
        store = Store(config_of(tmp_path, cache_gb=limit))
        for number, expected in ((0, "0"), (1, "01"), (0, "01"), (2, "02"), (3, "23")):
            read_one(store, server.url, number)
            assert [name[0] for name in kept(tmp_path)] == list(expected)
            time.sleep(0.02)  # file times have the grain of the clock tick


def test_what_is_being_read_is_not_removed(tmp_path: Path, remote: Path) -> None:
    with serve(remote) as server:
        store = Store(config_of(tmp_path, cache_gb=2.5 * SIZE / 2**30))
        read_one(store, server.url, 0)
        read_one(store, server.url, 1)
        oldest = next((tmp_path / "cache").glob("0.tar*.data"))
        with oldest.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # as a reader does
            read_one(store, server.url, 2)
            assert kept(tmp_path) == ["0.tar", "2.tar"]
            with next((tmp_path / "cache").glob("2.tar*.data")).open("rb") as other:
                fcntl.flock(other, fcntl.LOCK_SH)
                data = store.read(f"{server.url}/3.tar", 100, 50)  # no room can be made: past the folder
        assert data == (remote / "3.tar").read_bytes()[100:150]
        assert kept(tmp_path) == ["0.tar", "2.tar"] and kept(tmp_path, ".part") == []


def test_what_is_being_downloaded_counts_whole_and_stays(tmp_path: Path, remote: Path) -> None:
    faults: Faults = lambda path, number: Fault(kind="slow", bytes_per_s=150_000) if path == "/0.tar" else None  # noqa: E731
    with serve(remote, faults) as server:
        store = Store(config_of(tmp_path, cache_gb=1.5 * SIZE / 2**30, chunk_mb=8.0, timeout_s=5.0))
        store.read(f"{server.url}/0.tar", 0, 10)
        assert store.read(f"{server.url}/1.tar", 0, SIZE) == (remote / "1.tar").read_bytes()
        assert kept(tmp_path) == [] and kept(tmp_path, ".part") == ["0.tar"]
        assert store.read(f"{server.url}/0.tar", 0, SIZE) == (remote / "0.tar").read_bytes()


def test_leftovers_of_dead_processes_make_room(tmp_path: Path, remote: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    stem = f"9.tar-{'0' * 24}-{SIZE}"
    (cache / f"{stem}.part").write_bytes(bytes(SIZE - 1))
    (cache / f"{stem}.lock").touch()
    (cache / f"8.tar-{'0' * 24}-{SIZE}.lock").touch()
    (cache / "of someone else").write_bytes(bytes(SIZE))
    with serve(remote) as server:
        read_one(Store(config_of(tmp_path, cache_gb=1.5 * SIZE / 2**30)), server.url, 0)
    left = sorted(path.name for path in cache.iterdir() if not path.name.endswith(".data"))
    assert left == ["folder.lock", "of someone else"]


def test_a_file_larger_than_the_limit_is_refused_at_once(tmp_path: Path, remote: Path) -> None:
    with serve(remote) as server:
        for call in (lambda s, u: s.size(u), lambda s, u: s.read(u, 0, 10)):
            store = Store(config_of(tmp_path, cache_gb=1e-4))
            with pytest.raises(
                ConfigError, match=r"data.store.cache_gb: got 0.0001, needed at least 0.000279 for http"
            ):
                call(store, f"{server.url}/0.tar")
        assert server.bytes_sent() == 2  # the sizes


def test_a_changed_file_is_another_entry_and_never_mixed(tmp_path: Path, remote: Path) -> None:
    with serve(remote, sequence(None, None, Fault(kind="drop", after_bytes=100_000), None)) as server:
        url, path = f"{server.url}/0.tar", remote / "0.tar"
        old = Store(config_of(tmp_path, chunk_mb=8.0))
        assert old.size(url) == SIZE
        new_bytes = random.Random(9).randbytes(SIZE)
        path.write_bytes(new_bytes)
        with pytest.raises(ChangedError):
            old.read(url, 0, SIZE)
        assert kept(tmp_path) == kept(tmp_path, ".part") == []
        for data in (new_bytes, new_bytes[::-1]):
            path.write_bytes(data)
            store = Store(config_of(tmp_path))
            assert store.read(url, 0, SIZE) == data
            settle(store)
        assert kept(tmp_path) == ["0.tar", "0.tar"]


def test_a_file_of_the_wrong_size_is_fetched_again(
    tmp_path: Path, remote: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(remote) as server:
        store = Store(config_of(tmp_path))
        read_one(store, server.url, 0)
        os.truncate(next((tmp_path / "cache").glob("*.data")), 1000)
        read_one(store, server.url, 0)  # a range that is there all the same
        assert next((tmp_path / "cache").glob("*.data")).stat().st_size == SIZE
        assert store.read(f"{server.url}/0.tar", 0, SIZE) == (remote / "0.tar").read_bytes()
        assert len(server.requests()) == 1 + 2 * math.ceil(SIZE / store.config.chunk_bytes)
        assert "has 1000 bytes, needed 300000" in caplog.text
        part = Path(str(next((tmp_path / "cache").glob("*.data")))[: -len("data")] + "part")
        next((tmp_path / "cache").glob("*.data")).unlink()
        part.write_bytes(bytes(SIZE + 1))
        store = Store(config_of(tmp_path))
        read_one(store, server.url, 0)
        assert os.stat(str(part)[: -len("part")] + "data").st_size == SIZE
        assert "has 300001" not in caplog.text


def test_a_full_disk_is_read_past_with_one_warning(
    tmp_path: Path, remote: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serve(remote) as server, caplog.at_level(logging.WARNING):
        store = Store(config_of(tmp_path))
        read_one(store, server.url, 0)
        monkeypatch.setattr(node_cache, "_write", full)
        for number in (1, 2, 1):
            data = (remote / f"{number}.tar").read_bytes()
            assert store.read(f"{server.url}/{number}.tar", 500, 500) == data[500:1000]
        assert [message for message in caplog.messages if "is full" in message] == caplog.messages
        assert len(caplog.messages) == 1
        asked = len(server.requests())
        assert store.read(f"{server.url}/0.tar", 5, 5) == (remote / "0.tar").read_bytes()[5:10]
        assert len(server.requests()) == asked  # what is there is still served
    assert kept(tmp_path, ".part") == []


def test_a_holder_that_brings_nothing_is_not_waited_for(
    tmp_path: Path, remote: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(remote) as server:
        store, url = Store(config_of(tmp_path, timeout_s=0.2)), f"{server.url}/0.tar"
        size = store.size(url)
        entry = store._cache._entry(url, store._remote.identity(url))  # type: ignore[union-attr]
        with open(entry.lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert store.read(url, 3, 10) == (remote / "0.tar").read_bytes()[3:13]
        assert "has brought nothing" in caplog.text and size == SIZE


def test_permanent_errors_reach_every_reader(tmp_path: Path, remote: Path) -> None:
    later: Faults = lambda path, number: Fault(kind="status", status=403) if number else None  # noqa: E731
    with serve(remote, later) as server, ThreadPoolExecutor(4) as pool:
        store, url = Store(config_of(tmp_path)), f"{server.url}/0.tar"
        store.size(url)

        def read(_: int) -> str:
            with pytest.raises(ReadError) as caught:
                store.read(url, 0, 10)
            return str(caught.value)

        assert all("got 403" in message and url in message for message in pool.map(read, range(4)))
        with pytest.raises(FileNotFoundError):
            Store(config_of(tmp_path)).read(f"{server.url}/none.tar", 0, 10)


def test_a_cache_that_thrashes_is_warned_about(tmp_path: Path, remote: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(remote, no_faults) as server:
        store = Store(config_of(tmp_path, cache_gb=1.5 * SIZE / 2**30))
        for number in (0, 1, 0, 1):
            read_one(store, server.url, number)
    assert sum("is downloaded again, the node cache had no room" in message for message in caplog.messages) == 1


def test_a_file_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError, match="data.store.cache_dir: got .*, cannot be made"):
        Store(config_of(tmp_path))


def test_a_cached_read_equals_a_read_without_a_cache(tmp_path: Path, remote: Path) -> None:
    with serve(remote, always(Fault(kind="ignore_range"))) as server:
        cached, plain, url = Store(config_of(tmp_path)), Store(), f"{server.url}/3.tar"
        for offset, size in ((0, 1), (12_345, 100_000), (SIZE - 1, 5), (SIZE, 1), (SIZE + 7, 3), (4, 0)):
            assert cached.read(url, offset, size) == plain.read(url, offset, size)


def test_a_lock_file_that_its_holder_removed_is_no_lock(tmp_path: Path) -> None:
    path, acquired, release = str(tmp_path / "a.lock"), threading.Event(), threading.Event()

    def wait_for_it() -> None:
        with node_cache._locked(path, wait=True):
            acquired.set()
            release.wait(10)

    thread = threading.Thread(target=wait_for_it)
    with node_cache._locked(path) as held:
        assert held
        thread.start()
        assert not acquired.wait(0.1)
    assert acquired.wait(5)
    with node_cache._locked(path) as held:
        assert not held
    release.set()
    thread.join()
    assert not os.path.exists(path)


def test_a_file_that_changed_unseen_is_not_kept(tmp_path: Path) -> None:
    import fsspec

    system, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/0.tar"
    system.pipe_file(url, b"old")
    store = Store(config_of(tmp_path))
    assert store.size(url) == 3
    system.pipe_file(url, b"new")  # the protocol does not tell
    with pytest.raises(ChangedError):
        store.read(url, 0, 3)
        settle(store)
        store.read(url, 0, 3)
    assert kept(tmp_path) == []
