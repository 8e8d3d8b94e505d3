"""How remote protocols are spoken: http(s) by urllib3, everything else (s3, gs, memory, ...) by fsspec.

One attempt each; ``ltd.data.remote`` repeats them. http does not go through fsspec: its client hands out no byte of a
body that breaks off, so that each drop would fetch the range anew. The only importer of urllib3 and fsspec.
"""

from __future__ import annotations

import email.utils
import logging
import os
import re
import threading
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from ltd.config import ConfigError
from ltd.data.remote import Identity, ReadError, RetryableError, StoreConfig, Transfer, Transport, protocol_of, shown

logger = logging.getLogger(__name__)

#: Most bytes taken from a socket at once.
_PIECE_BYTES = 1 << 18
_SMALL_BYTES = 1 << 16
#: Connections kept alive per server; more threads than this open short-lived ones.
_CONNECTIONS = 32
_REDIRECTS = 5
_INSTALL = "pip install 'ltd[remote]'"
#: Network errors of the libraries that fsspec's file systems speak through are no OSError.
_NETWORK_LIBRARIES = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "azure", "paramiko")
#: Fields of fsspec's ``info`` that name a version, best first.
_VERSION_FIELDS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
)


class Transports:
    """The transport of every protocol that is in use; safe to use from threads.

    Args:
        config: Times.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._config, self._lock = config, threading.Lock()
        self._made: dict[tuple[int, str], Transport] = {}

    def of(self, path: str) -> Transport:
        """Return the transport of a URL.

        Args:
            path: The URL.

        Returns:
            The transport.

        Raises:
            ConfigError: If a package it needs is missing; names the extra.
        """
        # A forked child must not speak on its parent's connections.
        key = (os.getpid(), protocol_of(path))
        with self._lock:
            if key not in self._made:
                http = key[1] in ("http", "https")
                self._made[key] = HttpTransport(self._config) if http else FilesystemTransport(key[1], self._config)
            return self._made[key]


class HttpTransport:
    """Ranges over http and https, on connections that are kept alive.

    Args:
        config: Times.
    """

    def __init__(self, config: StoreConfig) -> None:
        try:
            import urllib3
        except ImportError:
            raise ConfigError(f"data.shards: http needs urllib3, which is not installed: {_INSTALL}") from None
        self._urllib3 = urllib3
        self._pools: dict[str | None, Any] = {}
        self._lock = threading.Lock()
        self._ignored: set[str] = set()  # servers that were warned about
        self._options: dict[str, Any] = {
            "maxsize": _CONNECTIONS,
            "timeout": urllib3.Timeout(connect=config.timeout_s, read=config.timeout_s),
            # Redirects are followed; everything else is for the caller to repeat.
            "retries": urllib3.Retry(
                connect=0, read=0, status=0, other=0, redirect=_REDIRECTS, respect_retry_after_header=False
            ),
        }

    def fetch(self, transfer: Transfer) -> None:
        """See ``Transport``."""
        errors = self._urllib3.exceptions
        parts = urlsplit(transfer.path)
        headers = {"Accept-Encoding": "identity", "User-Agent": "ltd"}
        headers["Range"] = f"bytes={transfer.next}-{'' if transfer.stop is None else transfer.stop - 1}"
        if parts.username is not None:
            headers |= self._urllib3.make_headers(basic_auth=f"{parts.username}:{parts.password or ''}")
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        try:
            answer = self._pool(parts).request("GET", url, headers=headers, preload_content=False)
        except errors.LocationValueError as error:
            raise ReadError(f"{shown(transfer.path)}: no valid address ({error})") from None
        except errors.HTTPError as error:
            raise self._problem(getattr(error, "reason", None) or error) from error
        try:
            self._receive(answer, transfer)
        except errors.HTTPError as error:
            raise self._problem(error) from error
        finally:
            # A connection with an unread rest cannot be used again; the few words of an error are read for that.
            rest = answer.length_remaining
            if rest == 0 or (rest is not None and rest <= _SMALL_BYTES and answer.status >= 400):
                answer.drain_conn()
                answer.release_conn()
            else:
                answer.close()

    def identity_now(self, path: str) -> Identity | None:
        """See ``Transport``: every answer names its version, so there is nothing to ask."""
        return None

    def _pool(self, parts: Any) -> Any:
        host = parts.hostname or ""
        proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = (
                    self._urllib3.PoolManager(**self._options)
                    if proxy is None
                    else self._urllib3.ProxyManager(proxy, **self._options)
                )
            return self._pools[proxy]

    def _receive(self, answer: Any, transfer: Transfer) -> None:
        if answer.status not in (200, 206, 416):
            _raise_status(answer.status, answer.headers.get("Retry-After"), transfer.path)
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        first, size = self._place(answer, transfer)
        transfer.begin(Identity(size, tag))
        if answer.status == 416:
            if not transfer.complete:
                raise RetryableError("wrong_range", f"416 for bytes {transfer.next}-{transfer.stop} of {size}")
            return
        skip = transfer.next - first
        while data := answer.read1(_PIECE_BYTES, decode_content=False):
            skip = transfer.write(data, skip=skip)
            if transfer.complete:
                return

    def _place(self, answer: Any, transfer: Transfer) -> tuple[int, int]:
        """Return the first byte of an answer's body and the size of the whole file."""
        path, header = transfer.path, answer.headers.get("Content-Range", "")
        if answer.status == 200:
            self._warn_ignored(transfer)
            length = answer.headers.get("Content-Length", "")
            if not length.isdecimal():
                raise ReadError(f"{shown(path)}: the server names no size (Content-Length), which reading ranges needs")
            return 0, int(length)
        match = re.fullmatch(r"bytes\s+(?:(\d+)-\d+|\*)/(\d+)", header.strip())
        if match is None or (answer.status == 206 and match.group(1) is None):
            raise ReadError(f"{shown(path)}: got Content-Range {header!r} from the server, needed a range and the size")
        if match.group(1) is not None and int(match.group(1)) > transfer.next:
            raise RetryableError("wrong_range", f"range from {match.group(1)} instead of {transfer.next}")
        return int(match.group(1) or 0), int(match.group(2))

    def _warn_ignored(self, transfer: Transfer) -> None:
        server = urlsplit(transfer.path).netloc.rpartition("@")[2]
        # A whole file is a right answer to a request for all of it.
        if transfer.next > 0 and server not in self._ignored:
            self._ignored.add(server)
            logger.warning(
                "%s ignores ranges and sends whole files, of which most is thrown away; set data.store.cache_dir, "
                "which reads each file once",
                server,
            )

    def _problem(self, error: Any) -> RetryableError:
        errors = self._urllib3.exceptions
        if isinstance(error, errors.ReadTimeoutError):
            return RetryableError("stall", "no byte came in time")
        if isinstance(error, errors.NewConnectionError | errors.ConnectTimeoutError):
            return RetryableError("connect", f"no connection ({error})")
        # Its text repeats the causes; the first words say it.
        text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
        return RetryableError("dropped", f"the connection broke ({text})")


def _raise_status(status: int, retry_after: str | None, path: str) -> None:
    if status in (404, 410):
        raise FileNotFoundError(f"{shown(path)}: got {status}, there is no such file")
    if status in (401, 403):
        raise RetryableError("403", f"{status} (access denied: wrong or expired credentials, or throttled)")
    if status in (408, 425, 429) or status >= 500:
        raise RetryableError(str(status), f"{status}", _seconds(retry_after))
    raise ReadError(f"{shown(path)}: got {status}, needed 200 or 206")


def _seconds(retry_after: str | None) -> float:
    """Read a Retry-After header: seconds or a date; 0 for anything else."""
    if not retry_after:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


class FilesystemTransport:
    """Ranges of anything fsspec speaks.

    An attempt as a whole must end within ``timeout_s`` where the file system is asynchronous (s3, gs), else the file
    system's own time limits hold. The version of a file is asked for once, and again after every attempt that failed
    or came back short.

    Args:
        protocol: Scheme of the URLs.
        config: Times.
    """

    def __init__(self, protocol: str, config: StoreConfig) -> None:
        self._timeout_s = config.timeout_s
        self._doubted: set[str] = set()  # files whose last attempt failed
        try:
            import fsspec  # type: ignore[import-untyped, unused-ignore]

            #: The fsspec file system.
            self.system: Any = fsspec.filesystem(protocol, skip_instance_cache=True)
        except ImportError as error:
            message = f"data.shards: {protocol}:// needs a package that is not installed ({error}): {_INSTALL}"
            raise ConfigError(message) from None
        except ValueError as error:
            raise ConfigError(f"data.shards: got a {protocol}:// URL, which fsspec does not know ({error})") from None

    def fetch(self, transfer: Transfer) -> None:
        """See ``Transport``."""
        path = transfer.path
        try:
            if transfer.identity is None or path in self._doubted:
                transfer.begin(self._identify(path))
                self._doubted.discard(path)
            if transfer.complete:
                return
            data = self._cat(path, transfer.next, transfer.stop)
        except (FileNotFoundError, IsADirectoryError, ReadError):
            raise
        except Exception as error:
            self._doubted.add(path)
            raise _translate(error, path) from error
        transfer.write(data)
        if not transfer.complete:
            self._doubted.add(path)

    def _cat(self, path: str, start: int, stop: int | None) -> bytes:
        if not getattr(self.system, "async_impl", False):
            return bytes(self.system.cat_file(path, start=start, end=stop))
        from fsspec.asyn import sync  # type: ignore[import-untyped, unused-ignore]

        call = self.system._cat_file
        return bytes(sync(self.system.loop, call, path, start=start, end=stop, timeout=self._timeout_s))

    def identity_now(self, path: str) -> Identity | None:
        """See ``Transport``."""
        try:
            return self._identify(path)
        except (FileNotFoundError, IsADirectoryError):
            raise
        except Exception as error:
            raise _translate(error, path) from error

    def _identify(self, path: str) -> Identity:
        self.system.invalidate_cache()
        try:
            info = self.system.info(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{shown(path)}: there is no such file") from None
        if info.get("type") == "directory":
            raise IsADirectoryError(f"{shown(path)}: is a folder, needed a file")
        tag = next((str(info[name]) for name in _VERSION_FIELDS if info.get(name)), "")
        return Identity(int(info["size"]), tag)


def _translate(error: Exception, path: str) -> Exception:
    """Sort an error of a file system: may pass, or cannot."""
    status = getattr(error, "code", None) or getattr(error, "status", None)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, PermissionError) or status in (401, 403, "403"):
        return RetryableError("403", f"403 ({text})")
    if isinstance(error, TimeoutError) or type(error).__name__ == "FSTimeoutError":
        return RetryableError("stall", "no answer in time")
    if isinstance(error, ConnectionError):
        return RetryableError("dropped", f"the connection broke ({text})")
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK_LIBRARIES:
        return RetryableError("error", text)
    return ReadError(f"{shown(path)}: {protocol_of(path)} failed ({text})")
