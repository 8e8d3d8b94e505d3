"""Manifest files as plain records: JSONL, CSV and Parquet, each with the place a message names. Checks no meaning."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltd.config import ConfigError

logger = logging.getLogger(__name__)

FIELDS = ("path", "caption", "captions", "label", "start", "end", "split")
TABLES = ("csv", "tsv", "parquet")
#: Extensions of manifests; other files are read as JSONL too.
MANIFEST_EXTENSIONS = ("jsonl", *TABLES)

Captions = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What a manifest calls the fields that every data set names in its own way."""

    path: str = "path"  #: Column of the media file.
    caption: str = "caption"  #: Column of the caption, or of a list of captions.
    label: str = "label"  #: Column of the class, a number or a name.


def read_records(path: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a manifest.

    Args:
        path: File; its extension tells CSV, TSV and Parquet, everything else is JSONL.
        columns: What it calls its fields.

    Yields:
        The place of a row for messages ("m.csv line 3"), and its fields under our names. Tables leave out what is empty
        and columns that are none of ours; JSONL keeps all, for the caller to refuse.

    Raises:
        ConfigError: If the file cannot be read as what it claims to be.
    """
    kind = path.suffix.lstrip(".").lower()
    try:
        if kind == "parquet":
            yield from _read_parquet(path, columns)
        elif kind in ("csv", "tsv"):
            yield from _read_csv(path, columns, "\t" if kind == "tsv" else ",")
        else:
            yield from _read_jsonl(path, columns)
    except OSError as error:
        raise ConfigError(f"{path}: does not read: {error}") from error


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Args:
        path: File.

    Returns:
        Its text.

    Raises:
        ConfigError: If it is not UTF-8; says in which line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} line {line}: not UTF-8: byte 0x{data[error.start]:02x}; needed UTF-8 (iconv converts)"
        ) from error


def _renamed(record: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Put our names in the place of the manifest's; a list of captions may stand in the caption column."""
    names = {columns.path: "path", columns.caption: "caption", columns.label: "label"}
    ours = {names.get(key, key): value for key, value in record.items() if key not in names.values() or key in names}
    if isinstance(ours.get("caption"), list) and columns.caption != "caption":
        ours["captions"] = ours.pop("caption")
    return ours


def _read_jsonl(path: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place}: not JSON: {error}") from error
        if not isinstance(record, Mapping):
            raise ConfigError(f"{place}: got {type(record).__name__}, needed an object with path and caption")
        yield place, _renamed(record, columns)


def _our_columns(path: Path, names: Sequence[str], columns: Columns) -> list[str]:
    """Choose the columns to read, name the others once, refuse what is missing."""
    listed = ", ".join(names) or "none"
    repeated = sorted({name for name in names if names.count(name) > 1 and name})
    if repeated:
        raise ConfigError(f"{path}: got the column {repeated[0]!r} twice, needed each name once")
    if columns.path not in names:
        raise ConfigError(f"{path}: got no column {columns.path!r} (columns: {listed}); set --path-column")
    if not {columns.caption, "captions", columns.label} & set(names):
        raise ConfigError(
            f"{path}: got no column {columns.caption!r} or 'captions' (columns: {listed}); set --caption-column, or "
            "--label-column for classes without captions"
        )
    wanted = [*dict.fromkeys([columns.path, columns.caption, "captions", columns.label, "start", "end", "split"])]
    foreign = [name for name in names if name not in wanted]
    if foreign:
        logger.info("%s: columns that are not read: %s", path, ", ".join(foreign))
    return [name for name in wanted if name in names]


def _read_csv(path: Path, columns: Columns, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        wanted = _our_columns(path, names, columns)
        for cells in reader:
            if not any(cells):
                continue
            place = f"{path} line {reader.line_num}"
            if len(cells) != len(names):
                raise ConfigError(f"{place}: got {len(cells)} cells, needed {len(names)}: {', '.join(names)}")
            row = dict(zip(names, cells, strict=True))
            yield place, _table_row({name: row[name] for name in wanted if row[name].strip()}, columns, place)
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num}: not CSV: {error}") from error


def _table_row(row: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    """Make a record of cells that are not empty; numbers and lists may be text."""
    record = _renamed(row, columns)
    for name in ("start", "end"):
        if isinstance(record.get(name), str):
            try:
                record[name] = float(record[name])
            except ValueError:
                raise ConfigError(f"{place}: {name}: got {record[name]!r}, needed seconds, 0 or more") from None
    if isinstance(record.get("captions"), str):
        try:
            record["captions"] = json.loads(record["captions"])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place}: captions: not a JSON list: {error}") from error
    if "captions" not in record:
        record.setdefault("caption", "")
    return record


def _read_parquet(path: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install 'ltd[curate]'"
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = _our_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{path} row {number}"
                    cells = {name: value for name, value in row.items() if not _empty(value)}
                    yield place, _table_row(cells, columns, place)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: not a Parquet file that can be read: {message}") from error


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def parse_captions(value: Any) -> Captions:
    """Check weighted captions.

    Args:
        value: List of texts, or of objects with ``text`` and, optionally, ``weight``.

    Returns:
        Texts without surrounding white space, with their weights; one empty text for an empty list.

    Raises:
        ValueError: If it is something else, or a weight is not a finite number above 0.
    """
    if not isinstance(value, list):
        raise ValueError(f"captions: got {_short(value)}, needed a list of texts or of {{text, weight}}")
    found = []
    for item in value:
        text, weight = item, 1.0
        if isinstance(item, Mapping):
            unknown = sorted(str(name) for name in item.keys() - {"text", "weight"})
            if unknown:
                raise ValueError(f"captions: {unknown[0]}: unknown field; needed text and weight")
            text, weight = item.get("text"), 1.0 if item.get("weight") is None else item["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"captions: weight: got {_short(weight)}, needed a finite number above 0")
        found.append((parse_text(text, "captions"), float(weight)))
    return tuple(found) or (("", 1.0),)


def parse_text(value: Any, field: str) -> str:
    """Check a caption.

    Args:
        value: What the manifest holds.
        field: Its name, for the message.

    Returns:
        The text without surrounding white space.

    Raises:
        ValueError: If it is not text, or text that UTF-8 cannot store.
    """
    if not isinstance(value, str):
        raise ValueError(f'{field}: got {_short(value)}, needed text ("" for a sample without caption)')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field}: got {_short(value)}, which UTF-8 cannot store") from error
    return value.strip()


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
