"""Whole remote files in a folder of this machine, each downloaded once for all its processes and threads.

For a file stands ``NAME-HASH-SIZE`` with an ending: ``.part`` while it downloads (its length says how far it is),
``.data`` once whole, ``.lock`` while a process works on it. Locks are ``flock``, which ends with its process. The hash
is of URL and version, so a file that changes remotely is another entry.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ltd.config import ConfigError
from ltd.data.remote import ChangedError, Identity, Remote, StoreConfig, shown

logger = logging.getLogger(__name__)

#: Seconds between looks at what another process downloads.
_POLL_S = 0.02
_NAME = re.compile(r".*-[0-9a-f]{24}-(\d+)\.(data|part|lock)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class _Entry:
    """A version of a file in the folder."""

    stem: str
    size: int

    @property
    def data(self) -> str:
        return self.stem + ".data"

    @property
    def part(self) -> str:
        return self.stem + ".part"

    @property
    def lock(self) -> str:
        return self.stem + ".lock"


class _Job:
    """A download that this process does or waits for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.whole = False
        self.error: BaseException | None = None


class NodeCache:
    """Read remote files through a folder of this machine.

    Args:
        config: Folder, limit and times; ``cache_dir`` is set.
        remote: Fetches what the folder lacks.

    Raises:
        ConfigError: If the folder cannot be written.
    """

    def __init__(self, config: StoreConfig, remote: Remote) -> None:
        assert config.cache_dir is not None
        self.folder, self.limit, self._remote = Path(config.cache_dir), round(config.cache_gb * 2**30), remote
        # A process that holds a lock and brings nothing for this long is not waited for.
        self._patience_s = config.timeout_s + config.backoff_max_s
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.store.cache_dir: got {config.cache_dir!r}, cannot be made ({error})") from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ConfigError(f"data.store.cache_dir: got {config.cache_dir!r}, needed a folder that can be written")
        self._jobs: dict[str, _Job] = {}
        self._jobs_lock = threading.Lock()
        self._downloaded: set[str] = set()
        self._disk_full = self._warned = False

    def check_size(self, path: str, identity: Identity) -> None:
        """Refuse a file that can never be kept.

        Args:
            path: The file.
            identity: Its version.

        Raises:
            ConfigError: If it is larger than the limit; gives the numbers.
        """
        if identity.size > self.limit:
            raise ConfigError(
                f"data.store.cache_gb: got {self.limit / 2**30:.3g}, needed at least {identity.size / 2**30:.3g} for "
                f"{shown(path)} alone ({identity.size:,} bytes)"
            )

    def read(self, path: str, offset: int, size: int) -> bytes | None:
        """Read a range, downloading the whole file first unless it is there or someone else does.

        Args:
            path: URL.
            offset: First byte.
            size: Bytes.

        Returns:
            Exactly ``size`` bytes, fewer only where the file ends; None if the folder cannot take the file now.

        Raises:
            FileNotFoundError: If the file does not exist.
            ReadError: If it cannot be downloaded.
            ConfigError: If it is larger than the limit.
        """
        identity = self._remote.identity(path)
        self.check_size(path, identity)
        entry, stop = self._entry(path, identity), min(offset + size, identity.size)
        if stop <= offset:
            return b""
        while True:
            data = self._read_whole(entry, offset, stop)
            if data is None:
                data = _read_part(entry, offset, stop)
            if data is not None:
                return data
            if self._disk_full:
                return None
            job = self._job(entry, path)
            if not job.done.wait(_POLL_S):
                continue
            if job.error is not None:
                raise job.error
            if not job.whole:
                return None

    def _entry(self, path: str, identity: Identity) -> _Entry:
        key = hashlib.sha256(f"{path}\0{identity.size}\0{identity.tag}".encode()).hexdigest()[:24]
        name = re.sub(r"[^A-Za-z0-9._]", "_", urlsplit(path).path.rpartition("/")[2])[-60:]
        return _Entry(str(self.folder / f"{name}-{key}-{identity.size}"), identity.size)

    def _read_whole(self, entry: _Entry, offset: int, stop: int) -> bytes | None:
        try:
            fd = os.open(entry.data, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # whoever makes room leaves it alone meanwhile
            if os.fstat(fd).st_size != entry.size:
                return None
            with contextlib.suppress(PermissionError):  # another user's
                os.utime(fd)
            return _pread(fd, offset, stop)
        except BlockingIOError:  # it is being removed
            return None
        finally:
            os.close(fd)

    def _job(self, entry: _Entry, path: str) -> _Job:
        with self._jobs_lock:
            job = self._jobs.get(entry.stem)
            if job is None:
                job = self._jobs[entry.stem] = _Job()
                # Its own thread, so that the reader that starts it is served as soon as its range is there, too.
                target, args = self._run, (job, entry, path)
                threading.Thread(target=target, args=args, name="ltd-node-cache", daemon=True).start()
            return job

    def _run(self, job: _Job, entry: _Entry, path: str) -> None:
        try:
            job.whole = self._obtain(entry, path)
        except BaseException as error:  # the readers raise it
            job.error = error
        finally:
            with self._jobs_lock:
                del self._jobs[entry.stem]
            job.done.set()

    def _obtain(self, entry: _Entry, path: str) -> bool:
        """Download a file, or wait until another process has; False if it cannot be had this way."""
        length, since = -1, time.monotonic()
        while True:
            with _locked(entry.lock) as held:
                if held:
                    return _is_whole(entry, path) or (self._make_room(entry) and self._download(entry, path))
            if _length(entry.data) == entry.size:
                return True
            now = _length(entry.part)
            if now != length:
                length, since = now, time.monotonic()
            elif time.monotonic() - since > self._patience_s:
                logger.warning(
                    "%s: the process that downloads it into %s has brought nothing for %.3g s; reading past it",
                    shown(path),
                    self.folder,
                    self._patience_s,
                )
                return False
            time.sleep(_POLL_S)

    def _download(self, entry: _Entry, path: str) -> bool:
        """Bring what is missing; the entry's lock is held."""
        if entry.stem in self._downloaded and not self._warned:
            self._warned = True
            logger.warning(
                "%s is downloaded again, the node cache had no room to keep it: raise data.store.cache_gb (%.3g) or "
                "lower data.open_shards",
                shown(path),
                self.limit / 2**30,
            )
        self._downloaded.add(entry.stem)
        try:
            with open(entry.part, "ab", buffering=0) as file:
                done = file.seek(0, os.SEEK_END)
                if done > entry.size:
                    done = file.truncate(0)
                if done:
                    logger.info("%s: going on with its download at byte %d of %d", shown(path), done, entry.size)
                self._remote.fetch(path, done, entry.size, lambda data: _write(file.fileno(), data))
                self._remote.confirm(path)
                os.fsync(file.fileno())
            with self._alone():  # else it might be seen under neither name by who counts the bytes
                os.rename(entry.part, entry.data)
        except ChangedError:
            Path(entry.part).unlink(missing_ok=True)
            raise
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._give_up(entry, error)
            return False
        return True

    def _give_up(self, entry: _Entry, error: OSError) -> None:
        Path(entry.part).unlink(missing_ok=True)
        if not self._disk_full:
            self._disk_full = True
            logger.warning(
                "data.store.cache_dir: %s is full (%s); what is not in it is read over the net from now on",
                self.folder,
                error.strerror,
            )

    def _make_room(self, entry: _Entry) -> bool:
        """Remove what was used longest ago until an entry fits, and mark its room as taken; False if it cannot fit."""
        try:
            with self._alone():
                used, idle = self._survey(entry)
                for _, path, size in sorted(idle):
                    if used + entry.size <= self.limit:
                        break
                    if _remove(path):
                        used -= size
                if used + entry.size > self.limit:
                    return False
                # Others count it whole from now on, by the size in its name.
                os.close(os.open(entry.part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._give_up(entry, error)
            return False
        return True

    def _alone(self) -> contextlib.AbstractContextManager[bool]:
        """Keep other processes from counting or making room meanwhile."""
        return _locked(str(self.folder / "folder.lock"), wait=True, keep=True)

    def _survey(self, entry: _Entry) -> tuple[int, list[tuple[int, str, int]]]:
        """Return the bytes taken by all others, and what of it may go: (time of last use, path, bytes)."""
        used, idle = 0, []
        for file in os.scandir(self.folder):
            match = _NAME.fullmatch(file.name)
            if match is None or file.path.startswith(entry.stem + "."):
                continue
            try:
                state = file.stat()
            except FileNotFoundError:  # finished or removed meanwhile
                continue
            if match.group(2) == "lock":
                with _locked(file.path):  # of a process that died; goes if it can be had
                    continue
            size = state.st_size
            if match.group(2) == "part":
                with _locked(file.path[: -len("part")] + "lock") as dead:
                    size = size if dead else int(match.group(1))
            used += size
            idle.append((state.st_mtime_ns, file.path, size))
        return used, idle


def _remove(path: str) -> bool:
    """Remove an entry unless it is in use."""
    if path.endswith(".part"):
        with _locked(path[: -len("part")] + "lock") as held:
            if held:
                Path(path).unlink(missing_ok=True)
            return held
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(path: str, *, wait: bool = False, keep: bool = False) -> Iterator[bool]:
    """Hold a lock file, or not: yields whether it is held. The file goes with the lock unless it is to be kept."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(fd)
            yield False
            return
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                break
        os.close(fd)  # whoever held it before removed it: this is no longer the file that others lock
    try:
        yield True
    finally:
        if not keep:
            os.unlink(path)
        os.close(fd)


def _is_whole(entry: _Entry, path: str) -> bool:
    length = _length(entry.data)
    if length not in (-1, entry.size):
        logger.warning("%s: has %d bytes, needed %d; fetching %s again", entry.data, length, entry.size, shown(path))
        os.unlink(entry.data)
    return length == entry.size


def _length(path: str) -> int:
    """Bytes of a file; -1 if there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


def _read_part(entry: _Entry, offset: int, stop: int) -> bytes | None:
    """Read a range that a download has passed already."""
    try:
        fd = os.open(entry.part, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # A longer one than the file is no download of it, and is begun anew.
        return _pread(fd, offset, stop) if stop <= os.fstat(fd).st_size <= entry.size else None
    finally:
        os.close(fd)


def _pread(fd: int, offset: int, stop: int) -> bytes | None:
    pieces = []
    while offset < stop:
        data = os.pread(fd, stop - offset, offset)
        if not data:
            return None
        pieces.append(data)
        offset += len(data)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
