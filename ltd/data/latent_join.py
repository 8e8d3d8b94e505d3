"""Make one latent cache of the parts that ``ltd.data.latent_writer`` wrote: columns of all windows, each text once."""

from __future__ import annotations

import io
import json
import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ltd.config import ConfigError
from ltd.data.batch import UNKNOWN_GEOMETRY
from ltd.data.entries import KINDS, NO_LABEL, Strings
from ltd.data.latents import DTYPES, GEOMETRY
from ltd.data.write import write_bytes

_COLUMNS = {
    "kind": np.uint8,
    "frames": np.int32,
    "height": np.int32,
    "width": np.int32,
    "fps": np.float64,
    "file": np.int32,
    "row": np.int64,
    "captions": np.int32,
    "label": np.int32,
    "class_name": np.int32,
    **dict.fromkeys(GEOMETRY, np.float32),
}


def finish_cache(directory: str | Path, *, accept_unreadable: bool = False) -> dict[str, Any]:
    """Join the parts of all processes once each has closed its writer; one process calls this.

    Args:
        directory: The cache.
        accept_unreadable: Whether windows whose bytes could not be read are left out for good.

    Returns:
        The manifest.

    Raises:
        ConfigError: If windows or embeddings are missing, could not be read, or a file lacks recorded rows; says how
            many.
    """
    directory = Path(directory)
    manifest = json.loads((directory / "writing.json").read_text("utf-8"))
    joined = _Joined()
    for part in sorted((directory / "parts").iterdir()):
        joined.read(part / "records.jsonl")
    done = len(joined.keys) + len(joined.bad)
    if done < manifest["windows"]:
        raise ConfigError(f"out: {directory} has {done} of {manifest['windows']} windows; run the command again")
    unreadable = [record for record in joined.bad.values() if record["cause"] == "unreadable"]
    if unreadable and not accept_unreadable:
        raise ConfigError(
            f"out: {directory}: {len(unreadable)} windows could not be read (the first: {unreadable[0]['message']}); "
            "run the command again, or leave them out with accept_unreadable: true"
        )
    with_text = manifest["text_encoder"] is not None
    missing = joined.text_ids.keys() - joined.embeddings.keys() if with_text else ()
    if missing:
        raise ConfigError(f"out: {directory} lacks {len(missing)} text embeddings; run the command again")
    itemsize = DTYPES[manifest["dtype"]].itemsize
    for path, shape, rows in zip(joined.file_ids, joined.shapes, joined.rows, strict=True):
        _check_rows(directory / path, 2 * int(np.prod(shape)) * itemsize, rows)
    manifest["files"] = [
        {"path": path, "shape": shape, "rows": rows}
        for path, shape, rows in zip(joined.file_ids, joined.shapes, joined.rows, strict=True)
    ]
    for file in manifest["files"]:
        if file["path"] in joined.features:
            file["features"] = joined.features[file["path"]]
            size = int(np.prod(file["features"]["shape"])) * itemsize
            _check_rows(directory / file["features"]["path"], size, file["rows"])
    _write_columns(directory, joined)
    manifest["classes"] = list(joined.classes)[1:]
    manifest["text_files"], dropped = _write_texts(directory, joined, itemsize) if with_text else ([], [])
    bad = "".join(json.dumps(joined.bad[position]) + "\n" for position in sorted(joined.bad))
    write_bytes(directory / "bad.jsonl", bad.encode())
    manifest["counts"] = {
        "windows": len(joined.keys),
        "bad": len(joined.bad),
        "captions": len(joined.text_ids),
        "text_tokens": _text_tokens(manifest, joined) if with_text else 0,
        "text_dim": joined.text_dim,
    }
    write_bytes(directory / "manifest.json", json.dumps(manifest, indent=1).encode())
    for old in dropped:  # only now: a join that is killed before can be run again
        old.unlink()
    return dict(manifest)


@dataclass
class _Joined:
    """What the records of all parts say: the first record of each window and of each text."""

    keys: list[str] = field(default_factory=list)
    numbers: dict[str, array[float]] = field(default_factory=dict)  # columns, in the order of the records
    caption_text: array[int] = field(default_factory=lambda: array("q"))
    caption_weight: array[float] = field(default_factory=lambda: array("d"))
    seen: set[int] = field(default_factory=set)
    bad: dict[int, dict[str, Any]] = field(default_factory=dict)
    file_ids: dict[str, int] = field(default_factory=dict)
    shapes: list[list[int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    features: dict[str, dict[str, Any]] = field(default_factory=dict)  # path and shape, by file of latents
    text_ids: dict[str, int] = field(default_factory=lambda: {"": 0})  # of the windows that are kept
    embeddings: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # file, first row, tokens
    text_parts: dict[str, list[int]] = field(default_factory=dict)  # tokens of each of several encoders
    text_dim: int = 0
    classes: dict[str, int] = field(default_factory=lambda: {"": NO_LABEL})

    def read(self, path: Path) -> None:
        if not path.is_file():
            return
        with path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # a killed run leaves half a line
                    self._add(json.loads(line))

    def _add(self, record: Mapping[str, Any]) -> None:
        if "text" in record:
            self.text_dim = record["shape"][0]
            self.embeddings.setdefault(record["text"], (record["file"], record["row"], record["tokens"]))
            if "parts" in record:
                self.text_parts.setdefault(record["text"], record["parts"])
        elif record["position"] not in self.seen:
            if "file" in record:
                self.seen.add(record["position"])
                self.bad.pop(record["position"], None)  # a later run could read it
                self._add_window(record)
            else:
                self.bad[record["position"]] = dict(record)

    def _add_window(self, record: Mapping[str, Any]) -> None:
        file = self.file_ids.setdefault(record["file"], len(self.file_ids))
        if file == len(self.shapes):
            self.shapes.append(record["shape"])
            self.rows.append(0)
            if "features" in record:
                self.features[record["file"]] = record["features"]
        self.rows[file] = max(self.rows[file], record["row"] + 1)
        self.keys.append(record["key"])
        numbers = {name: record[name] for name in ("position", "frames", "height", "width", "fps", "row")}
        numbers |= {"kind": KINDS.index(record["kind"]), "file": file, "captions": len(record["captions"])}
        # -1, 0, 1 and so on, in the order they come
        named = self.classes.setdefault(record.get("class", ""), len(self.classes) - 1)
        numbers |= {"label": record.get("label", NO_LABEL), "class_name": named}  # format 2 has neither, nor cuts
        numbers |= dict(zip(GEOMETRY, record.get("geometry", UNKNOWN_GEOMETRY), strict=True))
        for name, number in numbers.items():
            self.numbers.setdefault(name, array("d")).append(number)
        for text, weight in record["captions"]:
            self.caption_text.append(self.text_ids.setdefault(text, len(self.text_ids)))
            self.caption_weight.append(weight)


def _text_tokens(manifest: Mapping[str, Any], joined: _Joined) -> int:
    """Count the tokens that texts are padded to: all stretches of several encoders, or those of the longest text."""
    if manifest.get("text_parts"):
        return sum(int(tokens) for tokens, _ in manifest["text_parts"])
    return max((joined.embeddings[text][2] for text in joined.text_ids), default=0)


def _check_rows(path: Path, row_bytes: int, needed: int) -> None:
    found = path.stat().st_size // row_bytes if path.is_file() else 0
    if found < needed:
        raise ConfigError(f"out: {path} has {found} of {needed} recorded rows; delete the cache and make it again")


def _write_columns(directory: Path, joined: _Joined) -> None:
    """Write what the windows are, in the order of their positions."""
    numbers = {name: np.frombuffer(values) for name, values in joined.numbers.items()}
    order = np.argsort(numbers["position"]) if numbers else np.zeros(0, dtype=np.int64)
    for name, dtype in _COLUMNS.items():
        _write_column(directory, name, numbers[name][order].astype(dtype) if numbers else np.zeros(0, dtype))
    counts = numbers["captions"].astype(np.int64) if numbers else np.zeros(0, dtype=np.int64)
    firsts = (np.cumsum(counts) - counts)[order]
    counts = counts[order]
    places = np.repeat(firsts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    texts = np.array(joined.caption_text, dtype=np.int32)[places]
    chars = np.array([len(text) for text in joined.text_ids], dtype=np.int32)
    _write_column(directory, "caption_text", texts)
    _write_column(directory, "caption_chars", chars[texts])
    _write_column(directory, "caption_weight", np.array(joined.caption_weight, dtype=np.float64)[places])
    _write_strings(directory, "keys", [joined.keys[place] for place in order.tolist()])
    _write_strings(directory, "texts", joined.text_ids)


def _write_column(directory: Path, name: str, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_bytes(directory / "columns" / f"{name}.npy", buffer.getvalue())


def _write_strings(directory: Path, name: str, strings: Iterable[str]) -> None:
    packed = Strings.of(strings)
    write_bytes(directory / "columns" / f"{name}.bin", packed.buffer)
    _write_column(directory, f"{name}_ends", packed.ends)


def _write_texts(directory: Path, joined: _Joined, itemsize: int) -> tuple[list[dict[str, Any]], list[Path]]:
    """Write where the embedding of each text lies; parts that hold a text another part holds too are written anew.

    Returns:
        Files of embeddings with their rows; files to delete.
    """
    by_file: dict[str, list[tuple[int, int, int]]] = {}
    for text, number in joined.text_ids.items():
        file, row, tokens = joined.embeddings[text]
        by_file.setdefault(file, []).append((row, tokens, number))
    row_bytes = joined.text_dim * itemsize
    files: list[dict[str, Any]] = []
    columns = {
        name: np.zeros(len(joined.text_ids), dtype) for name, dtype in (("file", "i4"), ("row", "i8"), ("tokens", "i4"))
    }
    for path, mine in by_file.items():
        mine.sort()
        needed, kept = max(row + tokens for row, tokens, _ in mine), sum(tokens for _, tokens, _ in mine)
        _check_rows(directory / path, row_bytes, needed)
        name = path
        if kept < (directory / path).stat().st_size // row_bytes:
            name = path.replace("text.bin", "text_once.bin")
            _copy_rows(directory / path, directory / name, row_bytes, [(row, tokens) for row, tokens, _ in mine])
            needed = kept
        end = 0
        for row, tokens, number in mine:
            values = {"file": len(files), "row": row if name == path else end, "tokens": tokens}
            end += tokens
            for column, value in values.items():
                columns[column][number] = value
        files.append({"path": name, "rows": needed})
    for column, numbers in columns.items():
        _write_column(directory, f"text_{column}", numbers)
    if joined.text_parts:
        counts = np.array([joined.text_parts[text] for text in joined.text_ids], dtype=np.int32)
        _write_column(directory, "text_parts", counts)
    kept_paths = {directory / file["path"] for file in files}
    return files, [path for path in sorted(directory.glob("parts/*/text*.bin")) if path not in kept_paths]


def _copy_rows(source: Path, target: Path, row_bytes: int, spans: Iterable[tuple[int, int]]) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        for row, count in spans:
            reading.seek(row * row_bytes)
            writing.write(reading.read(count * row_bytes))
        writing.flush()
        os.fsync(writing.fileno())
