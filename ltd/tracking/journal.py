"""JSON lines keyed by step, which a resumed run takes up where its checkpoint stands.

A run that is killed has logged steps past its last checkpoint and may have half a line at the end of its file. Opening
a journal at the step where the run goes on drops both, so that every step stands in the file once.

JSON has no NaN: a number that is not finite is written as the string ``"nan"``, ``"inf"`` or ``"-inf"``, which Python's
``float()`` reads back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO


class Journal:
    """Append-only file of JSON objects, each with a ``step``.

    Args:
        path: File; made when missing.
        start_step: First step that will be written; rows at or past it are dropped, atomically.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_rows_from(path, start_step)
        self._file: TextIO | None = path.open("a", encoding="utf-8")

    def append(self, step: int, row: Mapping[str, Any]) -> None:
        """Write one row and hand it to the operating system at once.

        Args:
            step: Step that the row belongs to.
            row: Plain values, nested as JSON allows; 0-d tensors and NumPy scalars become numbers.

        Raises:
            ValueError: If the journal is closed.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: a row for step {step} came after close()")
        self._file.write(json.dumps({"step": step, **plain(row)}, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Read the whole rows of a journal; half a last line, as a killed process leaves it, is left out.

    Args:
        path: File; a missing one has no rows.

    Yields:
        One object per row, in the order written.

    Raises:
        ValueError: If a whole line is no JSON object with a step; names the line.
    """
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: needs a JSON object with a 'step', got {line[:80]!r}") from error
        yield row


def plain(value: Any) -> Any:
    """Turn a value into what JSON holds.

    Args:
        value: Scalar, string, None, mapping or sequence, nested; anything with ``item()`` (0-d tensor, NumPy scalar).

    Returns:
        The same as ``dict``, ``list``, ``str``, ``bool``, ``int``, finite ``float`` or None; a float that is not finite
        becomes ``"nan"``, ``"inf"`` or ``"-inf"``.

    Raises:
        TypeError: If a value is none of these.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"cannot write {type(value).__name__} as JSON: needs a number, string, list or mapping")


def whole_lines(path: Path) -> Iterator[bytes]:
    """Read the lines of a file that end in a newline.

    Args:
        path: File; a missing one has none.

    Yields:
        Each with its newline; half a last line, as a killed process leaves it, is left out.
    """
    if path.is_file():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def _drop_rows_from(path: Path, start_step: int) -> None:
    """Rewrite the file without rows at or past ``start_step`` or half a last line; untouched if it has none."""
    if not path.is_file():
        return
    partial = path.with_name(path.name + ".incomplete")
    with partial.open("wb") as file:
        for line, row in zip(whole_lines(path), read_journal(path), strict=True):
            if row["step"] < start_step:
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if partial.stat().st_size == path.stat().st_size:
        partial.unlink()
    else:
        partial.replace(path)
