from __future__ import annotations

import errno
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data.row_file import RowFile


def test_the_files_of_a_cache_open_and_ask_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache" / "part" / "x.bin"
    path.parent.mkdir(parents=True)
    values = np.arange(60_000, dtype=np.int16).reshape(5, 3, 4000)
    path.write_bytes(values.tobytes() + b"half a row")
    rows = {"num_rows": 5, "shape": (3, 4000), "dtype": np.dtype(np.int16)}
    file = RowFile(path, **rows)
    assert np.array_equal(file.rows, values) and not file.rows.flags.writeable
    file.request(1, 2)  # more than a hint only where the rows are not in memory
    for answer, known in ((1, True), (BlockingIOError(), False), (OSError(errno.EOPNOTSUPP, "cannot tell"), False)):
        monkeypatch.setattr("os.preadv", mock.Mock(side_effect=[answer]))
        assert file.in_memory(4) == known
    with pytest.raises(ConfigError, match="truncated: 5 rows, needed 6"):
        RowFile(path, **{**rows, "num_rows": 6})

    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("mmap.mmap", none_left)
    with pytest.raises(ConfigError, match=r"cache lies in more files than a process may open; .*ulimit -n"):
        RowFile(path, **rows)
