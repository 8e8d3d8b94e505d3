"""Checksums per chunk of a file, and reads that check them: any range goes straight into place, verified on the way.

A file is hashed in pieces, so that a reader verifies what it reads and no more: a chunk of which it needs a part is
read whole, the rest of it into scratch memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ltd.storage.errors import StorageError

CHUNK_BYTES = 16 * 2**20
"""Bytes per checksum."""

#: Hash of new files: 128 bits, not cryptographic, as fast as memory.
KIND = "xxh3_128"
_HASHES: dict[str, Callable[[], Any]] = {KIND: xxhash.xxh3_128, "sha256": hashlib.sha256}
#: Bytes and buffers per system call: what was just read is hashed while it is in the cache; Linux takes 1024 buffers.
_PIECE_BYTES = 2**20
_MAX_BUFFERS = 1000
#: Files read side by side.
_READERS = 4


@dataclass(frozen=True)
class Checksums:
    """Hashes of a file's chunks, in order."""

    kind: str
    chunk_bytes: int
    chunks: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        """Turn into what a record holds."""
        return {"kind": self.kind, "chunk_bytes": self.chunk_bytes, "chunks": list(self.chunks)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Checksums:
        """Read what ``to_plain`` made; a kind that this version does not know is a ``KeyError``."""
        _HASHES[plain["kind"]]
        return cls(plain["kind"], int(plain["chunk_bytes"]), tuple(plain["chunks"]))


def digest(data: bytes | memoryview) -> str:
    """Hash bytes the way chunks are; 32 hex digits."""
    return xxhash.xxh3_128(data).hexdigest()


@dataclass(frozen=True)
class Span:
    """Bytes of a file from ``start`` on, and the writable memory that takes them."""

    start: int
    memory: memoryview

    @property
    def stop(self) -> int:
        """End in the file."""
        return self.start + self.memory.nbytes


class CheckedFile:
    """A file that is read in verified chunks.

    Args:
        path: The file.
        num_bytes: Its size.
        checksums: Of all its bytes.
    """

    def __init__(self, path: Path, num_bytes: int, checksums: Checksums) -> None:
        self.path, self.num_bytes, self.checksums = path, num_bytes, checksums

    def jobs(self, spans: Iterable[Span]) -> list[tuple[CheckedFile, int, list[Span]]]:
        """Sort spans by the chunks they need.

        Args:
            spans: Memory to fill; may overlap in the file.

        Returns:
            ``(file, chunk, parts)``: parts are in order and lie within the chunk.
        """
        size = self.checksums.chunk_bytes
        found: list[tuple[CheckedFile, int, list[Span]]] = []
        waiting = sorted(spans, key=lambda span: span.start)
        while waiting:
            by_chunk: dict[int, list[Span]] = {}
            again: list[Span] = []
            position = 0
            for span in waiting:
                if span.start < position:  # the same bytes are wanted twice: read twice
                    again.append(span)
                    continue
                position = span.stop
                for chunk in range(span.start // size, -(-span.stop // size)):
                    first, last = max(span.start, chunk * size), min(span.stop, (chunk + 1) * size)
                    part = Span(first, span.memory[first - span.start : last - span.start])
                    by_chunk.setdefault(chunk, []).append(part)
            found += [(self, chunk, parts) for chunk, parts in by_chunk.items()]
            waiting = again
        return found

    def all_jobs(self) -> list[tuple[CheckedFile, int, list[Span]]]:
        """List every chunk, to be verified and thrown away."""
        return [(self, chunk, []) for chunk in range(len(self.checksums.chunks))]

    def read(self, descriptor: int, chunk: int, parts: Sequence[Span]) -> None:
        """Read a chunk and compare its hash.

        Args:
            descriptor: The open file.
            chunk: Index of the chunk.
            parts: Memory to fill, in order, within the chunk.

        Raises:
            StorageError: If the chunk's bytes are not those that were written.
        """
        first = chunk * self.checksums.chunk_bytes
        last = min(first + self.checksums.chunk_bytes, self.num_bytes)
        hasher = _HASHES[self.checksums.kind]()
        position = first
        for buffers in _batches(_buffers(first, last, parts)):
            wanted = sum(buffer.nbytes for buffer in buffers)
            try:
                self._read_all(descriptor, buffers, position, wanted)
            except OSError as error:
                raise StorageError(f"{self.path}: cannot be read at byte {position} ({error.strerror})") from error
            for buffer in buffers:
                hasher.update(buffer)
            position += wanted
        if chunk >= len(self.checksums.chunks) or hasher.hexdigest() != self.checksums.chunks[chunk]:
            raise StorageError(f"{self.path}: checksum of bytes {first} to {last} differs from what was written")

    def _read_all(self, descriptor: int, buffers: list[memoryview], position: int, wanted: int) -> None:
        done = os.preadv(descriptor, buffers, position)
        while done < wanted:
            rest = _after(buffers, done)
            got = os.preadv(descriptor, rest, position + done)
            if got == 0:
                raise StorageError(f"{self.path}: ends at byte {position + done}, needed {self.num_bytes}")
            done += got


def read_chunks(jobs: Sequence[tuple[CheckedFile, int, list[Span]]]) -> None:
    """Read and verify chunks, each file from its beginning to its end, several files at a time.

    Args:
        jobs: What ``CheckedFile.jobs`` made, of any number of files.

    Raises:
        StorageError: If a file is missing or damaged; of the first one found.
    """
    by_file: dict[CheckedFile, list[tuple[int, list[Span]]]] = {}
    for file, chunk, parts in jobs:
        by_file.setdefault(file, []).append((chunk, parts))
    if len(by_file) <= 1:
        for file, wanted in by_file.items():
            _read_file(file, wanted)
        return
    with ThreadPoolExecutor(max_workers=min(_READERS, len(by_file))) as pool:
        try:
            for future in [pool.submit(_read_file, file, wanted) for file, wanted in by_file.items()]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read_file(file: CheckedFile, wanted: list[tuple[int, list[Span]]]) -> None:
    """Read chunks of one file in order, which lets the kernel read ahead of the hashing."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"{file.path}: cannot be opened ({error.strerror})") from error
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for chunk, parts in sorted(wanted, key=lambda job: job[0]):
            file.read(descriptor, chunk, parts)
    finally:
        os.close(descriptor)


def _buffers(first: int, last: int, parts: Sequence[Span]) -> Iterable[memoryview]:
    """Cover the bytes from first to last: the parts' own memory, and scratch between them."""
    scratch: memoryview | None = None
    position = first
    for part in [*parts, Span(last, memoryview(b""))]:
        while position < part.start:
            scratch = scratch or memoryview(bytearray(min(_PIECE_BYTES, last - first)))
            piece = scratch[: min(len(scratch), part.start - position)]
            position += piece.nbytes
            yield piece
        for begin in range(0, part.memory.nbytes, _PIECE_BYTES):
            yield part.memory[begin : begin + _PIECE_BYTES]
        position = part.stop


def _batches(buffers: Iterable[memoryview]) -> Iterable[list[memoryview]]:
    """Group buffers for one system call each; scratch memory is hashed before it is filled anew."""
    batch: list[memoryview] = []
    num_bytes, has_scratch = 0, False
    for buffer in buffers:
        is_scratch = isinstance(buffer.obj, bytearray)
        full = len(batch) == _MAX_BUFFERS or num_bytes + buffer.nbytes > _PIECE_BYTES
        if batch and (full or (is_scratch and has_scratch)):
            yield batch
            batch, num_bytes, has_scratch = [], 0, False
        batch.append(buffer)
        num_bytes += buffer.nbytes
        has_scratch |= is_scratch
    if batch:
        yield batch


def _after(buffers: list[memoryview], done: int) -> list[memoryview]:
    """List what is left of buffers of which ``done`` bytes are filled."""
    rest: list[memoryview] = []
    for buffer in buffers:
        if done >= buffer.nbytes:
            done -= buffer.nbytes
        else:
            rest.append(buffer[done:])
            done = 0
    return rest[:_MAX_BUFFERS]
