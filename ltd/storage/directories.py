"""Directories and small files that appear whole or not at all, and survive a power cut once they have appeared."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE_BYTES = 4096
"""Files opened past the page cache are written in whole pages, out of memory that begins at one."""


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Fill a directory that appears whole or not at all (one process).

    Args:
        path: Directory to make; an existing one is replaced.

    Yields:
        The incomplete directory to write into.
    """
    incomplete = begin_directory(path)
    try:
        yield incomplete
        for file in incomplete.rglob("*"):
            fsync(file)
        commit_directory(path)
    except BaseException:
        abort_directory(path)
        raise


def begin_directory(path: str | Path) -> Path:
    """Make the empty ``<path>.incomplete`` directory that ``commit_directory`` renames; leftovers are removed."""
    incomplete = incomplete_path(path)
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir(parents=True)
    return incomplete


def incomplete_path(path: str | Path) -> Path:
    """Name the directory that is written before it is renamed to ``path``."""
    path = Path(path)
    return path.with_name(path.name + ".incomplete")


def commit_directory(path: str | Path) -> None:
    """Rename ``<path>.incomplete`` to ``path``, replacing what was there; its files must be flushed already."""
    path, incomplete = Path(path), incomplete_path(path)
    fsync(incomplete)
    if path.exists():
        replaced = path.with_name(path.name + ".replaced.incomplete")
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
        incomplete.rename(path)
        shutil.rmtree(replaced)
    else:
        incomplete.rename(path)
    fsync(path.parent)


def abort_directory(path: str | Path) -> None:
    """Remove ``<path>.incomplete``; what is at ``path`` stays."""
    shutil.rmtree(incomplete_path(path), ignore_errors=True)


def write_json(path: str | Path, value: Any) -> bytes:
    """Write a JSON file that appears whole or not at all.

    Args:
        path: The file; an existing one is replaced.
        value: Plain values.

    Returns:
        The bytes written.
    """
    path = Path(path)
    data = (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    replace_file(path, data)
    return data


def replace_file(path: Path, data: bytes) -> None:
    """Write a file's bytes, flush them to disk, and only then give the file its name."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
    try:
        partial.write_bytes(data)
        fsync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256_file(path: str | Path) -> str:
    """Hash a file's bytes; 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_for_writing(file: Path) -> int:
    """Make an empty file and open it past the page cache (O_DIRECT), where the file system can.

    Large files written once are on disk sooner that way, and push nothing out of the cache.

    Args:
        file: File to make; an existing one is emptied.

    Returns:
        The descriptor.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(file, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(file, flags, 0o666)


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all bytes at a position of a file that ``open_for_writing`` opened.

    Args:
        descriptor: The open file.
        data: Whole pages, beginning at a page in memory.
        position: Multiple of the page.
    """
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:], position + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct(descriptor):
                raise
            # A file system with larger pages, or a write that stopped within one: go on through the cache.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def is_direct(descriptor: int) -> bool:
    """Say whether an open file is written past the page cache."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))
