"""One process's part of a checkpoint: flat slices of tensors, laid out in memory as the file that they become."""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltd.storage.chunks import CHUNK_BYTES, KIND, Checksums, digest
from ltd.storage.directories import PAGE_BYTES, open_for_writing, write_at, write_json
from ltd.storage.errors import StorageError
from ltd.storage.tensor_file import bytes_of, describe_write_errors, lay_out

_WRITERS = 2


@dataclass(frozen=True)
class Slice:
    """Contiguous part of a flattened tensor."""

    group: str
    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor

    @property
    def key(self) -> str:
        """Name of the slice in its file."""
        return f"{self.group}/{self.name}@{self.start}"


class ShardImage:
    """The bytes of a shard's file in host memory: laid out once, filled again for every save.

    Args:
        slices: What it will hold, each a flat tensor on any device; tensors of one group lie side by side in the file,
            in this order.
        pin: Page-lock the memory, which makes copies from a GPU fast.
    """

    def __init__(self, slices: Sequence[Slice], *, pin: bool = False) -> None:
        for item in slices:
            if item.data.ndim != 1:
                raise ValueError(f"{item.group}/{item.name}: a slice is flat, got shape {tuple(item.data.shape)}")
        groups = {group: index for index, group in enumerate(dict.fromkeys(item.group for item in slices))}
        ordered = sorted(slices, key=lambda item: groups[item.group])
        head, entries = lay_out({item.key: (item.data.dtype, tuple(item.data.shape)) for item in ordered})
        if len(entries) != len(ordered):
            raise ValueError(f"{len(ordered) - len(entries)} slices have the name of another")
        size = len(head) + sum(entry.num_bytes for entry in entries.values())
        # Room to begin at a page and to end at one: what O_DIRECT wants.
        memory = torch.zeros(-(-size // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES, dtype=torch.uint8, pin_memory=pin)
        self._padded = memory[-memory.data_ptr() % PAGE_BYTES :][: -(-size // PAGE_BYTES) * PAGE_BYTES]
        self._image = self._padded[:size]
        self._image[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._views: dict[str, Tensor] = {}
        self._waiting: dict[str, Tensor] = {}
        #: What the record says of each slice, by its name in the file.
        self.records: dict[str, dict[str, Any]] = {}
        for item in ordered:
            entry = entries[item.key]
            self._views[item.key] = self._image[entry.offset : entry.offset + entry.num_bytes].view(entry.dtype)
            self.records[item.key] = {
                "group": item.group,
                "name": item.name,
                "shape": list(item.shape),
                "start": item.start,
                "dtype": str(entry.dtype).removeprefix("torch."),
                "offset": entry.offset,
                "length": item.data.numel(),
            }
        self._placed = sorted((entry.offset, key) for key, entry in entries.items() if entry.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._image.numel()

    def fill(self, slices: Sequence[Slice], *, at_write: bool = False) -> None:
        """Copy the slices' present values in.

        Copies from a GPU into pinned memory are queued: synchronise with the device before the image is written.

        Args:
            slices: The same slices as at construction, in any order.
            at_write: Leave the copying to ``write``, chunk by chunk; until then the slices must not change.
        """
        if {item.key for item in slices} != self._views.keys():
            raise ValueError("a shard's image is filled with the slices it was laid out for")
        for item in slices:
            view = self._views[item.key]
            if item.data.shape != view.shape or item.data.dtype != view.dtype:
                raise ValueError(
                    f"{item.key}: got {item.data.dtype} {tuple(item.data.shape)}, laid out as {view.dtype}"
                )
            if at_write:
                self._waiting[item.key] = item.data.detach()
            else:
                view.copy_(item.data.detach(), non_blocking=True)

    def _fill_chunk(self, start: int) -> None:
        """Copy what ``fill`` left to be copied into one chunk."""
        stop = start + CHUNK_BYTES
        if not self._waiting:
            return
        first_key = max(bisect.bisect_right(self._placed, (start,)) - 1, 0)
        for offset, key in self._placed[first_key:]:
            if offset >= stop:
                break
            view, data = self._views[key], self._waiting[key]
            first = max(start - offset, 0) // data.itemsize
            last = min(stop - offset, view.nbytes) // data.itemsize
            if first < last:
                view[first:last].copy_(data[first:last])

    def write(self, file: Path) -> Checksums:
        """Write the file, flush it to disk, and hash each chunk on the way.

        Args:
            file: File to make.

        Returns:
            The hashes of its chunks.
        """
        padded, size = bytes_of(self._padded), self.num_bytes

        def write_chunk(start: int) -> str:
            self._fill_chunk(start)
            hashed = digest(padded[start : min(start + CHUNK_BYTES, size)])
            write_at(descriptor, padded[start : start + CHUNK_BYTES], start)
            return hashed

        descriptor = open_for_writing(file)
        try:
            with ThreadPoolExecutor(_WRITERS) as pool:
                hashes = tuple(pool.map(write_chunk, range(0, size, CHUNK_BYTES)))
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            self._waiting.clear()
        return Checksums(KIND, CHUNK_BYTES, hashes)


def write_image(directory: str | Path, shard_name: str, image: ShardImage) -> None:
    """Write ``<shard_name>.safetensors`` and its record ``<shard_name>.json``, and flush both to disk.

    Args:
        directory: Existing directory, usually the incomplete one.
        shard_name: File name without ending, unique within the checkpoint.
        image: Filled image of the shard.

    Raises:
        StorageWriteError: If the disk is full, or refuses for another reason.
    """
    directory = Path(directory)
    file = directory / f"{shard_name}.safetensors"
    with describe_write_errors(file, image.num_bytes):
        checksums = image.write(file)
        record = {"bytes": image.num_bytes, "checksums": checksums.to_plain(), "slices": image.records}
        write_json(directory / f"{shard_name}.json", record)


def write_shard(directory: str | Path, shard_name: str, slices: Sequence[Slice]) -> None:
    """Write slices as one shard, with its record.

    Args:
        directory: Existing directory, usually the incomplete one.
        shard_name: File name without ending, unique within the checkpoint.
        slices: Parts to write, each a flat tensor on any device.

    Raises:
        StorageWriteError: If the disk is full, or refuses for another reason.
    """
    slices = list(slices)
    image = ShardImage(slices)
    image.fill(slices)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    write_image(directory, shard_name, image)


def dtype_named(name: str) -> torch.dtype:
    """Look up the dtype that a record names.

    Args:
        name: Such as ``float32``.

    Returns:
        The dtype.

    Raises:
        StorageError: If there is none of that name.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise StorageError(f"no dtype is called {name!r}")
    return found
