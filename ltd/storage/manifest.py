"""What a checkpoint says about itself: the manifest, and the record of each shard, each under a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ltd import __version__
from ltd.storage.chunks import digest
from ltd.storage.directories import write_json
from ltd.storage.errors import StorageError
from ltd.storage.migrations import migrate_manifest, migrate_record
from ltd.storage.paths import MANIFEST, damaged

FORMAT = 2
"""Format number of checkpoints; raised with a migration when what lies on disk changes."""


def write_manifest(
    directory: str | Path, manifest: Mapping[str, Any], *, shard_names: Sequence[str] | None = None
) -> None:
    """Write the checkpoint's manifest; written last, it marks the checkpoint as whole.

    Args:
        directory: Holds all shards and their records, which the manifest lists.
        manifest: Plain values.
        shard_names: The shards there must be; by default those whose records are seen, which on a network file system
            may not be all that other hosts wrote.
    """
    directory = Path(directory)
    if shard_names is None:
        shard_names = [path.stem for path in sorted(directory.glob("*.json")) if path.name != MANIFEST]
    shards = {}
    for name in shard_names:
        data = (directory / f"{name}.json").read_bytes()
        shards[name] = {"bytes": json.loads(data)["bytes"], "record": digest(data)}
    plain = {**manifest, "format": FORMAT, "ltd": __version__, "shards": shards}
    write_json(directory / MANIFEST, {**plain, "checksum": _checksum(plain)})


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read a checkpoint's manifest, brought up to the present format.

    Args:
        directory: Checkpoint directory.

    Returns:
        What ``write_manifest`` was given, and ``format`` as it lies on disk.

    Raises:
        StorageError: If it is missing, damaged or of a newer format.
    """
    file = Path(directory) / MANIFEST
    if not file.is_file():
        raise StorageError(f"{directory}: no {MANIFEST}; not a whole checkpoint")
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        number = int(manifest["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(directory, f"{file}: cannot be read ({type(error).__name__}: {error})") from error
    if number > FORMAT:
        raise StorageError(
            f"{file}: format {number}, written by ltd {manifest.get('ltd', 'of another version')}; this is ltd "
            f"{__version__}, which reads formats up to {FORMAT}: install the version that wrote it, or a newer one"
        )
    if number > 1 and manifest.pop("checksum", None) != _checksum(manifest):
        raise damaged(directory, f"{file}: its checksum differs from what was written")
    return migrate_manifest(manifest, FORMAT)


def read_records(directory: str | Path, manifest: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Read the records of all shards, brought up to the present format.

    Args:
        directory: Checkpoint directory.
        manifest: What ``read_manifest`` gave.

    Yields:
        The shard's safetensors file and its record.

    Raises:
        StorageError: If a file is missing, damaged or of another size.
    """
    directory = Path(directory)
    found = [path.stem for path in directory.glob("*.json") if path.name != MANIFEST]
    for name in sorted(manifest.get("shards", found)):
        file, record_file = directory / f"{name}.safetensors", directory / f"{name}.json"
        for needed in (record_file, file):
            if not needed.is_file():
                raise damaged(directory, f"{needed}: missing")
        data = record_file.read_bytes()
        if "shards" in manifest and digest(data) != manifest["shards"][name]["record"]:
            raise damaged(directory, f"{record_file}: its checksum differs from what was written")
        try:
            record = migrate_record(json.loads(data), dict(manifest), file, FORMAT)
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(directory, f"{record_file}: cannot be read ({type(error).__name__}: {error})") from error
        size = file.stat().st_size
        if size != record["bytes"]:
            raise damaged(directory, f"{file}: {size} bytes, needed {record['bytes']}")
        yield file, record


def fingerprint(directory: str | Path) -> str:
    """Hash what a checkpoint holds, by the checksums in its records.

    Args:
        directory: Whole checkpoint directory.

    Returns:
        SHA-256 as 64 hex digits, equal for equal weights and state written by equally many processes.
    """
    records = read_records(directory, read_manifest(directory))
    text = "".join(chunk for _, record in records for chunk in record["checksums"]["chunks"])
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Hash a manifest as JSON reads it back, so that tuples and integer keys make no difference."""
    plain = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "checksum"}))
    return digest(json.dumps(plain, sort_keys=True).encode())
