"""The index that stands beside a tar: columns in one compressed numpy archive. Knows its format, not where it lies.

``name.tar.index.npz`` holds ``header`` (JSON: format number, the tar's size in bytes, what indexing left out and why)
and a column per property: key, kind, sizes, frames, rate, caption lengths, and offset and size of each member. Millions
of samples are read in a second, and ``numpy.load`` shows them. Format 3 is format 2 with the columns of class labels,
and is written only where there are some; an index of format 2 says that there are none.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltd.data.batch import BadSample
from ltd.data.decode import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from ltd.data.entries import KINDS, ROLES, Entries, Strings

FORMAT = 3
#: Formats that are read.
_READ = (2, 3)
SUFFIX = ".index.npz"
#: Columns of ``Entries`` that are stored, and the type they are read back to.
_COLUMNS = {
    "kind": np.uint8,
    "width": np.int32,
    "height": np.int32,
    "frames": np.int32,
    "fps": np.float64,
    "captions": np.int32,
    "caption_chars": np.int32,
    "media": np.uint8,
    "offset": np.int64,
    "size": np.int64,
}
#: Those of format 3.
_LABELS = {"label": np.int32, "class_name": np.int32}


def index_path(tar: str | Path) -> Path:
    """Name the index file of a local tar."""
    return Path(f"{tar}{SUFFIX}")


def index_command(tar: str | Path) -> str:
    """Say how to index a tar."""
    return f"run: python tools/make_shards.py --index-only {tar}"


def encode_index(entries: Entries, bad: Sequence[BadSample], *, tar: str, num_bytes: int) -> bytes:
    """Write an index.

    Args:
        entries: The usable samples, in tar order.
        bad: The samples that were left out.
        tar: File name of the tar.
        num_bytes: Its size.

    Returns:
        The file's bytes; equal inputs give equal bytes.
    """
    labelled = any((entries.columns[name] >= 0).any() for name in _LABELS)
    header: dict[str, Any] = {
        "format": FORMAT if labelled else 2,
        "tar": tar,
        "bytes": num_bytes,
        "samples": len(entries),
        "kinds": KINDS,
        "extensions": IMAGE_EXTENSIONS + VIDEO_EXTENSIONS,
        "members": ROLES,
        "bad": [{"key": record.key, "cause": record.cause, "message": record.message} for record in bad],
    }
    columns = {name: entries.columns[name] for name in _COLUMNS if name in entries.columns}
    if labelled:
        header["classes"] = entries.classes
        columns |= {name: entries.columns[name] for name in _LABELS}
    columns["key"] = np.frombuffer(entries.keys.buffer, dtype=np.uint8)
    columns["key_end"] = entries.keys.ends
    columns["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **columns)  # type: ignore[arg-type]
    return buffer.getvalue()


def decode_index(data: bytes, *, num_bytes: int, shard: str) -> tuple[str, Entries | None, list[BadSample]]:
    """Read an index.

    Args:
        data: The file's bytes.
        num_bytes: Size of the tar now.
        shard: Path of the tar, for the records of bad samples.

    Returns:
        What is wrong with it ("" for nothing), the samples (None where something is wrong), and the bad ones.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if header["format"] not in _READ:
                return f"has format {header['format']}, needed {FORMAT} or {_READ[0]}", None, []
            if header["bytes"] != num_bytes:
                was = header["bytes"]
                return f"is of a tar of {was} bytes, got {num_bytes} (truncated or rewritten tar)", None, []
            entries = _read_columns(file, header)
        return "", entries, [BadSample(shard=shard, **record) for record in header["bad"]]
    except (ValueError, KeyError, TypeError, IndexError, OSError, EOFError, zipfile.BadZipFile) as error:
        return f"is not an index ({type(error).__name__}: {error})", None, []


def _read_columns(file: np.lib.npyio.NpzFile, header: dict[str, Any]) -> Entries:
    if [header[name] for name in ("kinds", "members")] != [list(KINDS), list(ROLES)]:
        raise ValueError(f"kinds and members are {header['kinds']} and {header['members']}")
    if header["extensions"] != [*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS]:
        raise ValueError(f"extensions are {header['extensions']}")
    count = header["samples"]
    if count == 0:
        return Entries.of([])
    wanted = {**_COLUMNS, **(_LABELS if header["format"] != _READ[0] else {})}
    columns = {name: np.asarray(file[name], dtype=dtype) for name, dtype in wanted.items()}
    columns["shard"] = np.zeros(len(columns["kind"]), dtype=np.int32)
    keys = Strings(file["key"].tobytes(), file["key_end"])
    lengths = {len(column) for name, column in columns.items() if name != "caption_chars"} | {len(keys)}
    if lengths != {count} or int(columns["captions"].sum()) != len(columns["caption_chars"]):
        raise ValueError(f"columns have {sorted(lengths)} rows, needed {count}")
    if int(keys.ends[-1]) != len(keys.buffer) or columns["offset"].shape[1:] != (len(ROLES),):
        raise ValueError("keys or members are cut off")
    classes = [str(name) for name in header.get("classes", ())]
    if "class_name" in columns and not (columns["class_name"] < len(classes)).all():
        raise ValueError(f"a sample has a class that is none of the {len(classes)} named")
    return Entries(keys, columns, classes)
