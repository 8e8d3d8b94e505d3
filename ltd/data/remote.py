"""Ranges of remote files, whole whatever the network does: retries, resumption in mid-range, one version of each file.

Knows how to go on, not how a protocol is spoken: that is ``ltd.data.transports``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from ltd.config import ConfigError

logger = logging.getLogger(__name__)

#: An attempt that brought this many bytes is progress: it starts the count of attempts anew.
_PROGRESS_BYTES = 65536
#: 403 is retried this often: object stores answer it when they throttle or a token is renewed, but it may be meant.
_FORBIDDEN_RETRIES = 3
#: A retry is logged from this one of a row on; those before are counted only.
_LOGGED_FROM = 2


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How remote files are read and kept; local ones are simply read."""

    #: Folder on this machine, shared by its processes, that whole remote tars are kept in; null reads over the net.
    cache_dir: str | None = None
    cache_gb: float = 100.0  #: Limit of the folder, GiB, > 0; the least recently used tars make room.
    retries: int = 8  #: Attempts after the first that may bring nothing, in a row, >= 0; 403 gets at most 3.
    backoff_s: float = 0.5  #: Seconds before the first retry, >= 0; doubles with each.
    backoff_max_s: float = 30.0  #: Longest time between attempts, seconds; also bounds what a server asks for.
    timeout_s: float = 30.0  #: Seconds without a byte after which a connection counts as stalled, > 0.
    chunk_mb: float = 8.0  #: Bytes asked for at once, MiB, > 0; longer ranges take several requests.

    def __post_init__(self) -> None:
        for name in ("cache_gb", "timeout_s", "chunk_mb"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"data.store.{name}: got {getattr(self, name)}, needed a number above 0")
        if self.retries < 0:
            raise ConfigError(f"data.store.retries: got {self.retries}, needed an integer of 0 or more")
        if not 0 <= self.backoff_s <= self.backoff_max_s < float("inf"):
            raise ConfigError(
                f"data.store.backoff_s: got {self.backoff_s}, needed 0 or more and at most "
                f"data.store.backoff_max_s ({self.backoff_max_s})"
            )
        if self.cache_dir is not None and (not self.cache_dir or is_remote(self.cache_dir)):
            raise ConfigError(f"data.store.cache_dir: got {self.cache_dir!r}, needed a folder on this machine")

    @property
    def chunk_bytes(self) -> int:
        """Bytes asked for at once."""
        return max(1, round(self.chunk_mb * 2**20))


class ReadError(OSError):
    """A remote file that cannot be read, after all retries; says the address, what was got and how often."""


class ChangedError(ReadError):
    """A remote file that is not what it was when this process first saw it; its old and new bytes are never mixed."""


class RetryableError(Exception):
    """An attempt that failed in a way that may pass.

    Args:
        cause: One word, for the counters.
        message: What happened.
        delay_s: Seconds the server asked to wait.
    """

    def __init__(self, cause: str, message: str, delay_s: float = 0.0) -> None:
        super().__init__(message)
        self.cause, self.delay_s = cause, delay_s


class Counters:
    """What a store did so far; safe to use from threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes_fetched = 0  #: From remote files, what was thrown away included.
        self.bytes_read = 0  #: Handed out, local files included.
        self.requests = 0  #: Attempts to fetch something remote.
        self.causes: Counter[str] = Counter()  #: Retries by cause.

    def add(self, *, bytes_fetched: int = 0, bytes_read: int = 0, requests: int = 0) -> None:
        """Count up."""
        with self._lock:
            self.bytes_fetched += bytes_fetched
            self.bytes_read += bytes_read
            self.requests += requests

    def add_retry(self, cause: str) -> None:
        """Count a retry."""
        with self._lock:
            self.causes[cause] += 1

    @property
    def retries(self) -> int:
        """Retries of all causes."""
        with self._lock:
            return sum(self.causes.values())

    def as_dict(self) -> dict[str, int]:
        """Return all counts; ``retries/<cause>`` for each cause seen."""
        with self._lock:
            return {
                "bytes_fetched": self.bytes_fetched,
                "bytes_read": self.bytes_read,
                "requests": self.requests,
                "retries": sum(self.causes.values()),
                **{f"retries/{cause}": count for cause, count in sorted(self.causes.items())},
            }


def is_remote(path: str) -> bool:
    """Tell whether a path has a scheme other than ``file://``."""
    return "://" in path and not path.startswith("file://")


def protocol_of(path: str) -> str:
    """Name the scheme of a remote path, in lower case."""
    return path.split("://", 1)[0].lower()


def shown(path: str) -> str:
    """Write an address for messages: without user, password and query, which may be secret."""
    if not is_remote(path):
        return path
    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@dataclass(frozen=True)
class Identity:
    """What tells one version of a remote file from another."""

    size: int  #: Bytes.
    tag: str  #: ETag, or time of the last change; "" where the server names neither.


class Transfer:
    """A range on its way: what has come, what is missing, which version of the file it is of.

    Args:
        path: The file.
        start: First byte.
        stop: Byte after the last; None is the end of the file.
        identity: Version it must be of; None takes the first that comes.
        sink: Is handed the bytes in order; what it raises ends the transfer.
        counters: Counts.
    """

    def __init__(
        self,
        path: str,
        *,
        start: int,
        stop: int | None,
        identity: Identity | None,
        sink: Callable[[bytes], Any],
        counters: Counters,
    ) -> None:
        self.path, self.next, self.stop, self.identity = path, start, stop, identity
        self._sink, self._counters = sink, counters
        if identity is not None:
            self._clip(identity.size)

    def _clip(self, size: int) -> None:
        self.stop = size if self.stop is None else min(self.stop, size)

    @property
    def complete(self) -> bool:
        """Whether every byte has come."""
        return self.stop is not None and self.next >= self.stop

    def begin(self, identity: Identity) -> None:
        """Take note of the version an answer is of, before its bytes.

        Args:
            identity: The version.

        Raises:
            ChangedError: If it is another than that of earlier bytes.
        """
        if self.identity is None:
            self.identity = identity
            self._clip(identity.size)
        elif identity != self.identity:
            raise _changed(self.path, identity, self.identity)

    def write(self, data: bytes, *, skip: int = 0) -> int:
        """Hand over the bytes that come next.

        Args:
            data: Bytes as they came; what lies beyond the range is dropped.
            skip: Bytes before the range that still come first, and are dropped.

        Returns:
            Bytes that are still to be skipped.
        """
        self._counters.add(bytes_fetched=len(data))
        wanted = data[skip:] if skip else data
        if self.stop is not None and len(wanted) > self.stop - self.next:
            wanted = wanted[: self.stop - self.next]
        if wanted:
            self._sink(wanted)
            self.next += len(wanted)
        return max(0, skip - len(data))


def _changed(path: str, now: Identity, was: Identity) -> ChangedError:
    return ChangedError(
        f"{shown(path)}: changed while it was in use: got {now.size} bytes, version {now.tag or 'unknown'}, needed "
        f"{was.size} bytes, version {was.tag or 'unknown'}; start again once it is settled"
    )


class Transport(Protocol):
    """One attempt at a range, by one protocol."""

    def fetch(self, transfer: Transfer) -> None:
        """Bring what is missing of a range, or part of it.

        Args:
            transfer: The range; ``begin`` comes before the first ``write``.

        Raises:
            FileNotFoundError: If there is no such file.
            RetryableError: If the attempt failed in a way that may pass.
            ReadError: If it cannot succeed.
        """

    def identity_now(self, path: str) -> Identity | None:
        """Ask which version of a file there is now.

        Args:
            path: The file.

        Returns:
            The version; None if ``fetch`` sees it in every answer.

        Raises:
            FileNotFoundError: If there is no such file.
            RetryableError: If the attempt failed in a way that may pass.
        """


class Remote:
    """Ranges of remote files, with retries.

    Args:
        config: Retries and times.
        counters: Counts.
        transport_of: Transport of a path.
    """

    def __init__(self, config: StoreConfig, counters: Counters, transport_of: Callable[[str], Transport]) -> None:
        self.config, self.counters, self._transport_of = config, counters, transport_of
        self._identities: dict[str, Identity] = {}

    def identity(self, path: str) -> Identity:
        """Return the version of a file that this process reads; asks once.

        Args:
            path: The file.

        Returns:
            Size and version.

        Raises:
            FileNotFoundError: If it does not exist.
            ReadError: If it cannot be read.
        """
        if path not in self._identities:
            now = self._ask(path)
            if now is None:  # the first byte tells
                self._run(path, 0, 1, lambda _: None)
            else:
                self._identities.setdefault(path, now)
        return self._identities[path]

    def confirm(self, path: str) -> None:
        """Make sure that a file is still of the version whose bytes came.

        Args:
            path: The file.

        Raises:
            ChangedError: If it is not.
            ReadError: If it cannot be asked.
        """
        now = self._ask(path)
        if now is not None and now != self._identities.get(path, now):
            raise _changed(path, now, self._identities[path])

    def _ask(self, path: str) -> Identity | None:
        row: list[str] = []
        while True:
            try:
                return self._transport_of(path).identity_now(path)
            except RetryableError as error:
                self._wait(path, error, row)

    def forget(self, path: str) -> None:
        """Take the next version of a file that comes for the right one."""
        self._identities.pop(path, None)

    def fetch(self, path: str, start: int, stop: int | None, sink: Callable[[bytes], Any]) -> None:
        """Bring a range, in requests of at most ``chunk_mb``, each going on where the one before ended.

        Args:
            path: The file.
            start: First byte.
            stop: Byte after the last, which may lie beyond the end of the file; None is the end.
            sink: Is handed the bytes in order, each once; what it raises is raised.

        Raises:
            FileNotFoundError: If it does not exist.
            ReadError: If it cannot be read, or has changed since this process first saw it.
        """
        known = self._identities.get(path)
        end = stop if known is None else min(known.size, known.size if stop is None else stop)
        while end is None or start < end:
            upto = start + self.config.chunk_bytes if end is None else min(end, start + self.config.chunk_bytes)
            self._run(path, start, upto, sink)
            size = self._identities[path].size
            start, end = min(upto, size), size if end is None else min(end, size)

    def _run(self, path: str, start: int, stop: int, sink: Callable[[bytes], Any]) -> None:
        """Attempt one request's range until it is complete."""
        transfer = Transfer(
            path,
            start=start,
            stop=stop,
            identity=self._identities.get(path),
            sink=sink,
            counters=self.counters,
        )
        row: list[str] = []  # causes of the attempts since the last progress
        while True:
            before = transfer.next
            self.counters.add(requests=1)
            try:
                self._transport_of(path).fetch(transfer)
                problem = None if transfer.complete else RetryableError("short", "the answer was too short")
            except RetryableError as error:
                problem = error
            if transfer.identity is not None:
                self._identities.setdefault(path, transfer.identity)
            if problem is None:
                return
            if transfer.next - before >= _PROGRESS_BYTES:
                row.clear()
            self._wait(path, problem, row)

    def _wait(self, path: str, problem: RetryableError, row: list[str]) -> None:
        """Sleep before the next attempt, or give up."""
        config = self.config
        row.append(problem.cause)
        allowed = min(config.retries, _FORBIDDEN_RETRIES) if problem.cause == "403" else config.retries
        tries = row.count("403") if problem.cause == "403" else len(row)
        if tries > allowed:
            raise ReadError(
                f"{shown(path)}: got {problem}, gave up after {len(row)} attempts in a row that brought nothing "
                "(data.store.retries, data.store.timeout_s)"
            ) from problem
        self.counters.add_retry(problem.cause)
        delay_s = min(config.backoff_s * 2 ** min(len(row) - 1, 60), config.backoff_max_s)
        delay_s = max(delay_s, min(problem.delay_s, config.backoff_max_s))
        if len(row) >= _LOGGED_FROM:
            logger.warning("%s: %s; attempt %d in %.3g s", shown(path), problem, len(row) + 1, delay_s)
        time.sleep(delay_s)
