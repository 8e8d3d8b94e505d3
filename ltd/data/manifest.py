"""What shards are made of: a JSONL manifest or a folder of media, as rows. Opens no media."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltd.config import ConfigError
from ltd.data.decode import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

SPLITS = ("train", "heldout")
_FIELDS = ("path", "caption", "start", "end", "split")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample to be made."""

    number: int  #: Place in the manifest, from 0.
    path: str  #: Media file, relative to the media root, as the manifest names it.
    caption: str | None  #: Caption; None where a folder's file has no text beside it.
    start: float | None = None  #: Seconds; None is the beginning.
    end: float | None = None  #: Seconds; None is the end.
    split: str = "train"  #: "train" or "heldout".

    @property
    def kind(self) -> str:
        """The kind of medium by extension: "image" or "video"."""
        return "image" if extension_of(self.path) in IMAGE_EXTENSIONS else "video"

    @property
    def key(self) -> str:
        """Name of the sample in a tar: number and file name, no dots."""
        stem = re.sub(r"[^A-Za-z0-9-]+", "_", Path(self.path).stem).strip("_")[:48]
        return f"{self.number:08d}_{stem}" if stem else f"{self.number:08d}"


def extension_of(path: str | Path) -> str:
    """Return the extension of a path in lower case, without the dot."""
    return Path(path).suffix.lstrip(".").lower()


def read_rows(source: str | Path, media_root: str | Path | None = None) -> tuple[list[Row], Path]:
    """Read a manifest or list a folder.

    Args:
        source: JSONL file, or folder of media with captions in text files of the same name; files below a folder
            named ``heldout`` are held out.
        media_root: Folder that the manifest's paths are relative to; None is the manifest's own folder.

    Returns:
        The rows and the folder their paths are relative to.

    Raises:
        ConfigError: If the source is missing or empty, a row is wrong (with its line), or a file does not exist.
    """
    source = Path(source)
    if source.is_dir():
        rows, root = _list_folder(source), source
    elif source.is_file():
        rows, root = _read_manifest(source), Path(media_root) if media_root is not None else source.parent
    else:
        raise ConfigError(f"{source}: no such file or folder; needed a JSONL manifest or a folder of media")
    if not rows:
        raise ConfigError(f"{source}: got no samples, needed at least one image or video")
    missing = sorted({row.path for row in rows if not (root / row.path).is_file()})
    if missing:
        raise ConfigError(
            f"{source}: {len(missing)} media files do not exist below {root}: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; set --media-root"
        )
    return rows, root


def _list_folder(folder: Path) -> list[Row]:
    files = sorted(p for p in folder.rglob("*") if extension_of(p) in IMAGE_EXTENSIONS + VIDEO_EXTENSIONS)
    rows = []
    for number, path in enumerate(p for p in files if p.is_file()):
        text = path.with_suffix(".txt")
        try:
            caption = text.read_text("utf-8").strip() if text.is_file() else None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{text}: caption is not UTF-8: {error}") from error
        relative = path.relative_to(folder)
        split = "heldout" if "heldout" in relative.parts[:-1] else "train"
        rows.append(Row(number=number, path=relative.as_posix(), caption=caption, split=split))
    return rows


def _read_manifest(path: Path) -> list[Row]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path} line {number}: not JSON: {error}") from error
        problem = _check_record(record)
        if problem:
            raise ConfigError(f"{path} line {number}: {problem}")
        rows.append(
            Row(
                number=len(rows),
                path=record["path"],
                caption=record["caption"].strip(),
                start=record.get("start"),
                end=record.get("end"),
                split=record.get("split", "train"),
            )
        )
    return rows


def _check_record(record: Any) -> str | None:
    """Say what is wrong with a manifest's row, None for nothing."""
    if not isinstance(record, Mapping):
        return f"got {type(record).__name__}, needed an object with path and caption"
    unknown = sorted(record.keys() - set(_FIELDS))
    if unknown:
        return f"{unknown[0]}: unknown field; needed some of {', '.join(_FIELDS)}"
    for name in ("path", "caption"):
        if not isinstance(record.get(name), str):
            return f'{name}: got {record.get(name)!r}, needed text ("" for a sample without caption)'
    if extension_of(record["path"]) not in IMAGE_EXTENSIONS + VIDEO_EXTENSIONS:
        return f"path: got {record['path']!r}, needed one of .{', .'.join(IMAGE_EXTENSIONS + VIDEO_EXTENSIONS)}"
    if record.get("split", "train") not in SPLITS:
        return f"split: got {record['split']!r}, needed {' or '.join(SPLITS)}"
    start, end = record.get("start"), record.get("end")
    for name, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            return f"{name}: got {value!r}, needed seconds, 0 or more"
    if end is not None and end <= (start or 0):
        return f"end: got {end}, needed more than start = {start or 0}"
    return None
