"""Files by path or URL, read at random: local ones directly, remote ones over the net or from a folder on this machine.

The only part of ``data`` that knows where tars lie. Knows nothing of what they hold.
"""

from __future__ import annotations

import glob
import os
import stat
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ltd.config import ConfigError
from ltd.data.node_cache import NodeCache
from ltd.data.remote import (
    ChangedError,
    Counters,
    ReadError,
    Remote,
    StoreConfig,
    is_remote,
    protocol_of,
    shown,
)
from ltd.data.transports import FilesystemTransport, Transports
from ltd.data.write import write_bytes

__all__ = ["ChangedError", "Counters", "ReadError", "Store", "StoreConfig", "is_remote"]

_MAX_OPEN_FILES = 64
_HTTP = ("http", "https")


class _Descriptor:
    """An open file that closes with its last reader, so that dropping it never takes it from under one."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        state = os.fstat(self.fd)
        self.version = _version(state)
        if stat.S_ISDIR(state.st_mode):
            raise IsADirectoryError(f"{path}: is a folder, needed a file")

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def _version(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


class _LocalFiles:
    """Local files, the last used kept open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        file = self._descriptor(path)
        data = os.pread(file.fd, size, offset)
        if len(data) in (0, size):
            return data
        pieces, got = [data], len(data)
        while got < size and (data := os.pread(file.fd, size - got, offset + got)):
            pieces.append(data)
            got += len(data)
        return b"".join(pieces)

    def _descriptor(self, path: str) -> _Descriptor:
        version = _version(os.stat(path))
        with self._lock:
            file = self._open.get(path)
            if file is not None and file.version == version:
                self._open.move_to_end(path)
                return file
        file = _Descriptor(path)
        with self._lock:
            self._open[path] = file
            self._open.move_to_end(path)
            while len(self._open) > _MAX_OPEN_FILES:
                self._open.popitem(last=False)
        return file


class Store:
    """Read files by path or URL; safe to use from threads.

    Args:
        config: How remote files are read and kept.
    """

    def __init__(self, config: StoreConfig = StoreConfig()) -> None:  # noqa: B008 (frozen)
        self.config = config
        self.counters = Counters()
        self._local = _LocalFiles()
        self._transports = Transports(config)
        self._remote = Remote(config, self.counters, self._transports.of)
        self._cache = NodeCache(config, self._remote) if config.cache_dir is not None else None

    def size(self, path: str) -> int:
        """Measure a file.

        Args:
            path: Path or URL.

        Returns:
            Bytes.

        Raises:
            FileNotFoundError: If it does not exist.
            ReadError: If it is remote and cannot be reached.
            ConfigError: If it is remote and larger than the node cache may grow.
        """
        if not is_remote(path):
            return os.stat(_local(path)).st_size
        identity = self._remote.identity(path)
        if self._cache is not None:
            self._cache.check_size(path, identity)
        return identity.size

    def exists(self, path: str) -> bool:
        """Tell whether a file (a local folder, too) exists."""
        if not is_remote(path):
            return os.path.exists(_local(path))
        try:
            self._remote.identity(path)
        except FileNotFoundError:
            return False
        return True

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Read a range.

        Args:
            path: Path or URL.
            offset: First byte.
            size: Bytes.

        Returns:
            Exactly ``size`` bytes, fewer only where the file ends.

        Raises:
            FileNotFoundError: If the file does not exist.
            ReadError: If it is remote and cannot be read, or changed since this store first saw it.
            ConfigError: If it is remote and larger than the node cache may grow.
        """
        if not is_remote(path):
            data = self._local.read(_local(path), offset, size)
        else:
            found = self._cache.read(path, offset, size) if self._cache is not None else None
            data = self._fetch(path, offset, offset + size) if found is None else found
        self.counters.add(bytes_read=len(data))
        return data

    def read_all(self, path: str) -> bytes:
        """Read a small file whole; it is not kept in the node cache.

        Args:
            path: Path or URL.

        Returns:
            Its bytes.

        Raises:
            FileNotFoundError: If it does not exist.
            ReadError: If it is remote and cannot be read.
        """
        data = self._fetch(path, 0, None) if is_remote(path) else Path(_local(path)).read_bytes()
        self.counters.add(bytes_read=len(data))
        return data

    def _fetch(self, path: str, start: int, stop: int | None) -> bytes:
        pieces: list[bytes] = []
        self._remote.fetch(path, start, stop, pieces.append)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, path: str, data: bytes) -> None:
        """Write a small file, such as an index, that appears whole or not at all.

        Args:
            path: Path or URL.
            data: Its bytes.

        Raises:
            ConfigError: If the protocol cannot write.
        """
        if not is_remote(path):
            write_bytes(Path(_local(path)), data)
            return
        if protocol_of(path) in _HTTP:
            raise ConfigError(f"{shown(path)}: http cannot write; make the file beside the local copy and upload it")
        self._filesystem(path).pipe_file(path, data)
        self._remote.forget(path)

    def find(self, pattern: str, suffix: str = ".tar") -> list[str]:
        """List the files that a folder, a glob or one path means.

        Args:
            pattern: Path or URL; http has no listing, so only whole URLs.
            suffix: Ending of the files taken from a folder.

        Returns:
            Paths, sorted; none if nothing is found.

        Raises:
            ConfigError: If the protocol cannot list and would have to.
        """
        if not is_remote(pattern):
            pattern = _local(pattern)
            if os.path.isdir(pattern):
                return sorted(str(path) for path in Path(pattern).iterdir() if path.name.endswith(suffix))
            if glob.has_magic(pattern):
                return sorted(glob.glob(pattern))
            return [pattern] if os.path.exists(pattern) else []
        if protocol_of(pattern) in _HTTP:
            path = urlsplit(pattern).path
            if "*" in path or "[" in path or path.endswith("/") or not path:
                raise ConfigError(
                    f"data.shards: got {shown(pattern)!r}: http has no listing; needed whole URLs, or a brace pattern "
                    f"such as {shown(pattern).rstrip('/').split('*')[0]}/{{000000..000127}}{suffix}"
                )
            return [pattern] if self.exists(pattern) else []
        system = self._filesystem(pattern)
        if glob.has_magic(pattern):
            names = system.glob(pattern)
        elif system.isdir(pattern):
            names = [name for name in system.ls(pattern, detail=False) if name.endswith(suffix)]
        else:
            return [pattern] if self.exists(pattern) else []
        return sorted(f"{protocol_of(pattern)}://{_bare(str(name))}" for name in names)

    def _filesystem(self, path: str) -> Any:
        transport = self._transports.of(path)
        assert isinstance(transport, FilesystemTransport)
        return transport.system


def _local(path: str) -> str:
    return unquote(urlsplit(path).path) if path.startswith("file://") else path


def _bare(name: str) -> str:
    return name.split("://", 1)[-1]
