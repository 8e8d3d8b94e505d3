"""A web server on this machine that fails on purpose: for the tests and the proofs of reading over a bad network.

Serves the files of a folder with ranges. Which request fails and how is a function of the path and of the number of the
request for it, so that a run can be repeated. Every request is logged with the bytes that were sent. Stops with its
``with`` block.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

_PIECE_BYTES = 64 * 1024

Kind = Literal["drop", "reset", "stall", "status", "ignore_range", "short", "slow", "no_size"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How one request fails."""

    #: drop: the connection ends after ``after_bytes``; reset: it breaks, and loses what is on its way; stall: nothing
    #: comes any more; status: ``status`` instead of the file; ignore_range: 200 and the whole file; short: a right
    #: answer to a shorter range; slow: ``bytes_per_s``; no_size: 200 without a length.
    kind: Kind
    after_bytes: int = 0  #: Bytes of the body sent before drop, reset and stall; bytes of a short answer.
    status: int = 503  #: Status of a ``status`` fault.
    retry_after_s: int | None = None  #: Retry-After of a ``status`` fault.
    bytes_per_s: float = 1e6  #: Rate of a ``slow`` answer.


#: Fault of the n-th request (from 0) for a path; None serves it.
Faults = Callable[[str, int], Fault | None]


def no_faults(path: str, number: int) -> Fault | None:
    """Serve everything."""
    return None


def sequence(*faults: Fault | None) -> Faults:
    """Let the first requests for each path fail one after another, and serve those after them."""
    return lambda path, number: faults[number] if number < len(faults) else None


def always(fault: Fault) -> Faults:
    """Let every request fail."""
    return lambda path, number: fault


def scattered(faults: Sequence[Fault], *, share: float, seed: int) -> Faults:
    """Let a share of the requests fail, each in one of the ways, chosen by the seed.

    Args:
        faults: The ways.
        share: Part of the requests, [0, 1].
        seed: Seed.

    Returns:
        The faults.
    """

    def fault(path: str, number: int) -> Fault | None:
        digest = hashlib.sha256(f"{seed} {path} {number}".encode()).digest()
        hit = int.from_bytes(digest[:4], "big") < share * 2**32
        return faults[digest[4] % len(faults)] if hit else None

    return fault


@dataclass
class Served:
    """One request as it was answered."""

    path: str  #: Path of the URL.
    number: int  #: How many requests for the path came before.
    start: int  #: First byte asked for.
    client: tuple[str, int] = ("", 0)  #: Address of the client, one per connection.
    status: int = 0  #: Status sent.
    sent: int = 0  #: Bytes of the body sent.
    fault: Fault | None = None  #: How it failed.


@dataclass
class FlakyServer:
    """A running server."""

    url: str  #: Of the folder, without a slash at the end.
    log: list[Served] = field(default_factory=list)  #: Requests in the order they came.

    def requests(self, path: str | None = None) -> list[Served]:
        """Return the requests for a path such as ``/a.tar``; None is all."""
        return [served for served in list(self.log) if path is None or served.path == path]

    def bytes_sent(self, path: str | None = None) -> int:
        """Count the bytes of bodies sent for a path; None is all."""
        return sum(served.sent for served in self.requests(path))

    def connections(self) -> int:
        """Count the connections that requests came on."""
        return len({served.client for served in self.requests()})

    def faults(self) -> list[Fault]:
        """Return the faults that happened."""
        return [served.fault for served in self.requests() if served.fault is not None]


@contextlib.contextmanager
def serve(folder: str | Path, faults: Faults = no_faults) -> Iterator[FlakyServer]:
    """Serve a folder until the block ends.

    Args:
        folder: The folder.
        faults: Which requests fail.

    Yields:
        The server.
    """
    stopping, lock = threading.Event(), threading.Lock()
    server = _Server(("127.0.0.1", 0), _Handler)
    running = FlakyServer(url=f"http://127.0.0.1:{server.server_address[1]}")
    server.folder, server.faults_of, server.running = Path(folder).resolve(), faults, running
    server.stopping, server.log_lock = stopping, lock
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    folder: Path
    faults_of: Faults
    running: FlakyServer
    stopping: threading.Event
    log_lock: threading.Lock

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written apart
    server: _Server

    def log_message(self, *args: object) -> None:
        """Log nothing to stderr."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(match.group(1)) if match else 0
        with self.server.log_lock:
            served = Served(path, len(self.server.running.requests(path)), start, self.client_address)
            fault = served.fault = self.server.faults_of(path, served.number)
            self.server.running.log.append(served)
        file = (self.server.folder / path.lstrip("/")).resolve()
        if fault is not None and fault.kind == "status":
            extra = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
            self._head(served, fault.status, {"Content-Length": "0", **extra})
            return
        if not file.is_relative_to(self.server.folder) or not file.is_file():
            self._head(served, 404, {"Content-Length": "0"})
            return
        state = file.stat()
        size = state.st_size
        head = {"ETag": f'"{state.st_mtime_ns:x}-{state.st_size:x}"'}
        if match is None or (fault is not None and fault.kind in ("ignore_range", "no_size")):
            length = {} if fault is not None and fault.kind == "no_size" else {"Content-Length": str(size)}
            self._head(served, 200, head | (length or {"Connection": "close"}))
            self._body(served, file.read_bytes(), fault)
            self.close_connection |= not length
        elif start >= size:
            self._head(served, 416, head | {"Content-Length": "0", "Content-Range": f"bytes */{size}"})
        else:
            stop = min(int(match.group(2) or size - 1) + 1, size)
            if fault is not None and fault.kind == "short":
                whole, stop = stop, min(stop, start + max(1, fault.after_bytes))
                served.fault = fault if stop < whole else None
            place = {"Content-Length": str(stop - start), "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
            self._head(served, 206, head | place)
            with file.open("rb") as opened:
                opened.seek(start)
                data = opened.read(stop - start)
            self._body(served, data, fault)

    def _head(self, served: Served, status: int, headers: dict[str, str]) -> None:
        served.status = status
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _body(self, served: Served, data: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else None
        if fault is not None and kind in ("drop", "reset", "stall"):
            # A request too small for its fault is served: the fault did not happen.
            if len(data) <= fault.after_bytes:
                served.fault = kind = None
            else:
                data = data[: fault.after_bytes]
        for begin in range(0, len(data), _PIECE_BYTES):
            piece = data[begin : begin + _PIECE_BYTES]
            served.sent += len(piece)  # before the client can know
            self.wfile.write(piece)
            if fault is not None and kind == "slow" and self.server.stopping.wait(len(piece) / fault.bytes_per_s):
                return
        if kind == "stall":
            self.server.stopping.wait()
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection |= kind in ("drop", "reset", "stall")
