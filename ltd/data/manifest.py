"""What shards are made of: manifests, folders and globs of media, as rows. Opens no media."""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ltd.config import ConfigError
from ltd.data.decode import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from ltd.data.entries import NO_LABEL
from ltd.data.labels import parse_label, unknown_class
from ltd.data.records import (
    FIELDS,
    MANIFEST_EXTENSIONS,
    Captions,
    Columns,
    parse_captions,
    parse_text,
    read_records,
    read_text,
)

SPLITS = ("train", "heldout")
_MEDIA = IMAGE_EXTENSIONS + VIDEO_EXTENSIONS


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample to be made."""

    number: int  #: Place among all rows of the job, from 0.
    path: str  #: Media file, relative to the root, as the manifest names it.
    captions: Captions = ()  #: (text, weight) pairs; () where a folder's file has no text beside it.
    label: int = NO_LABEL  #: Class number; -1 for none.
    class_name: str = ""  #: Class name; "" for none.
    start: float | None = None  #: Seconds; None is the beginning.
    end: float | None = None  #: Seconds; None is the end.
    split: str = "train"  #: "train" or "heldout".
    root: Path = field(default=Path(), compare=False)  #: Folder that ``path`` is relative to.
    shot: int | None = None  #: Number of a detected shot in its video, from 0; None where none were looked for.
    place: str = field(default="", compare=False)  #: Manifest and line that it comes from; "" for a folder's file.
    span: tuple[int, int] | None = None  #: First frame of a shot and the one after its last; overrides seconds.

    @property
    def file(self) -> Path:
        """The media file."""
        return self.root / self.path

    @property
    def kind(self) -> str:
        """The kind of medium by extension: "image" or "video"."""
        return "image" if extension_of(self.path) in IMAGE_EXTENSIONS else "video"

    @property
    def key(self) -> str:
        """Name of the sample in a tar: number and file name, no dots."""
        stem = re.sub(r"[^A-Za-z0-9-]+", "_", Path(self.path).stem).strip("_")[:48]
        key = f"{self.number:08d}_{stem}" if stem else f"{self.number:08d}"
        return key if self.shot is None else f"{key}_shot{self.shot:04d}"

    @property
    def uncaptioned(self) -> bool:
        """Whether no caption holds any text."""
        return not any(text for text, _ in self.captions)


def extension_of(path: str | Path) -> str:
    """Return the extension of a path in lower case, without the dot."""
    return Path(path).suffix.lstrip(".").lower()


def read_rows(
    sources: str | Path | Sequence[str | Path], media_root: str | Path | None = None, columns: Columns | None = None
) -> list[Row]:
    """Read manifests and list folders and globs.

    Args:
        sources: One or more of: a JSONL, CSV, TSV or Parquet manifest; a folder of media with captions in files of the
            same name; a media file; a glob of any of these files. What lies in a folder named ``heldout`` is held out.
        media_root: Folder that the manifests' paths are relative to; None is each manifest's own folder.
        columns: What the manifests call their fields; None for our own names.

    Returns:
        The rows of all sources, in order.

    Raises:
        ConfigError: If a source is missing or empty, a row is wrong (with its line) or repeated, or a file is missing.
    """
    rows: list[Row] = []
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    for source in given:
        found = _read_source(str(source), None if media_root is None else Path(media_root), columns or Columns())
        if not found:
            raise ConfigError(f"{source}: got no samples, needed at least one image or video")
        rows += [replace(row, number=number) for number, row in enumerate(found, start=len(rows))]
    _refuse_repeats(rows)
    return rows


def _read_source(source: str, media_root: Path | None, columns: Columns) -> list[Row]:
    path = Path(source)
    try:
        if source and path.is_dir():
            files = sorted(p for p in path.rglob("*") if extension_of(p) in _MEDIA)
            return _list_media(files, path, heldout="heldout" in path.parts[-1:])
        if path.is_file():
            return _read_file(path, media_root, columns)
    except OSError as error:
        raise ConfigError(f"{source}: does not read: {error}") from error
    if not glob.has_magic(source):
        raise ConfigError(
            f"{source or repr(source)}: no such file or folder; needed a manifest ({', '.join(MANIFEST_EXTENSIONS)}), "
            "a folder of media or a glob in quotes"
        )
    return _read_glob(source, media_root, columns)


def _read_file(path: Path, media_root: Path | None, columns: Columns) -> list[Row]:
    if extension_of(path) in _MEDIA:
        return _list_media([path], path.parent, heldout="heldout" in path.parent.parts[-1:])
    rows = []
    for place, record in read_records(path, columns):
        try:
            rows.append(replace(_row_of(record), place=place))
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from error
    root = media_root if media_root is not None else path.parent
    rows = [replace(row, root=root) for row in rows]
    missing = sorted({row.path for row in rows if not row.file.is_file()})
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} media files do not exist below {root}: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; set --media-root"
        )
    return rows


def _read_glob(pattern: str, media_root: Path | None, columns: Columns) -> list[Row]:
    matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    wanted = [p for p in matches if extension_of(p) in (*_MEDIA, *MANIFEST_EXTENSIONS) and p.is_file()]
    if not wanted:
        raise ConfigError(f"{pattern}: the glob matches {len(matches)} files, none of them media or a manifest")
    rows: list[Row] = []
    media = [p for p in wanted if extension_of(p) in _MEDIA]
    if media:
        fixed = Path(*_leading_parts(pattern))
        rows += _list_media(media, fixed, heldout="heldout" in fixed.parts)
    for path in wanted:
        if extension_of(path) not in _MEDIA:
            rows += _read_file(path, media_root, columns)
    return rows


def _leading_parts(pattern: str) -> Iterable[str]:
    """Take the folders of a glob before its first wildcard."""
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _list_media(files: Sequence[Path], folder: Path, *, heldout: bool) -> list[Row]:
    rows = []
    for path in files:
        if path.is_file():
            relative = path.relative_to(folder)
            split = "heldout" if heldout or "heldout" in relative.parts[:-1] else "train"
            rows.append(
                Row(number=0, path=relative.as_posix(), captions=_captions_beside(path), split=split, root=folder)
            )
    return rows


def _captions_beside(path: Path) -> Captions:
    """Read the captions in ``name.txt`` or ``name.captions.json``; () where there is neither."""
    text, weighted = path.with_suffix(".txt"), path.with_suffix(".captions.json")
    try:
        if not weighted.is_file():
            return ((parse_text(text.read_text("utf-8-sig"), "caption"), 1.0),) if text.is_file() else ()
        if text.is_file():
            raise ConfigError(f"{weighted}: got {text.name} too, needed one of them")
        return parse_captions(json.loads(read_text(weighted)))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text}: caption is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{weighted}: {error}") from error


def _row_of(record: Mapping[str, Any]) -> Row:
    """Check a manifest's row; ``ValueError`` says what is wrong with it."""
    unknown = sorted(record.keys() - set(FIELDS))
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown field; needed some of {', '.join(FIELDS)}")
    path = record.get("path")
    if not isinstance(path, str):
        raise ValueError(f"path: got {path!r:.80}, needed the name of a media file")
    if extension_of(path) not in _MEDIA:
        raise ValueError(f"path: got {path!r}, needed one of .{', .'.join(_MEDIA)}")
    if "captions" in record:
        if record.get("caption"):
            raise ValueError("caption: got captions too, needed one of them")
        captions = parse_captions(record["captions"])
    elif "caption" in record or "label" not in record:
        captions = ((parse_text(record.get("caption"), "caption"), 1.0),)
    else:  # a class alone
        captions = ()
    label, class_name = parse_label(record.get("label"))
    if record.get("label") is not None and label < 0 and not class_name:
        raise ValueError(f"label: got {record['label']!r:.80}, needed a class number, 0 or more, or a name")
    split = record.get("split", "train")
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, needed {' or '.join(SPLITS)}")
    start, end = (_seconds(record, name) for name in ("start", "end"))
    if end is not None and end <= (start or 0):
        raise ValueError(f"end: got {end}, needed more than start = {start or 0}")
    for name, value in (("start", start), ("end", end)):
        if value is not None and extension_of(path) in IMAGE_EXTENSIONS:
            raise ValueError(f"{name}: got {value} for the image {path}, needed none: only videos have start and end")
    told = {"label": label, "class_name": class_name}
    return Row(number=0, path=path, captions=captions, start=start, end=end, split=split, **told)  # type: ignore[arg-type]


def number_classes(rows: Sequence[Row], classes: Sequence[str] | None) -> list[Row]:
    """Give rows of a class both its number and its name.

    Args:
        rows: All rows of a job.
        classes: Names of the classes by number; None numbers the names of the rows in alphabetical order.

    Returns:
        The rows; those without a class, and with numbers where there are no names, as they were.

    Raises:
        ConfigError: If a name or number is not in the list, or there is none and the rows have numbers and names.
    """
    named = sorted({row.class_name for row in rows if row.class_name})
    if classes is None and named:
        numbered = next((row for row in rows if row.label >= 0), None)
        if numbered is not None:
            raise ConfigError(
                f"{_place(numbered)}: label: got the number {numbered.label}, but other rows have names such as "
                f"{named[0]!r}; give the class list with --classes"
            )
        classes = named
    if classes is None:
        return list(rows)
    numbers = {name: number for number, name in enumerate(classes)}
    made = []
    for row in rows:
        if row.class_name and row.class_name not in numbers:
            raise ConfigError(f"{_place(row)}: label: {unknown_class(row.class_name, classes)}")
        if row.label >= len(classes):
            raise ConfigError(f"{_place(row)}: label: got {row.label}, needed less than {len(classes)} (--classes)")
        number = numbers.get(row.class_name, row.label)
        made.append(row if number < 0 else replace(row, label=number, class_name=classes[number]))
    return made


def _seconds(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    # A bound far above any film, because an integer too long for a float overflows.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12 or math.isnan(value):
        raise ValueError(f"{name}: got {value!r:.40}, needed seconds, 0 or more")
    return value


def _place(row: Row) -> str:
    return row.place or f"sample {row.number + 1}"


def _refuse_repeats(rows: Sequence[Row]) -> None:
    seen: dict[tuple[str, float | None, float | None], Row] = {}
    for row in rows:
        first = seen.setdefault((os.path.abspath(row.file), row.start or None, row.end), row)
        if first is not row:
            raise ConfigError(
                f"{_place(row)} repeats {_place(first)}: {row.path}, start {row.start}, end "
                f"{row.end}; needed each once (several captions of one sample go into its field captions)"
            )
