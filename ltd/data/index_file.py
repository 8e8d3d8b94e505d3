"""The index that stands beside a tar: one JSON file of columns. Knows its format, not where it lies.

``name.tar.index.json`` holds the format number, the tar's size in bytes, what indexing left out and why, and
a column per property: keys, kinds, sizes, frames, rates, caption lengths, and offset and size of each member.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltd.data.batch import BadSample
from ltd.data.decode import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from ltd.data.entries import KINDS, ROLES, Entries, Strings

FORMAT = 2
SUFFIX = ".index.json"
_MEDIA = IMAGE_EXTENSIONS + VIDEO_EXTENSIONS
_SIZES = ("width", "height", "frames")


def index_path(tar: str | Path) -> Path:
    """Name the index file of a local tar."""
    return Path(f"{tar}{SUFFIX}")


def index_command(tar: str | Path) -> str:
    """Say how to index a tar."""
    return f"run: python tools/make_shards.py --index-only {tar}"


def to_json(entries: Entries, bad: Sequence[BadSample], *, tar: str, num_bytes: int) -> bytes:
    """Write an index.

    Args:
        entries: The usable samples, in tar order.
        bad: The samples that were left out.
        tar: File name of the tar.
        num_bytes: Its size.

    Returns:
        The file's bytes.
    """
    columns = entries.columns
    chars, ends = columns["caption_chars"].tolist(), np.cumsum(columns["captions"]).tolist()
    counts = columns["captions"].tolist()
    record: dict[str, Any] = {
        "format": FORMAT,
        "tar": tar,
        "bytes": num_bytes,
        "samples": len(entries),
        "bad": [{"key": b.key, "cause": b.cause, "message": b.message} for b in bad],
        "key": list(entries.keys),
        "kind": [KINDS[kind] for kind in columns["kind"].tolist()],
        **{name: columns[name].tolist() for name in (*_SIZES, "fps")},
        "caption_chars": [chars[end - count : end] for end, count in zip(ends, counts, strict=True)],
        "extension": [_MEDIA[place] for place in columns["media"].tolist()] if len(entries) else [],
        "members": {},
    }
    for number, role in enumerate(ROLES if len(entries) else ()):
        offset, size = columns["offset"][:, number], columns["size"][:, number]
        if (offset >= 0).any():
            record["members"][role] = {"offset": offset.tolist(), "size": size.tolist()}
    body = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    return f"{{\n{body}\n}}\n".encode()


def from_json(data: bytes, *, num_bytes: int, shard: str) -> tuple[str, Entries | None, list[BadSample]]:
    """Read an index.

    Args:
        data: The file's bytes.
        num_bytes: Size of the tar now.
        shard: Path of the tar, for the records of bad samples.

    Returns:
        What is wrong with it ("" for nothing), the samples (None where something is wrong), and the bad ones.
    """
    try:
        record = json.loads(data)
        if record["format"] != FORMAT:
            return f"has format {record['format']}, needed {FORMAT}", None, []
        if record["bytes"] != num_bytes:
            return f"is of a tar of {record['bytes']} bytes, got {num_bytes} (truncated or rewritten tar)", None, []
        entries = _columns(record)
        bad = [BadSample(shard=shard, **item) for item in record["bad"]]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return f"is not an index ({type(error).__name__}: {error})", None, []
    if {len(column) for name, column in entries.columns.items() if name != "caption_chars"} | {len(entries.keys)} != {
        record["samples"]
    }:
        return f"has columns of other lengths than its {record['samples']} samples", None, []
    return "", entries, bad


def _columns(record: Mapping[str, Any]) -> Entries:
    count = int(record["samples"])
    kinds, media = {kind: n for n, kind in enumerate(KINDS)}, {ext: n for n, ext in enumerate(_MEDIA)}
    columns: dict[str, np.ndarray] = {
        "kind": np.array([kinds[kind] for kind in record["kind"]], dtype=np.uint8),
        "fps": np.array(record["fps"], dtype=np.float64),
        "captions": np.array([len(chars) for chars in record["caption_chars"]], dtype=np.int32),
        "caption_chars": np.array([n for chars in record["caption_chars"] for n in chars], dtype=np.int32),
        "media": np.array([media[extension] for extension in record["extension"]], dtype=np.uint8),
        "shard": np.zeros(count, dtype=np.int32),
    }
    columns |= {name: np.array(record[name], dtype=np.int32) for name in _SIZES}
    for name in ("offset", "size"):
        missing = [-1] * count
        places = [record["members"].get(role, {name: missing})[name] for role in ROLES]
        columns[name] = np.array(places, dtype=np.int64).reshape(len(ROLES), count).T.copy()
    return Entries(Strings.of(record["key"]), columns)
