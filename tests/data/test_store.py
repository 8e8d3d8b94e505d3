"""Files read by path or URL: byte equality under every fault, and no byte fetched twice that was here already."""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ltd.config import ConfigError
from ltd.data.store import ChangedError, ReadError, Store, StoreConfig, is_remote
from tools.proofs._flaky_server import Fault, always, no_faults, scattered, sequence, serve

SIZE = 1_000_003
CONFIG = StoreConfig(backoff_s=0.001, backoff_max_s=0.01, timeout_s=0.3, chunk_mb=0.25)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "remote" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


def test_local_ranges_are_the_files_bytes_and_a_replaced_file_is_read_anew(shard: Path) -> None:
    store, data = Store(), shard.read_bytes()
    assert store.size(str(shard)) == SIZE
    assert store.read(str(shard), 7, 1000) == data[7:1007]
    assert store.read(f"file://{shard}", SIZE - 5, 100) == data[-5:]
    assert store.read(str(shard), SIZE + 1, 100) == b""
    replacement = shard.with_suffix(".new")
    replacement.write_bytes(data[::-1])
    os.replace(replacement, shard)
    assert store.read(str(shard), 7, 1000) == data[::-1][7:1007]
    assert store.counters.as_dict() == {"bytes_fetched": 0, "bytes_read": 2005, "requests": 0, "retries": 0}
    with pytest.raises(FileNotFoundError):
        store.read(str(shard.with_name("none.tar")), 0, 1)
    with pytest.raises(IsADirectoryError):
        store.read(str(shard.parent), 0, 1)


def test_many_local_files_are_read_by_threads_on_few_descriptors(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.tar" for number in range(150)]
    for number, path in enumerate(paths):
        path.write_bytes(number.to_bytes(2, "big") * 5000)
    store, before = Store(), len(os.listdir("/proc/self/fd"))

    def read(seed: int) -> bool:
        order = random.Random(seed).choices(range(150), k=1500)
        return all(store.read(str(paths[n]), 100, 2000) == n.to_bytes(2, "big") * 1000 for n in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    store = Store()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_find_lists_folders_globs_and_files(tmp_path: Path, shard: Path) -> None:
    for name in ("b.tar", "a.tar", "a.tar.index.json"):
        (tmp_path / name).touch()
    store = Store()
    a, b = str(tmp_path / "a.tar"), str(tmp_path / "b.tar")
    assert store.find(str(tmp_path)) == store.find(str(tmp_path / "?.tar")) == [a, b]
    assert store.find(a) == [a]
    assert store.find(str(tmp_path / "c.tar")) == []
    with serve(shard.parent) as server:
        assert store.find(f"{server.url}/0.tar") == [f"{server.url}/0.tar"]
        assert store.find(f"{server.url}/1.tar") == []
        for pattern in (f"{server.url}/*.tar", f"{server.url}/"):
            with pytest.raises(ConfigError, match="http has no listing; needed whole URLs, or a brace pattern such as"):
                store.find(pattern)


FAULTS = {
    "none": no_faults,
    "drop": sequence(None, *[Fault(kind="drop", after_bytes=100_000)] * 3),
    "reset": sequence(None, Fault(kind="reset", after_bytes=100_000), Fault(kind="reset")),
    "stall": sequence(None, Fault(kind="stall", after_bytes=100_000), Fault(kind="stall")),
    "503": sequence(*[Fault(kind="status", status=503)] * 4),
    "429": sequence(Fault(kind="status", status=429, retry_after_s=0)),
    "403": sequence(None, *[Fault(kind="status", status=403)] * 3),
    "short": sequence(None, *[Fault(kind="short", after_bytes=5000)] * 3),
    "ignore_range": sequence(*[Fault(kind="ignore_range")] * 100),
    "scattered": scattered(
        [
            Fault(kind="drop", after_bytes=30_000),
            Fault(kind="status"),
            Fault(kind="short", after_bytes=1),
            Fault(kind="reset"),
            Fault(kind="ignore_range"),
        ],
        share=0.5,
        seed=3,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_ranges_are_the_files_bytes_under_every_fault(shard: Path, name: str) -> None:
    data, store, draw = shard.read_bytes(), Store(CONFIG), random.Random(1)
    with serve(shard.parent, FAULTS[name]) as server:
        url = f"{server.url}/0.tar"
        assert store.size(url) == SIZE
        for _ in range(12):
            offset, size = draw.randrange(SIZE), draw.randrange(1, 400_000)
            assert store.read(url, offset, size) == data[offset : offset + size]
        assert store.read(url, SIZE - 3, 10) == data[-3:]
        assert store.read(url, SIZE, 10) == b""
        assert store.read_all(url) == data
        counted, retried = store.counters.as_dict(), [f for f in server.faults() if f.kind != "ignore_range"]
        assert counted["retries"] == len(retried)
        assert counted["requests"] == len(server.requests())
        if retried:
            assert name == "scattered" or counted[f"retries/{'dropped' if name in ('drop', 'reset') else name}"]
        if name in ("drop", "503", "429", "403", "short", "stall", "none"):
            assert server.bytes_sent() == counted["bytes_fetched"] == counted["bytes_read"] + 1  # one to learn the size


def test_a_read_that_drops_goes_on_where_its_bytes_ended(shard: Path) -> None:
    drops = [Fault(kind="drop", after_bytes=n) for n in (70_001, 0, 99_999)]
    with serve(shard.parent, sequence(*drops)) as server:
        store = Store(StoreConfig(backoff_s=0.001, timeout_s=5))
        assert store.read(f"{server.url}/0.tar", 300_000, 500_000) == shard.read_bytes()[300_000:800_000]
        asked = [(served.start, served.sent) for served in server.requests()]
        assert asked == [(300_000, 70_001), (370_001, 0), (370_001, 99_999), (470_000, 330_000)]
        assert store.counters.as_dict()["retries/dropped"] == 3


def test_progress_starts_the_count_of_attempts_anew(shard: Path) -> None:
    config = StoreConfig(retries=1, backoff_s=0.0, timeout_s=5)
    with serve(shard.parent, always(Fault(kind="drop", after_bytes=70_000))) as server:
        assert Store(config).read(f"{server.url}/0.tar", 0, SIZE) == shard.read_bytes()
    with (
        serve(shard.parent, always(Fault(kind="drop", after_bytes=700))) as server,
        pytest.raises(ReadError, match=r"the connection broke .* gave up after 2 attempts"),
    ):
        Store(config).read(f"{server.url}/0.tar", 0, SIZE)


def test_a_stall_is_noticed_after_timeout_s(shard: Path) -> None:
    with serve(shard.parent, sequence(Fault(kind="stall", after_bytes=10))) as server:
        begin = time.monotonic()
        assert Store(CONFIG).read(f"{server.url}/0.tar", 0, 100) == shard.read_bytes()[:100]
        assert 0.3 <= time.monotonic() - begin < 1.5


def test_a_slow_answer_is_no_stall(shard: Path) -> None:
    with serve(shard.parent, always(Fault(kind="slow", bytes_per_s=400_000))) as server:
        store = Store(CONFIG)  # 256 KiB take longer than timeout_s
        assert store.read(f"{server.url}/0.tar", 0, 262_144) == shard.read_bytes()[:262_144]
        assert store.counters.retries == 0


def test_retry_after_is_waited_for_up_to_backoff_max_s(shard: Path) -> None:
    for limit, low, high in ((5.0, 1.0, 2.0), (0.2, 0.2, 0.9)):
        with serve(shard.parent, sequence(Fault(kind="status", status=429, retry_after_s=1))) as server:
            begin = time.monotonic()
            Store(StoreConfig(backoff_s=0.0, backoff_max_s=limit)).read(f"{server.url}/0.tar", 0, 1)
            assert low <= time.monotonic() - begin < high


def test_what_cannot_succeed_says_why(shard: Path) -> None:
    url_of = "http://user:secret@{}/0.tar?token=secret"
    cases = [
        (403, 4, r"127.0.0.1:\d+/0.tar: got 403 .*gave up after 4 attempts"),
        (503, 9, r"127.0.0.1:\d+/0.tar: got 503, gave up after 9 attempts"),
        (400, 1, r"127.0.0.1:\d+/0.tar: got 400, needed 200 or 206"),
    ]
    for status, attempts, message in cases:
        with serve(shard.parent, always(Fault(kind="status", status=status))) as server:
            with pytest.raises(ReadError, match=message) as caught:
                Store(CONFIG).read(url_of.format(server.url.removeprefix("http://")), 0, 10)
            assert "secret" not in str(caught.value)
            assert len(server.requests()) == attempts
    with serve(shard.parent) as server:
        for call in (lambda s, u: s.read(u, 0, 1), lambda s, u: s.size(u), lambda s, u: s.read_all(u)):
            with pytest.raises(FileNotFoundError, match="/none.tar: got 404"):
                call(Store(CONFIG), f"{server.url}/none.tar")
        assert not Store(CONFIG).exists(f"{server.url}/none.tar")
        assert len(server.requests()) == 4
    with pytest.raises(ReadError, match="no connection"):
        Store(CONFIG).read(f"{server.url}/0.tar", 0, 1)  # the server is gone


def test_a_server_without_sizes_is_refused(shard: Path) -> None:
    with serve(shard.parent, always(Fault(kind="no_size"))) as server, pytest.raises(ReadError, match="names no size"):
        Store(CONFIG).read(f"{server.url}/0.tar", 0, 1)


def test_a_file_that_changes_is_refused_not_mixed(shard: Path) -> None:
    data = shard.read_bytes()
    with serve(shard.parent, sequence(None, Fault(kind="drop", after_bytes=1000))) as server:
        store, url = Store(StoreConfig(backoff_s=0.3, timeout_s=5)), f"{server.url}/0.tar"
        assert store.read(url, 0, 10) == data[:10]

        def change() -> None:
            while len(server.requests()) < 2:
                time.sleep(0.005)
            shard.write_bytes(data[::-1])  # the same size, after the first bytes of the range have gone out

        thread = threading.Thread(target=change)
        thread.start()
        with pytest.raises(ChangedError, match="changed while it was in use"):
            store.read(url, 0, 100_000)
        thread.join()
        with pytest.raises(ChangedError):
            store.read(url, 50, 10)
        assert Store(CONFIG).read(url, 50, 10) == data[::-1][50:60]


def test_a_server_that_ignores_ranges_is_warned_about_once(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(shard.parent, always(Fault(kind="ignore_range"))) as server, caplog.at_level(logging.WARNING):
        store = Store(CONFIG)
        for offset in (0, 500_000, 600_000):
            store.read(f"{server.url}/0.tar", offset, 10)
        assert [record for record in caplog.messages if "ignores ranges" in record] == caplog.messages[:1]
        assert len(caplog.messages) == 1


def test_connections_are_kept_alive_by_threads(shard: Path) -> None:
    data = shard.read_bytes()
    with serve(shard.parent) as server:
        store, url = Store(CONFIG), f"{server.url}/0.tar"

        def read(seed: int) -> bool:
            offset = random.Random(seed).randrange(SIZE - 5000)
            return store.read(url, offset, 5000) == data[offset : offset + 5000]

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(200)))
        assert server.connections() <= 4
        assert store.counters.as_dict() == {
            "bytes_fetched": 10**6,
            "bytes_read": 10**6,
            "requests": 200,
            "retries": 0,
        }


def test_any_fsspec_protocol_is_read_listed_and_written() -> None:
    folder, store = f"memory://{uuid.uuid4().hex}", Store(CONFIG)
    data = random.Random(2).randbytes(700_000)
    store.write(f"{folder}/b.tar", data)
    store.write(f"{folder}/a.tar", b"a")
    store.write(f"{folder}/a.tar.index.json", b"{}")
    found = store.find(folder)
    assert [path.rpartition("/")[2] for path in found] == ["a.tar", "b.tar"]
    assert found == store.find(f"{folder}/*.tar")
    assert store.find(f"{folder}/b.tar") == [f"{folder}/b.tar"]
    assert store.find(f"{folder}/c.tar") == []
    assert store.size(found[1]) == 700_000
    assert store.read(found[1], 100_000, 550_000) == data[100_000:650_000]
    assert store.read(found[1], 699_999, 10) == data[-1:]
    assert store.read_all(found[1]) == data
    assert store.counters.as_dict()["bytes_fetched"] == 550_000 + 1 + 700_000
    assert store.size(found[0]) == 1
    store.write(found[0], b"other")
    assert store.read(found[0], 1, 9) == b"ther"
    with pytest.raises(FileNotFoundError):
        store.read(f"{folder}/c.tar", 0, 1)
    with pytest.raises(ConfigError, match="http cannot write"):
        store.write("http://127.0.0.1/a.tar.index.json", b"")


class _Failing:
    """A file system whose reads fail in turn, as s3fs and gcsfs report it."""

    def __init__(self, data: bytes, *errors: Exception) -> None:
        self.data, self.errors, self.etag = data, list(errors), "1"

    def invalidate_cache(self) -> None:
        pass

    def info(self, path: str) -> dict[str, object]:
        return {"size": len(self.data), "ETag": self.etag, "type": "file"}

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        if self.errors:
            raise self.errors.pop(0)
        return self.data[start : min(end, start + 10)] if end - start > 10 else self.data[start:end]


def test_errors_of_file_systems_are_retried_by_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    system = _Failing(bytes(range(100)), PermissionError("Forbidden"), ConnectionResetError(), OSError("SlowDown"))
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **options: system)
    store = Store(StoreConfig(retries=12, backoff_s=0.0))
    assert store.read("s3://bucket/0.tar", 5, 40) == system.data[5:45]
    assert store.counters.causes == {"403": 1, "dropped": 1, "error": 1, "short": 3}
    system.errors, system.etag = [ConnectionResetError()], "2"
    with pytest.raises(ChangedError):
        store.read("s3://bucket/0.tar", 5, 5)
    system.errors = [PermissionError("Forbidden")] * 10
    with pytest.raises(ReadError, match=r"s3://bucket/1.tar: got 403 \(PermissionError: Forbidden\)"):
        store.read("s3://bucket/1.tar", 5, 5)


def test_a_file_system_that_hangs_is_given_up_after_timeout_s(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    import fsspec.asyn

    class Hanging(_Failing):
        async_impl, loop, calls = True, fsspec.asyn.get_loop(), 0

        async def _cat_file(self, path: str, start: int, end: int) -> bytes:
            self.calls += 1
            await asyncio.sleep(60 if self.calls == 1 else 0)
            return self.data[start:end]

    system = Hanging(bytes(range(100)))
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **options: system)
    store, begin = Store(CONFIG), time.monotonic()
    assert store.read("s3://bucket/0.tar", 5, 40) == system.data[5:45]
    assert store.counters.causes == {"stall": 1} and time.monotonic() - begin < 5


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, path in (("fsspec", "memory://a.tar"), ("urllib3", "http://127.0.0.1/a.tar"), ("s3fs", "s3://b/a.tar")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=r"pip install 'ltd\[remote\]'"):
            Store().read(path, 0, 1)
    with pytest.raises(ConfigError, match="nonsense://"):
        monkeypatch.undo()
        Store().read("nonsense://b/a.tar", 0, 1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cache_gb", 0.0, "data.store.cache_gb: got 0.0, needed a number above 0"),
        ("timeout_s", -1.0, "data.store.timeout_s: got -1.0, needed a number above 0"),
        ("chunk_mb", float("inf"), "data.store.chunk_mb: got inf, needed a number above 0"),
        ("retries", -1, "data.store.retries: got -1, needed an integer of 0 or more"),
        (
            "backoff_s",
            31.0,
            "data.store.backoff_s: got 31.0, needed 0 or more and at most data.store.backoff_max_s (30.0)",
        ),
        ("cache_dir", "s3://a", "data.store.cache_dir: got 's3://a', needed a folder on this machine"),
    ],
)
def test_wrong_settings_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StoreConfig(**{field: value})
    assert str(caught.value) == message


def test_is_remote() -> None:
    assert [is_remote(path) for path in ("s3://a/b", "http://a", "file:///a", "/a/b", "a.tar")] == [
        True,
        True,
        False,
        False,
        False,
    ]
