"""Finished samples in a work folder, made from rows in any order, each once: what a killed job need not do again.

Beside the medium of each piece lies a record of how it was made, or why there is none. A record comes last.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.curate.duplicates import media_hashes
from ltd.data.curate.filters import FilterOptions, probe_file, refusal
from ltd.data.curate.shots import Detection, ShotDetector, ShotOptions, detect_shots, shot_rows
from ltd.data.cut import CutOptions, Piece, cut_image, cut_video, failed
from ltd.data.jobs import run_in_threads
from ltd.data.manifest import Row
from ltd.data.write import write_bytes
from ltd.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """How shards are made."""

    cut: CutOptions = field(default_factory=CutOptions)  #: How samples are stored.
    shots: ShotOptions = field(default_factory=ShotOptions)  #: How long detected shots may be.
    filters: FilterOptions = field(default_factory=FilterOptions)  #: What is left out.
    shard_size_mb: float = 512.0  #: Size after which a tar is closed, MiB, > 0.
    workers: int = 2  #: Source files or tars worked on at once, >= 1.

    def __post_init__(self) -> None:
        if not 0 < self.shard_size_mb < math.inf:
            raise ConfigError(f"shard_size_mb: got {self.shard_size_mb}, needed more than 0")
        if self.workers < 1:
            raise ConfigError(f"workers: got {self.workers}, needed 1 or more")


@dataclass(frozen=True, kw_only=True)
class Record:
    """How one piece was made."""

    extension: str = ""  #: Extension of its medium.
    num_bytes: int = 0  #: Size of its medium.
    provenance: dict[str, Any] = field(default_factory=dict)  #: What the json member says.
    hashes: tuple[int, ...] = ()  #: Perceptual hashes, where near-duplicates are looked for.
    error: str | None = None  #: Why there is no piece, after its cause and a colon; None for a good one.
    filtered: tuple[str, str] | None = None  #: Filter that left it out, and why.


@dataclass
class Expansion:
    """Rows after shots were looked for."""

    rows: list[Row]  #: What to cut.
    failures: list[tuple[Row, str]] = field(default_factory=list)  #: Videos without shots, and why.
    too_short: list[tuple[Row, int]] = field(default_factory=list)  #: Videos with shots that were too short, how many.
    videos: int = 0  #: Videos whose shots were found.


def read_record(row: Row, folder: Path) -> Record:
    """Read the record of a row's piece.

    Args:
        row: The row.
        folder: Folder of the pieces.

    Returns:
        The record.
    """
    plain = json.loads((folder / f"{row.key}.json").read_text("utf-8"))
    plain["hashes"] = tuple(plain["hashes"])
    plain["filtered"] = None if plain["filtered"] is None else tuple(plain["filtered"])
    return Record(**plain)


def media_path(row: Row, record: Record, folder: Path) -> Path:
    """Name the file of a piece's medium."""
    return folder / f"{row.key}.{record.extension}"


def expand_shots(rows: Sequence[Row], folder: Path, detector: ShotDetector, options: ShardOptions) -> Expansion:
    """Turn whole videos into a row per shot; what is found is kept in the folder.

    Args:
        rows: All rows; images and rows with ``start`` or ``end`` stay as they are.
        folder: Where detected shots are kept.
        detector: Finds them.
        options: How long shots may be, and how many videos are worked on at once.

    Returns:
        The rows, in the same order.
    """
    whole = [row for row in rows if row.kind == "video" and not row.start and row.end is None]
    todo = [row for row in whole if not (folder / f"{row.key}.json").is_file()]
    threads = _decoder_threads(options.workers, len(todo))

    def detect(row: Row) -> Iterator[None]:
        found: dict[str, Any]
        try:
            found = asdict(detect_shots(row.file, detector, threads=threads))
        except Exception as error:  # whatever a damaged film does to a decoder or detector
            found = {"error": failed(row, error).error}
        write_bytes(folder / f"{row.key}.json", json.dumps(found).encode())
        yield None

    with Progress(len(whole), "detecting shots", unit="video", done=len(whole) - len(todo)) as progress:
        todo.sort(key=lambda row: -row.file.stat().st_size)
        for _ in run_in_threads(todo, detect, num_threads=options.workers):
            progress.update()
    expansion, numbers = Expansion([]), {row.number for row in whole}
    for row in rows:
        if row.number in numbers:
            _expand(row, json.loads((folder / f"{row.key}.json").read_text("utf-8")), options.shots, expansion)
        else:
            expansion.rows.append(row)
    return expansion


def _expand(row: Row, found: dict[str, Any], options: ShotOptions, expansion: Expansion) -> None:
    if "error" in found:
        logger.warning("%s: left out: %s", row.path, found["error"])
        expansion.failures.append((row, found["error"]))
        return
    spans = tuple((start, stop) for start, stop in found["spans"])
    made, short = shot_rows(row, Detection(spans, found["frames"], found["fps"]), options)
    expansion.rows += made
    expansion.videos += 1
    if short:
        expansion.too_short.append((row, short))


def make_pieces(rows: Sequence[Row], folder: Path, options: ShardOptions) -> None:
    """Make the pieces that the folder lacks.

    Args:
        rows: What to make.
        folder: Folder of the pieces.
        options: How to make them; ``workers`` files at once, all rows of a file in one pass over it.
    """
    todo = [row for row in rows if not (folder / f"{row.key}.json").is_file()]
    groups: dict[Path, list[Row]] = {}
    for row in todo:
        groups.setdefault(row.file, []).append(row)
    threads = _decoder_threads(options.workers, len(groups))

    def make(group: list[Row]) -> Iterator[None]:
        for piece, filtered in _make(group, options, threads):
            _store(piece, filtered, folder, options)
            yield None

    with Progress(len(rows), "cutting samples", unit="sample", done=len(rows) - len(todo)) as progress:
        # The sources with the most samples first, so that no long film starts last.
        jobs = sorted(groups.values(), key=lambda group: -len(group))
        for _ in run_in_threads(jobs, make, num_threads=options.workers):
            progress.update()


def _decoder_threads(workers: int, jobs: int) -> int:
    # At least two: beside many small files one film must not decide how long it all takes.
    return max(2, (os.cpu_count() or 1) // max(1, min(workers, jobs)))


def _make(group: list[Row], options: ShardOptions, threads: int) -> Iterator[tuple[Piece, tuple[str, str] | None]]:
    """Cut the rows of one file that keep the limits, with the limit that the others break."""
    if options.filters.probes:
        kept = []
        try:
            info = probe_file(group[0].file)
        except (BadSampleError, OSError) as error:
            yield from ((failed(row, error), None) for row in group)
            return
        for row in group:
            try:
                broken = refusal(row, info, options.filters)
            except BadSampleError as error:
                yield failed(row, error), None
                continue
            if broken is None:
                kept.append(row)
            else:
                yield Piece(row, "", b"", {}), broken
        group = kept
    done = set()
    try:
        for piece in _cut(group, options.cut, threads):
            done.add(piece.row.key)
            yield piece, None
    except Exception as error:  # a codec's own surprise must not lose the other sources
        yield from ((failed(row, error), None) for row in group if row.key not in done)


def _cut(group: list[Row], options: CutOptions, threads: int) -> Iterator[Piece]:
    if group and group[0].kind == "image":
        yield from (cut_image(row, options) for row in group)
    elif group:
        yield from cut_video(group, options, threads=threads)


def _store(piece: Piece, filtered: tuple[str, str] | None, folder: Path, options: ShardOptions) -> None:
    hashes: tuple[int, ...] = ()
    if piece.error is None and filtered is None and options.filters.dedupe_bits is not None:
        try:
            hashes = media_hashes(piece.data, piece.extension, frames=piece.provenance["frames"])
        except BadSampleError as error:
            piece = failed(piece.row, error)
    record = Record(
        extension=piece.extension,
        num_bytes=len(piece.data),
        provenance=piece.provenance,
        hashes=hashes,
        error=piece.error,
        filtered=filtered,
    )
    if piece.error is not None:
        logger.warning("%s: left out: %s", piece.row.path, piece.error)
    elif filtered is None:
        write_bytes(media_path(piece.row, record, folder), piece.data)
    write_bytes(folder / f"{piece.row.key}.json", json.dumps(asdict(record)).encode())
