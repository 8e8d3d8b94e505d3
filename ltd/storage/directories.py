"""Directories and small files that appear whole or not at all, and survive a power cut once they have appeared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
