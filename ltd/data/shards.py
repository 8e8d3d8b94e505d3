"""Make WebDataset tars from rows of media: resumable, deterministic, all or nothing.

Finished samples are kept in a work folder beside the shards until all are made, so that a killed run goes on where it
stopped; then the tars are packed in manifest order and take the place of the old ones. The only importer of webdataset.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ltd.config import ConfigError, digest
from ltd.data.cut import CutOptions, Piece, cut_image, cut_video
from ltd.data.index import find_shards, index_tar
from ltd.data.manifest import SPLITS, Row, read_rows
from ltd.data.write import write_bytes
from ltd.progress import Progress

logger = logging.getLogger(__name__)

FORMAT = 1
REPORT = "make_shards.json"


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """How shards are made."""

    cut: CutOptions = field(default_factory=CutOptions)  #: How samples are stored.
    shard_size_mb: float = 512.0  #: Size after which a tar is closed, MiB, > 0.
    workers: int = 2  #: Source files worked on at once, >= 1.

    def __post_init__(self) -> None:
        if not self.shard_size_mb > 0:
            raise ConfigError(f"shard_size_mb: got {self.shard_size_mb}, needed more than 0")
        if self.workers < 1:
            raise ConfigError(f"workers: got {self.workers}, needed 1 or more")


def manifest_digest(rows: Sequence[Row], root: Path, options: ShardOptions) -> str:
    """Hash everything the shards depend on: rows, the state of each source file, how samples are stored.

    Args:
        rows: The rows.
        root: Folder of the media.
        options: How shards are made; ``workers`` does not count.

    Returns:
        sha256 in hex.
    """
    sources = {path: (root / path).stat() for path in sorted({row.path for row in rows})}
    return digest(
        {
            "format": FORMAT,
            "rows": [asdict(row) for row in rows],
            "sources": {path: [state.st_size, state.st_mtime_ns] for path, state in sources.items()},
            "cut": asdict(options.cut),
            "shard_size_mb": options.shard_size_mb,
        }
    )


def make_shards(
    source: str | Path, out: str | Path, *, options: ShardOptions, media_root: str | Path | None = None
) -> dict[str, Any]:
    """Make the shards of a manifest or folder in ``out/train`` and ``out/heldout``, each tar with its index.

    Args:
        source: JSONL manifest or folder of media.
        out: Folder of the shards; shards made there before from other inputs are replaced.
        options: How to make them.
        media_root: Folder that the manifest's paths are relative to; None is the manifest's own.

    Returns:
        The report: counts per split, samples left out with the cause.

    Raises:
        ConfigError: If the inputs are wrong, ``out`` holds shards of another origin, or no sample can be made.
    """
    rows, root = read_rows(source, media_root)
    out = Path(out)
    identity = manifest_digest(rows, root, options)
    old = _read_report(out)
    if old is not None and old["digest"] == identity and _whole(out, old):
        logger.info("%s is up to date: %s", out, summary(old))
        return old
    if old is None and any((out / split).exists() for split in SPLITS):
        raise ConfigError(
            f"--out: {out} holds a {' or '.join(SPLITS)} folder that this tool did not make; choose another"
        )
    work = out / f".work-{identity[:16]}"
    (work / "pieces").mkdir(parents=True, exist_ok=True)
    for stale in out.glob(".work-*"):
        if stale != work:
            shutil.rmtree(stale)
    _make_pieces(rows, root, work / "pieces", options)
    report = _pack(rows, work, options)
    report.update(format=FORMAT, digest=identity, options=asdict(options.cut))
    if not any(counts["samples"] for counts in report["splits"].values()):
        raise ConfigError(f"{source}: none of the {len(rows)} samples can be made: {report['skipped'][:3]}")
    _publish(out, work, report)
    logger.info("%s: %s", out, summary(report))
    return report


def summary(report: dict[str, Any]) -> str:
    """Describe a report in one line."""
    parts = [
        f"{split}: {n['samples']} samples ({n['images']} images, {n['videos']} clips, {n['frames']} frames, "
        f"{n['uncaptioned']} without caption) in {len(n['shards'])} tars"
        for split, n in report["splits"].items()
    ]
    causes = Counter(record["error"].split(":")[0] for record in report["skipped"])
    skipped = ", ".join(f"{count} {cause}" for cause, count in causes.most_common()) or "none"
    return f"{'; '.join(parts)}; left out: {skipped}"


def _read_report(out: Path) -> dict[str, Any] | None:
    path = out / REPORT
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else None


def _whole(out: Path, report: dict[str, Any]) -> bool:
    tars = [(out / split / name, size) for split, n in report["splits"].items() for name, size in n["shards"]]
    return all(
        tar.is_file() and tar.stat().st_size == size and Path(f"{tar}.index.jsonl").is_file() for tar, size in tars
    )


def _make_pieces(rows: Sequence[Row], root: Path, pieces: Path, options: ShardOptions) -> None:
    todo = [row for row in rows if not (pieces / f"{row.key}.json").is_file()]
    with Progress(len(rows), "cutting samples", unit="sample", done=len(rows) - len(todo)) as progress:
        for piece in _cut_all(todo, root, options):
            record = {"extension": piece.extension, "provenance": piece.provenance, "error": piece.error}
            if piece.error is None:
                write_bytes(pieces / f"{piece.row.key}.{piece.extension}", piece.data)
            else:
                logger.warning("%s: left out: %s", piece.row.path, piece.error)
            write_bytes(pieces / f"{piece.row.key}.json", json.dumps(record).encode())
            progress.update()


def _cut_all(rows: Sequence[Row], root: Path, options: ShardOptions) -> Iterator[Piece]:
    """Cut the rows of each source file in a thread, ``workers`` files at once; finished pieces in any order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.path, []).append(row)
    # The sources with the most samples first, so that no long film starts last.
    jobs: queue.SimpleQueue[list[Row]] = queue.SimpleQueue()
    for group in sorted(groups.values(), key=lambda group: -len(group)):
        jobs.put(group)
    # At least two decoder threads: beside many small files one film must not decide how long it all takes.
    threads = max(2, (os.cpu_count() or 1) // min(options.workers, len(groups) or 1))
    done: queue.Queue[Piece | BaseException | None] = queue.Queue(maxsize=64)

    def work() -> None:
        try:
            while True:
                group = jobs.get_nowait()
                if group[0].kind == "image":
                    for row in group:
                        done.put(cut_image(row, root, options.cut))
                else:
                    for piece in cut_video(group, root, options.cut, threads=threads):
                        done.put(piece)
        except queue.Empty:
            done.put(None)
        except BaseException as error:
            done.put(error)

    for _ in range(options.workers):
        threading.Thread(target=work, name="ltd-cut", daemon=True).start()
    running = options.workers
    while running:
        item = done.get()
        if item is None:
            running -= 1
        elif isinstance(item, BaseException):
            raise item
        else:
            yield item


class _Packer:
    """Tars of one split while they are written."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.writer: Any = None
        self.paths: list[Path] = []
        self.size = 0

    def add(self, sample: dict[str, Any]) -> None:
        if self.writer is None or self.size >= self.limit:
            self._open()
        self.size += self.writer.write(sample)

    def _open(self) -> None:
        from webdataset import TarWriter

        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.paths.append(self.folder / f"{len(self.paths):06d}.tar")
        self.writer, self.size = TarWriter(str(self.paths[-1]), encoder=False, mtime=0.0), 0

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _pack(rows: Sequence[Row], work: Path, options: ShardOptions) -> dict[str, Any]:
    """Write the tars of each split in manifest order and index them."""
    packers = {split: _Packer(work / split, options.shard_size_mb * 2**20) for split in SPLITS}
    report: dict[str, Any] = {"splits": {}, "skipped": []}
    counts = {split: Counter(samples=0, images=0, videos=0, frames=0, uncaptioned=0) for split in SPLITS}
    for split in SPLITS:
        shutil.rmtree(work / split, ignore_errors=True)
    for row in rows:
        record = json.loads((work / "pieces" / f"{row.key}.json").read_text("utf-8"))
        if record["error"] is not None:
            report["skipped"].append({"path": row.path, "number": row.number, "error": record["error"]})
            continue
        extension, provenance = record["extension"], record["provenance"]
        sample: dict[str, Any] = {"__key__": row.key, "json": json.dumps(provenance, sort_keys=True).encode()}
        sample[extension] = (work / "pieces" / f"{row.key}.{extension}").read_bytes()
        if row.caption is not None:
            sample["txt"] = row.caption.encode()
        packers[row.split].add(sample)
        kinds = {"images" if row.kind == "image" else "videos": 1}
        counts[row.split].update(samples=1, frames=provenance["frames"], uncaptioned=int(not row.caption), **kinds)
    for split, packer in packers.items():
        packer.close()
        for tar in packer.paths:
            index_tar(tar)
        shards = [[tar.name, tar.stat().st_size] for tar in packer.paths]
        report["splits"][split] = {**counts[split], "shards": shards}
    return report


def _publish(out: Path, work: Path, report: dict[str, Any]) -> None:
    """Put the new tars in the place of the old ones; the report comes last and vouches for them."""
    (out / REPORT).unlink(missing_ok=True)
    # Until the report is written a marker says that train and heldout are ours to replace.
    write_bytes(out / REPORT, json.dumps({"digest": "", "splits": {}, "skipped": []}).encode())
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)
        if (work / split).is_dir():
            os.replace(work / split, out / split)
    write_bytes(out / REPORT, json.dumps(report, indent=1).encode())
    shutil.rmtree(work)


def index_existing(shards: str | Path | Sequence[str]) -> dict[str, Any]:
    """Index tars that exist already.

    Args:
        shards: A tar, a folder of tars (with ``train`` and ``heldout`` below it or not), a glob or brace pattern.

    Returns:
        Counts: ``tars``, ``samples`` and ``bad`` by cause.
    """
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    tars: list[Path] = []
    for path in map(Path, given):
        below = [path / split for split in SPLITS if any((path / split).glob("*.tar"))]
        nested = below if below and not any(path.glob("*.tar")) else [path]
        for folder in nested:
            tars += find_shards(str(folder))
    samples, causes = 0, Counter[str]()
    with Progress(len(tars), "indexing", unit="tar") as progress:
        for tar in tars:
            entries, bad = index_tar(tar)
            samples += len(entries)
            causes.update(record.cause for record in bad)
            for record in bad[:20]:
                logger.warning("%s: %r left out: %s: %s", tar, record.key, record.cause, record.message)
            progress.update()
    return {"tars": len(tars), "samples": samples, "bad": dict(causes)}
