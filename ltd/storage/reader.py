"""Read any range of any tensor of a checkpoint, whatever layout wrote it, verified chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ltd.storage.chunks import CheckedFile, Checksums, Span, read_chunks
from ltd.storage.errors import StorageError
from ltd.storage.manifest import read_manifest, read_records
from ltd.storage.paths import damaged
from ltd.storage.shards import dtype_named
from ltd.storage.tensor_file import bytes_of

#: Bytes read into host memory at a time on the way to where they cannot be read directly.
_STAGING_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Fill:
    """Elements ``[start, start + target.numel())`` of a stored tensor, and the tensor that takes them.

    ``target`` is flat, or the whole tensor in its own memory format; any device and dtype.
    """

    group: str
    name: str
    start: int
    target: Tensor


@dataclass(frozen=True)
class _Part:
    """One stored slice."""

    start: int
    length: int
    dtype: torch.dtype
    file: CheckedFile
    offset: int


class Reader:
    """Read any range of any tensor of a checkpoint, whatever layout wrote it.

    What is read is compared with the checksums of the chunks it lies in; nothing else is read.

    Args:
        directory: Whole checkpoint directory.

    Raises:
        StorageError: If the manifest or a shard is missing, damaged or cut short.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self.files: list[CheckedFile] = []
        self._parts: dict[tuple[str, str], list[_Part]] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        for file, record in read_records(directory, self.manifest):
            try:
                checked = CheckedFile(file, record["bytes"], Checksums.from_plain(record["checksums"]))
                self.files.append(checked)
                for item in record["slices"].values():
                    where = (item["group"], item["name"])
                    self._shapes[where] = tuple(item["shape"])
                    part = _Part(item["start"], item["length"], dtype_named(item["dtype"]), checked, item["offset"])
                    self._parts.setdefault(where, []).append(part)
            except (KeyError, TypeError, AttributeError) as error:
                raise damaged(directory, f"{file.with_suffix('.json')}: cannot be read ({error!r})") from error
        for parts in self._parts.values():
            parts.sort(key=lambda part: part.start)

    def groups(self) -> set[str]:
        """List the groups of tensors that the checkpoint holds."""
        return {group for group, _ in self._parts}

    def averages(self) -> list[str]:
        """List the groups of averaged weights, in the order that the run's configuration gave them."""
        return list(self.manifest.get("ema") or [])

    def names(self, group: str) -> list[str]:
        """List the tensors of a group, in the order they were written."""
        return [name for where, name in self._parts if where == group]

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Look up the full shape of a tensor."""
        self._check(group, name)
        return self._shapes[(group, name)]

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Look up the stored dtype of a tensor."""
        self._check(group, name)
        return self._parts[(group, name)][0].dtype

    def read(self, group: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Assemble a range of a flattened tensor.

        Args:
            group: Group of the tensor.
            name: Name of the tensor.
            start: First element.
            stop: End of the range; the tensor's end by default.

        Returns:
            Flat tensor of ``stop - start`` elements on the CPU, in the stored dtype.

        Raises:
            StorageError: If the tensor or a part of the range is not in the checkpoint, or its bytes are damaged.
        """
        stop = prod(self.shape(group, name)) if stop is None else stop
        target = torch.empty(stop - start, dtype=self.dtype(group, name))
        self.fill([Fill(group, name, start, target)])
        return target

    def read_full(self, group: str) -> dict[str, Tensor]:
        """Assemble every tensor of a group in its full shape.

        Args:
            group: Group to read.

        Returns:
            Tensors by name, on the CPU.

        Raises:
            StorageError: If the group is not in the checkpoint, or a part of a tensor is missing or damaged.
        """
        if group not in self.groups():
            raise StorageError(f"{self.directory}: no group {group!r}; it holds {', '.join(sorted(self.groups()))}")
        found = {
            name: torch.empty(self._shapes[(group, name)], dtype=self.dtype(group, name)) for name in self.names(group)
        }
        self.fill([Fill(group, name, 0, target) for name, target in found.items()])
        return found

    def fill(self, fills: Iterable[Fill]) -> None:
        """Read many ranges at once, each chunk of a file once, straight into place where that can be.

        Args:
            fills: What to read, and where to.

        Raises:
            StorageError: If a range is not in the checkpoint, or its bytes are damaged; targets may be half filled.
        """
        spans: dict[CheckedFile, list[Span]] = {}
        for batch in _batched(self, fills):
            spans.clear()
            for fill, memory in batch:
                self._locate(fill, memory, spans)
            jobs = [job for file, found in spans.items() for job in file.jobs(found)]
            self._run(jobs)
            for fill, memory in batch:
                if memory.data_ptr() != fill.target.data_ptr():
                    with torch.no_grad():
                        fill.target.copy_(memory.view(fill.target.shape))

    def verify(self) -> None:
        """Read every byte of the checkpoint and compare with the checksums."""
        self._run([job for file in self.files for job in file.all_jobs()])

    def _run(self, jobs: list[tuple[CheckedFile, int, list[Span]]]) -> None:
        try:
            read_chunks(jobs)
        except StorageError as error:
            raise damaged(self.directory, str(error)) from error

    def _locate(self, fill: Fill, memory: Tensor, spans: dict[CheckedFile, list[Span]]) -> None:
        """Add the file ranges that hold a fill's elements."""
        position, stop = fill.start, fill.start + memory.numel()
        target, size = bytes_of(memory), memory.dtype.itemsize
        for part in self._parts[(fill.group, fill.name)]:
            if position >= stop:
                break
            end = min(part.start + part.length, stop)
            if part.start <= position < end:
                first = part.offset + (position - part.start) * size
                piece = target[(position - fill.start) * size : (end - fill.start) * size]
                spans.setdefault(part.file, []).append(Span(first, piece))
                position = end
        if position < stop:
            where = f"{fill.group}/{fill.name}"
            raise damaged(self.directory, f"{self.directory}: elements {position} to {stop} of {where} are in no shard")

    def _check(self, group: str, name: str) -> None:
        if (group, name) not in self._parts:
            raise StorageError(f"{self.directory}: no tensor {name!r} in group {group!r}")


def _batched(reader: Reader, fills: Iterable[Fill]) -> Iterator[list[tuple[Fill, Tensor]]]:
    """Pair each fill with the flat memory it is read into: the target's own, or staging of a bounded size."""
    batch: list[tuple[Fill, Tensor]] = []
    staged = 0
    for fill in fills:
        dtype, target = reader.dtype(fill.group, fill.name), fill.target.detach()
        if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
            batch.append((fill, target.view(-1)))
            continue
        memory = torch.empty(target.numel(), dtype=dtype)
        if staged and staged + memory.nbytes > _STAGING_BYTES:
            yield batch
            batch, staged = [], 0
        batch.append((fill, memory))
        staged += memory.nbytes
    if batch:
        yield batch


def verify(directory: str | Path) -> None:
    """Check every byte of a checkpoint against its checksums.

    Args:
        directory: Checkpoint directory.

    Raises:
        StorageError: If a file is missing or its bytes changed; names the file, and an older checkpoint to use.
    """
    Reader(directory).verify()
