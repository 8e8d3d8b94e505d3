"""The safetensors format, written and read by ourselves: 8 bytes of header length, a JSON header, the raw data.

Knowing where each tensor's bytes lie lets a file be written out of memory that is already there, tensor by tensor, and
any range of it be read straight into place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ltd.storage.errors import StorageError, StorageWriteError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in the format."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    #: First byte, from the start of the file.
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize


def lay_out(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, Entry]]:
    """Plan a file.

    Args:
        tensors: Dtype and shape by name.

    Returns:
        The file's first bytes (length and header), and the entries in the order of their data: wide dtypes first, so
        that every tensor is aligned, and as given among equals.
    """
    names = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    header: dict[str, dict[str, object]] = {}
    position = 0
    for name in names:
        dtype, shape = tensors[name]
        if dtype not in _NAMES:
            raise StorageError(f"{name}: safetensors files hold no {dtype}")
        stop = position + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    entries = {}
    position = 8 + len(text)
    for name in names:
        entries[name] = Entry(*tensors[name], position)
        position += entries[name].num_bytes
    return len(text).to_bytes(8, "little") + text, entries


def read_header(file: Path) -> dict[str, Entry]:
    """Read where the tensors of a safetensors file lie.

    Args:
        file: The file.

    Returns:
        Entries by name.

    Raises:
        StorageError: If the file is missing, cut short, or not of the format.
    """
    if not file.is_file():
        raise StorageError(f"{file}: not found")
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise StorageError(f"{file}: damaged or cut short (no header of the safetensors format)")
        text = opened.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {
            name: Entry(DTYPES[item["dtype"]], tuple(item["shape"]), 8 + length + item["data_offsets"][0])
            for name, item in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{file}: damaged ({type(error).__name__}: {error})") from error
    needed = max((entry.offset + entry.num_bytes for entry in entries.values()), default=8 + length)
    if size < needed:
        raise StorageError(f"{file}: damaged or cut short: {size} bytes, needed {needed}")
    return entries


def bytes_of(tensor: Tensor) -> memoryview:
    """View a contiguous CPU tensor's memory; writable, never a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class TensorFileWriter:
    """Write a safetensors file tensor by tensor, holding none of them.

    Args:
        file: File to make.
        tensors: Dtype and shape by name, in any order; ``order`` is the one to write them in.
    """

    def __init__(self, file: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.file = file
        self._head, self._entries = lay_out(tensors)
        #: Names in the order that ``write`` expects.
        self.order = list(self._entries)
        self._written = 0

    def __enter__(self) -> TensorFileWriter:
        with describe_write_errors(self.file, self.num_bytes):
            self._opened = open(self.file, "wb")
            self._opened.write(self._head)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with describe_write_errors(self.file, self.num_bytes), self._opened:
            if kind is None:
                self._opened.flush()
                os.fsync(self._opened.fileno())
        if kind is None and self._written != len(self.order):
            raise ValueError(f"{self.file}: {self.order[self._written]!r} was never written")

    @property
    def num_bytes(self) -> int:
        """Size of the finished file."""
        return len(self._head) + sum(entry.num_bytes for entry in self._entries.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Args:
            name: Must be the next of ``order``.
            tensor: On any device, of the announced dtype and shape.
        """
        entry = self._entries[name]
        if self.order[self._written] != name:
            raise ValueError(f"{self.file}: {name!r} is not the next tensor, {self.order[self._written]!r} is")
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, needed {entry.dtype} {entry.shape}")
        with describe_write_errors(self.file, self.num_bytes):
            self._opened.write(bytes_of(tensor.detach().cpu().contiguous()))
        self._written += 1


@contextlib.contextmanager
def describe_write_errors(file: Path, num_bytes: int) -> Iterator[None]:
    """Turn an ``OSError`` in the block into a ``StorageWriteError`` that says how much room was needed.

    Args:
        file: File that is written.
        num_bytes: Its size when finished.

    Yields:
        Nothing.

    Raises:
        StorageWriteError: If the block raised an ``OSError``.
    """
    try:
        yield
    except StorageWriteError:
        raise
    except OSError as error:
        try:
            free = f"{shutil.disk_usage(file.parent).free} are free"
        except OSError:
            free = "the file system does not say how many are free"
        raise StorageWriteError(f"cannot write {file}: needed {num_bytes} bytes, {free} ({error})") from error
