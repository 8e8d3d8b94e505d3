"""A file of equal rows mapped into memory, which can be asked to fetch rows before they are touched.

Touching a row that is not in memory waits for a page at a time, and reads much around it; a request reads just the
row, and many of them at once.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ltd.config import ConfigError

#: Reads what is in memory, or fails at once.
_NOWAIT = getattr(os, "RWF_NOWAIT", None)
_FETCH = getattr(os, "POSIX_FADV_WILLNEED", None)


class RowFile:
    """Read a file of equal rows, from any number of threads.

    Args:
        path: The file; may be missing where it has no rows.
        num_rows: Rows that it must hold; more are not looked at.
        shape: Shape of one row.
        dtype: Type of its numbers.

    Raises:
        ConfigError: If it holds fewer rows, or no more files can be opened.
    """

    def __init__(self, path: Path, *, num_rows: int, shape: Sequence[int], dtype: np.dtype) -> None:
        self.path = path
        self._row_bytes = int(np.prod(shape)) * dtype.itemsize
        found = path.stat().st_size // self._row_bytes if path.is_file() else 0
        if found < num_rows:
            raise ConfigError(
                f"data.shards: {path} is truncated: {found} rows, needed {num_rows}; make the cache again"
            )
        self._file = None
        if not num_rows:
            self.rows = np.zeros((0, *shape), dtype)  #: ``(num_rows, *shape)``, the map itself.
            return
        try:
            self._file = path.open("rb", buffering=0)
            mapped = mmap.mmap(self._file.fileno(), num_rows * self._row_bytes, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise ConfigError(
                    f"data.shards: {path.parent.parent} lies in more files than a process may open; raise the limit, "
                    "as with: ulimit -n 65536"
                ) from None
            raise
        self.rows = np.frombuffer(mapped, dtype).reshape(num_rows, *shape)

    def in_memory(self, row: int) -> bool:
        """Tell whether the begin of a row is in memory; True where the system cannot tell."""
        if _NOWAIT is None or self._file is None:
            return True
        try:
            os.preadv(self._file.fileno(), [bytearray(1)], row * self._row_bytes, _NOWAIT)
        except OSError:  # not there, or a file system that cannot tell
            return False
        return True

    def request(self, row: int, count: int = 1) -> None:
        """Let the system fetch rows that lie together, without waiting."""
        if _FETCH is not None and self._file is not None:
            os.posix_fadvise(self._file.fileno(), row * self._row_bytes, count * self._row_bytes, _FETCH)
