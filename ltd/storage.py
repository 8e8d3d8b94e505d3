"""Tensors on disk: sharded safetensors with checksums, atomic directories, a format number. No process groups.

A checkpoint is a directory of shards. Each shard holds flat slices: the part ``[start, start + n)`` of the flattened
tensor ``name`` in ``group`` (``master`` weights, ``exp_avg``, ``ema``, ...). A reader assembles any range from whatever
slices cover it, so what wrote a checkpoint (how many ranks, which ZeRO stage) does not matter to what reads it. Nothing
here is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
"""Format number of checkpoints and exported folders; raised with a migration when the layout changes."""

_MANIFEST = "manifest.json"


class StorageError(ValueError):
    """A checkpoint or exported folder that cannot be read or written; says which file, what was found and needed."""


class StorageWriteError(OSError):
    """A file that could not be written; says which, the bytes it needed, the bytes free and why."""


@dataclass(frozen=True)
class Slice:
    """Contiguous part of a flattened tensor."""

    group: str
    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor


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
    """Flush ``<path>.incomplete`` to disk and rename it to ``path``, replacing what was there."""
    path, incomplete = Path(path), incomplete_path(path)
    for file in incomplete.rglob("*"):
        if file.is_file():
            _fsync(file)
    _fsync(incomplete)
    if path.exists():
        replaced = path.with_name(path.name + ".replaced.incomplete")
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
        incomplete.rename(path)
        shutil.rmtree(replaced)
    else:
        incomplete.rename(path)
    _fsync(path.parent)


def abort_directory(path: str | Path) -> None:
    """Remove ``<path>.incomplete``; what is at ``path`` stays."""
    shutil.rmtree(incomplete_path(path), ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    _fsync(partial)
    partial.replace(path)


def sha256_file(path: str | Path) -> str:
    """Hash a file's bytes; 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(directory: str | Path, shard_name: str, slices: Iterable[Slice]) -> None:
    """Write one shard: ``<shard_name>.safetensors`` and ``<shard_name>.json`` with shapes, starts and a checksum.

    Args:
        directory: Existing directory, usually the incomplete one.
        shard_name: File name without ending, unique within the checkpoint.
        slices: Parts to write, each a flat tensor on any device.

    Raises:
        StorageWriteError: If the disk is full.
    """
    directory = Path(directory)
    tensors: dict[str, Tensor] = {}
    records: dict[str, dict[str, Any]] = {}
    for item in slices:
        if item.data.ndim != 1:
            raise ValueError(f"{item.group}/{item.name}: a slice is flat, got shape {tuple(item.data.shape)}")
        key = f"{item.group}/{item.name}@{item.start}"
        tensors[key] = item.data.detach().cpu().contiguous()
        records[key] = {"group": item.group, "name": item.name, "shape": list(item.shape), "start": item.start}
    file = directory / f"{shard_name}.safetensors"
    _save_tensors(tensors, file)
    write_json(directory / f"{shard_name}.json", {"sha256": sha256_file(file), "slices": records})


def write_manifest(directory: str | Path, manifest: Mapping[str, Any]) -> None:
    """Write the checkpoint's manifest with the format number; written last, it marks the checkpoint as whole."""
    write_json(Path(directory) / _MANIFEST, {"format": FORMAT, **manifest})


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Args:
        directory: Checkpoint directory.

    Returns:
        What ``write_manifest`` was given, and ``format``.

    Raises:
        StorageError: If it is missing or of a newer format.
    """
    file = Path(directory) / _MANIFEST
    if not file.is_file():
        raise StorageError(f"{directory}: no {_MANIFEST}; not a whole checkpoint")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise StorageError(f"{file}: damaged ({error})") from error
    if manifest.get("format") != FORMAT:
        raise StorageError(f"{file}: format {manifest.get('format')}, this version of ltd reads {FORMAT}")
    return manifest


class Reader:
    """Read any range of any tensor of a checkpoint, whatever layout wrote it.

    Args:
        directory: Whole checkpoint directory.

    Raises:
        StorageError: If the manifest or a shard is missing.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self._parts: dict[tuple[str, str], list[tuple[int, Path, str]]] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        self._files: dict[Path, Any] = {}
        for record_file in sorted(self.directory.glob("*.json")):
            if record_file.name != _MANIFEST:
                self._add_shard(record_file)

    def _add_shard(self, record_file: Path) -> None:
        file = record_file.with_suffix(".safetensors")
        if not file.is_file():
            raise StorageError(f"{file}: missing shard of the checkpoint {self.directory}")
        for key, record in json.loads(record_file.read_text())["slices"].items():
            where = (record["group"], record["name"])
            self._shapes[where] = tuple(record["shape"])
            self._parts.setdefault(where, []).append((record["start"], file, key))

    def groups(self) -> set[str]:
        """List the groups of tensors that the checkpoint holds."""
        return {group for group, _ in self._parts}

    def names(self, group: str) -> list[str]:
        """List the tensors of a group, in the order they were written."""
        return [name for where, name in self._parts if where == group]

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Look up the full shape of a tensor."""
        self._check(group, name)
        return self._shapes[(group, name)]

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
            StorageError: If the tensor or a part of the range is not in the checkpoint.
        """
        self._check(group, name)
        stop = prod(self._shapes[(group, name)]) if stop is None else stop
        pieces: list[Tensor] = []
        position = start
        for offset, file, key in sorted(self._parts[(group, name)], key=lambda part: part[0]):
            if position >= stop:
                break
            if file not in self._files:
                self._files[file] = _open(file)
            view = self._files[file].get_slice(key)
            end = offset + view.get_shape()[0]
            if offset <= position < end:
                pieces.append(view[position - offset : min(end, stop) - offset])
                position = min(end, stop)
        if position < stop:
            raise StorageError(f"{self.directory}: elements {position} to {stop} of {group}/{name} are in no shard")
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]

    def read_full(self, group: str) -> dict[str, Tensor]:
        """Assemble every tensor of a group in its full shape.

        Args:
            group: Group to read.

        Returns:
            Tensors by name, on the CPU.

        Raises:
            StorageError: If the group is not in the checkpoint, or a part of a tensor is missing.
        """
        if group not in self.groups():
            raise StorageError(f"{self.directory}: no group {group!r}; it holds {', '.join(sorted(self.groups()))}")
        return {name: self.read(group, name).reshape(self._shapes[(group, name)]) for name in self.names(group)}

    def _check(self, group: str, name: str) -> None:
        if (group, name) not in self._parts:
            raise StorageError(f"{self.directory}: no tensor {name!r} in group {group!r}")


def verify(directory: str | Path) -> None:
    """Check every shard of a checkpoint against its checksum.

    Args:
        directory: Checkpoint directory.

    Raises:
        StorageError: If a shard is missing or its bytes changed; names the file.
    """
    read_manifest(directory)
    for record_file in sorted(Path(directory).glob("*.json")):
        if record_file.name == _MANIFEST:
            continue
        file = record_file.with_suffix(".safetensors")
        if not file.is_file():
            raise StorageError(f"{file}: missing shard")
        if sha256_file(file) != json.loads(record_file.read_text())["sha256"]:
            raise StorageError(f"{file}: checksum differs from {record_file.name}; the file is damaged")


def fingerprint(directory: str | Path) -> str:
    """Hash what a checkpoint holds, by the checksums in its records.

    Args:
        directory: Whole checkpoint directory.

    Returns:
        SHA-256 as 64 hex digits, equal for equal weights and state.
    """
    records = sorted(path for path in Path(directory).glob("*.json") if path.name != _MANIFEST)
    text = "".join(json.loads(path.read_text())["sha256"] for path in records)
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """Name the checkpoint directory of a step."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def checkpoints(run_dir: str | Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    found = (Path(run_dir) / "checkpoints").glob("step-" + "[0-9]" * 8)
    return sorted(path for path in found if (path / _MANIFEST).is_file())


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """Find the checkpoint that ``RUN/latest`` names, the newest whole one otherwise."""
    pointer = Path(run_dir) / "latest"
    if pointer.is_file():
        target = Path(run_dir) / "checkpoints" / pointer.read_text().strip()
        if (target / _MANIFEST).is_file():
            return target
    found = checkpoints(run_dir)
    return found[-1] if found else None


def read_run(path: str | Path, weights: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a model's tensors and the run's configuration out of a checkpoint.

    Args:
        path: Run directory (its latest checkpoint is taken), or one checkpoint inside it.
        weights: ``ema`` (the averaged weights, where there is one set), ``raw`` (the masters), or the name of a group.

    Returns:
        Weights and buffers by name, on the CPU, and the configuration that the checkpoint was written under.

    Raises:
        StorageError: If there is no whole checkpoint, or it lacks those weights.
    """
    path = Path(path)
    checkpoint = path if (path / _MANIFEST).is_file() else latest_checkpoint(path)
    if checkpoint is None:
        raise StorageError(f"{path}: neither an exported folder (model.safetensors) nor a run with a whole checkpoint")
    reader = Reader(checkpoint)
    group = "master" if weights == "raw" else weights
    averages = [name for name in sorted(reader.groups()) if name.startswith("ema")]
    if weights == "ema" and len(averages) == 1:
        group = averages[0]
    if group not in reader.groups():
        raise StorageError(f"weights: got {weights!r}, but {checkpoint} holds {', '.join(sorted(reader.groups()))}")
    tensors = reader.read_full(group)
    if "buffer" in reader.groups():
        tensors |= reader.read_full("buffer")
    config = reader.manifest.get("config")
    if not isinstance(config, dict) or "model" not in config:
        raise StorageError(f"{checkpoint}: its manifest has no configuration of a model")
    return tensors, config


def write_latest(run_dir: str | Path, checkpoint: Path) -> None:
    """Point ``RUN/latest`` at a checkpoint."""
    pointer = Path(run_dir) / "latest"
    partial = pointer.with_name("latest.incomplete")
    partial.write_text(checkpoint.name + "\n")
    _fsync(partial)
    partial.replace(pointer)


def save_model(directory: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an exported folder: ``model.safetensors`` and ``config.yaml``, whole or not at all.

    Args:
        directory: Folder to make; an existing one is replaced.
        tensors: The model's state.
        config: Plain values: at least the model's configuration.
    """
    with atomic_directory(directory) as incomplete:
        _save_tensors(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, incomplete / "model.safetensors"
        )
        plain = {"format": FORMAT, **config}
        (incomplete / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))


def load_model(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an exported folder.

    Args:
        directory: Folder that ``save_model`` wrote.

    Returns:
        The tensors by name, and the plain configuration.

    Raises:
        StorageError: If a file is missing, damaged, or of another format.
    """
    directory = Path(directory)
    for name in ("model.safetensors", "config.yaml"):
        if not (directory / name).is_file():
            raise StorageError(f"{directory / name}: not found; {directory} is no exported folder")
    config: Any = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    if config.get("format") != FORMAT:
        raise StorageError(f"{directory}: format {config.get('format')}, this version of ltd reads {FORMAT}")
    try:
        return load_file(directory / "model.safetensors"), config
    except SafetensorError as error:
        raise StorageError(f"{directory / 'model.safetensors'}: damaged ({error})") from error


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise StorageError(f"{file}: damaged or cut short ({error})") from error


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        save_file(tensors, file)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(file.parent).free
        raise StorageWriteError(f"cannot write {file}: needed {needed} bytes, {free} are free ({error})") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
