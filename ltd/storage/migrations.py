"""Older formats of checkpoints, brought up to the present one in memory; nothing on disk is rewritten.

A migration takes the plain contents of a manifest, or of one shard's record, of format ``n`` and changes them into
those of ``n + 1``. Format 1 had one average, in the group ``ema``, and one SHA-256 per file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ltd.storage.tensor_file import read_header

Plain = dict[str, Any]


def migrate_manifest(manifest: Plain, target: int) -> Plain:
    """Bring a manifest up to a format.

    Args:
        manifest: As read, of an older format.
        target: The present format.

    Returns:
        The manifest; it keeps ``format`` as it was read.
    """
    for number in range(manifest["format"], target):
        _MANIFESTS[number](manifest)
    return manifest


def migrate_record(record: Plain, manifest: Plain, file: Path, target: int) -> Plain:
    """Bring a shard's record up to a format.

    Args:
        record: As read.
        manifest: Of the checkpoint, migrated; ``format`` says what the record was written as.
        file: The shard's safetensors file.
        target: The present format.

    Returns:
        The record.
    """
    for number in range(manifest["format"], target):
        _RECORDS[number](record, manifest, file)
    return record


def _manifest_1(manifest: Plain) -> None:
    config = manifest.get("config", {})
    section = config.get("ema")
    average = "ema"
    if isinstance(section, dict) and "decay" in section:
        decay = float(section.pop("decay"))
        section["decays"] = [decay]
        average = f"ema_{decay!r}"
    manifest["ema"] = [average] if manifest.get("ema", True) else []


def _record_1(record: Plain, manifest: Plain, file: Path) -> None:
    entries = read_header(file)
    num_bytes = max((entry.offset + entry.num_bytes for entry in entries.values()), default=file.stat().st_size)
    checksums = {"kind": "sha256", "chunk_bytes": max(num_bytes, 1), "chunks": [record.pop("sha256")]}
    record |= {"bytes": num_bytes, "checksums": checksums}
    for key, item in record["slices"].items():
        entry = entries[key]
        item |= {"dtype": str(entry.dtype).removeprefix("torch."), "offset": entry.offset, "length": entry.shape[0]}
        if item["group"] == "ema" and manifest["ema"]:
            item["group"] = manifest["ema"][0]


_MANIFESTS: dict[int, Callable[[Plain], None]] = {1: _manifest_1}
_RECORDS: dict[int, Callable[[Plain, Plain, Path], None]] = {1: _record_1}
