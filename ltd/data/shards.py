"""Make WebDataset tars from rows of media: resumable, deterministic, all or nothing.

Shots, finished samples and finished tars are kept in a work folder beside the shards until all are made, so that a
killed job goes on where it stopped; then the tars take the place of the old ones. The only importer of webdataset.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ltd.config import ConfigError, digest
from ltd.data.batch import BadSample
from ltd.data.curate.duplicates import NearDuplicates
from ltd.data.curate.shots import ShotDetector
from ltd.data.index import find_shards, index_path, index_tar, read_index
from ltd.data.jobs import run_in_processes, run_in_threads
from ltd.data.manifest import SPLITS, Row, number_classes, read_rows
from ltd.data.pieces import Expansion, Record, ShardOptions, expand_shots, make_pieces, media_path, read_record
from ltd.data.records import Columns
from ltd.data.write import write_bytes
from ltd.progress import Progress

__all__ = ["ShardOptions", "index_existing", "make_shards", "summary"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

FORMAT = 2
REPORT = "make_shards.json"
#: From so many bytes on, tars are written and indexed in processes, which take seconds to start.
_PROCESS_BYTES = 4 * 2**30


def job_digest(rows: Sequence[Row], options: ShardOptions, detector: str | None = None) -> str:
    """Hash everything the shards depend on: rows, the state of each source file, how samples are chosen and stored.

    Args:
        rows: The rows.
        options: How shards are made; ``workers`` does not count.
        detector: What finds shots; None where they are not looked for.

    Returns:
        sha256 in hex.
    """
    # Moving everything changes nothing; nor do classes where there are none.
    left_out = {"root", "place"} | (set() if any(row.label >= 0 for row in rows) else {"label", "class_name"})
    names = [item.name for item in fields(Row) if item.name not in left_out]
    states = {row.file: row.file.stat() for row in rows}
    return digest(
        {
            "format": FORMAT,
            "rows": [[getattr(row, name) for name in names] for row in rows],
            "sources": [[state.st_size, state.st_mtime_ns] for state in states.values()],
            "options": _options(options, detector),
        }
    )


def _options(options: ShardOptions, detector: str | None) -> dict[str, Any]:
    plain = asdict(options)
    del plain["workers"]
    plain["shots"] = None if detector is None else {"detector": detector, **plain["shots"]}
    return plain


def make_shards(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    options: ShardOptions,
    media_root: str | Path | None = None,
    columns: Columns | None = None,
    detector: ShotDetector | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Make the shards of manifests, folders and globs in ``out/train`` and ``out/heldout``, each tar with its index.

    Args:
        sources: As in ``read_rows``.
        out: Folder of the shards; shards made there before from other inputs are replaced.
        options: How to make them.
        media_root: Folder that the manifests' paths are relative to; None is each manifest's own.
        columns: What the manifests call their fields; None for our own names.
        detector: Finds the shots of whole videos; None keeps each video as one sample.
        classes: Names of the classes by number; None numbers the names of the manifests in alphabetical order.

    Returns:
        The report: counts per split, filter and cause, and what was left out.

    Raises:
        ConfigError: If the inputs are wrong, ``out`` cannot be written or holds shards of another origin, or no sample
            can be made.
    """
    rows = number_classes(read_rows(sources, media_root, columns), classes)
    out = Path(out)
    _refuse_own_output(rows, sources, out)
    identity = job_digest(rows, options, None if detector is None else detector.name)
    try:
        old = _read_report(out)
        if old is not None and old["digest"] == identity and _whole(out, old):
            _clear_work(out, keep=None)
            logger.info("%s is up to date: %s", out, summary(old))
            return old
        if old is None and any((out / split).exists() for split in SPLITS):
            raise ConfigError(
                f"--out: {out} holds a {' or '.join(SPLITS)} folder that this tool did not make; choose another"
            )
        work = out / f".work-{identity[:16]}"
        (work / "pieces").mkdir(parents=True, exist_ok=True)
        _clear_work(out, keep=work)
        report = _read_report(work) or _work(rows, work, identity, options, detector)
        _publish(out, work, report)
    except OSError as error:
        raise ConfigError(
            f"--out: {out} cannot be written: {error.strerror or error}; once that is mended, the same command goes on "
            "where it stopped"
        ) from error
    logger.info("%s: %s", out, summary(report))
    return report


def _refuse_own_output(rows: Sequence[Row], sources: str | Path | Sequence[str | Path], out: Path) -> None:
    """Keep the shards of one run from becoming media of the next."""
    place = os.path.abspath(out)
    inside = next((row.file for row in rows if os.path.abspath(row.file).startswith(place + os.sep)), None)
    given = [sources] if isinstance(sources, str | Path) else sources
    folders = [os.path.abspath(source) for source in given if Path(source).is_dir()]
    if inside is not None or any(place == folder or place.startswith(folder + os.sep) for folder in folders):
        raise ConfigError(f"--out: got {out}, which is a source's own folder or below it; choose one outside")


def _clear_work(out: Path, *, keep: Path | None) -> None:
    """Remove what killed jobs left behind."""
    for stale in out.glob(".work-*"):
        if stale != keep:
            shutil.rmtree(stale)
    for part in out.glob(f"{REPORT}.*.incomplete"):
        part.unlink()


def _work(
    rows: Sequence[Row], work: Path, identity: str, options: ShardOptions, detector: ShotDetector | None
) -> dict[str, Any]:
    """Make everything in the work folder; its report vouches for it."""
    expansion = Expansion(list(rows))
    if detector is not None:
        expansion = expand_shots(rows, work / "shots", detector, options)
    make_pieces(expansion.rows, work / "pieces", options)
    report, tars = _assemble(expansion, work, options)
    report = {"format": FORMAT, "digest": identity, **report}
    report["options"] = _options(options, None if detector is None else detector.name)
    if detector is not None:
        found = sum(row.shot is not None for row in expansion.rows)
        report["shots"] = {"videos": expansion.videos, "videos_cut": len({r.number for r in expansion.rows if r.span})}
        report["shots"]["shots"] = found
    if not tars:
        raise ConfigError(_none_left(report))
    _write_tars(tars, work, options.workers)
    for tar in tars:
        path = work / tar.split / tar.name
        report["splits"][tar.split]["shards"].append([tar.name, path.stat().st_size])
        for bad in read_index(path)[1]:
            logger.warning("%s: %s cannot be read: %s: %s", path.name, bad.key, bad.cause, bad.message)
    write_bytes(work / REPORT, json.dumps(report, indent=1).encode())
    return report


def _none_left(report: dict[str, Any]) -> str:
    counts = {**report["causes"], **report["filters"]}
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    first = next((f"; first {item['path']}: {item['error']}" for item in report["skipped"]), "")
    return f"none of the {sum(counts.values())} samples is left: {listed}{first}"


@dataclass
class _Tar:
    """What goes into one tar."""

    split: str
    name: str
    rows: list[Row]
    num_bytes: int = 0


def _assemble(expansion: Expansion, work: Path, options: ShardOptions) -> tuple[dict[str, Any], list[_Tar]]:
    """Choose the samples and assign them to tars, in manifest order; only sizes decide where a tar ends."""
    counts = {
        split: Counter(samples=0, images=0, videos=0, frames=0, uncaptioned=0, captions=0, bytes=0) for split in SPLITS
    }
    skipped = [_left_out(row, error=error) for row, error in expansion.failures]
    filtered = [{**_left_out(row, filter="min_shot_s"), "shots": count} for row, count in expansion.too_short]
    bits = options.filters.dedupe_bits
    duplicates = None if bits is None else NearDuplicates(bits)
    limit = options.shard_size_mb * 2**20
    tars: dict[str, list[_Tar]] = {split: [] for split in SPLITS}
    for row in expansion.rows:
        record = read_record(row, work / "pieces")
        twin = None
        if record.error is not None:
            skipped.append(_left_out(row, error=record.error))
        elif record.filtered is not None:
            filtered.append(_left_out(row, filter=record.filtered[0], message=record.filtered[1]))
        elif duplicates is not None and (twin := duplicates.find_or_add(row.key, record.hashes)) is not None:
            filtered.append(_left_out(row, filter="dedupe_bits", message=f"looks like {twin}"))
        else:
            size = record.num_bytes + sum(map(len, _text_members(row, record).values()))
            split = tars[row.split]
            if not split or split[-1].num_bytes >= limit:
                split.append(_Tar(row.split, f"{len(split):06d}.tar", []))
            split[-1].num_bytes += size
            split[-1].rows.append(row)
            kinds = {"images" if row.kind == "image" else "videos": 1}
            counts[row.split].update(samples=1, frames=record.provenance["frames"], bytes=size, **kinds)
            counts[row.split].update(uncaptioned=int(row.uncaptioned), captions=len(row.captions))
    skipped.sort(key=lambda item: int(item["number"]))
    filtered.sort(key=lambda item: int(item["number"]))
    report: dict[str, Any] = {
        "splits": {split: {**counts[split], "shards": []} for split in SPLITS},
        "causes": dict(Counter(item["error"].split(":")[0] for item in skipped).most_common()),
        "filters": _filter_counts(filtered),
        "skipped": skipped,
        "filtered": filtered,
    }
    return report, [tar for split in SPLITS for tar in tars[split]]


def _left_out(row: Row, **why: str) -> dict[str, Any]:
    shot = {} if row.shot is None else {"shot": row.shot}
    return {"path": row.path, "number": row.number, **shot, **why}


def _filter_counts(filtered: Sequence[dict[str, Any]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for item in filtered:
        counts[item["filter"]] += item.get("shots", 1)
    return dict(counts.most_common())


def _text_members(row: Row, record: Record) -> dict[str, bytes]:
    """Make the members of a sample beside its medium."""
    told: dict[str, Any] = {"label": row.label} if row.label >= 0 else {}
    told |= {"class": row.class_name} if row.class_name else {}
    members = {"json": json.dumps({**record.provenance, **told}, sort_keys=True).encode()}
    if row.captions:
        members["txt"] = row.captions[0][0].encode()
    if len(row.captions) > 1 or any(weight != 1 for _, weight in row.captions):
        members["captions.json"] = json.dumps(row.captions, ensure_ascii=False).encode()
    return members


def _write_tars(tars: Sequence[_Tar], work: Path, workers: int) -> None:
    """Write and index the tars that the work folder lacks; the index comes last, then the pieces go."""
    todo = {(tar.split, tar.name): tar for tar in tars if not index_path(work / tar.split / tar.name).is_file()}
    with Progress(len(tars), "writing tars", unit="tar", done=len(tars) - len(todo)) as progress:
        num_bytes = sum(tar.num_bytes for tar in todo.values())
        for done in _run([(tar, work) for tar in todo.values()], _make_tar, workers=workers, num_bytes=num_bytes):
            for row in todo[done].rows:
                media_path(row, read_record(row, work / "pieces"), work / "pieces").unlink(missing_ok=True)
            progress.update()


def _run(jobs: Sequence[T], work: Callable[[T], R], *, workers: int, num_bytes: int) -> Iterator[R]:
    if workers > 1 and len(jobs) > 1 and num_bytes >= _PROCESS_BYTES:
        return run_in_processes(jobs, work, num_processes=workers)
    return run_in_threads(jobs, lambda job: [work(job)], num_threads=workers)


def _make_tar(job: tuple[_Tar, Path]) -> tuple[str, str]:
    tar, work = job
    path = work / tar.split / tar.name
    _write_tar(tar, path, work / "pieces")
    index_tar(path)
    return tar.split, tar.name


def _write_tar(tar: _Tar, path: Path, pieces: Path) -> None:
    from webdataset import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.incomplete")  # the process of a killed job may still be writing
    with part.open("wb") as file, TarWriter(file, encoder=False, mtime=0.0) as writer:
        for row in tar.rows:
            record = read_record(row, pieces)
            medium = media_path(row, record, pieces).read_bytes()
            writer.write({"__key__": row.key, **_text_members(row, record), record.extension: medium})
    os.replace(part, path)


def _publish(out: Path, work: Path, report: dict[str, Any]) -> None:
    """Put the new tars in the place of the old ones; the report comes last and vouches for them.

    Safe to repeat: a split whose folder has left the work folder is in its place already.
    """
    # Until the report is written a marker says that train and heldout are ours to replace.
    write_bytes(out / REPORT, json.dumps({"digest": "", "splits": {}}).encode())
    for split in SPLITS:
        if (work / split).is_dir():
            for part in (work / split).glob("*.incomplete"):
                part.unlink()
            shutil.rmtree(out / split, ignore_errors=True)
            os.replace(work / split, out / split)
        elif not report["splits"][split]["shards"]:
            shutil.rmtree(out / split, ignore_errors=True)
    write_bytes(out / REPORT, json.dumps(report, indent=1).encode())
    shutil.rmtree(work)


def summary(report: dict[str, Any]) -> str:
    """Describe a report in one line."""
    parts = [
        f"{split}: {n['samples']} samples ({n['images']} images, {n['videos']} clips, {n['frames']} frames, "
        f"{n['uncaptioned']} without caption) in {len(n['shards'])} tars"
        for split, n in report["splits"].items()
    ]
    for title, counts in (("left out", report["causes"]), ("filtered", report["filters"])):
        if counts or title == "left out":
            listed = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
            parts.append(f"{title}: {listed}")
    if "shots" in report:
        parts.append(f"{report['shots']['shots']} shots of {report['shots']['videos_cut']} videos")
    return "; ".join(parts)


def _read_report(folder: Path) -> dict[str, Any] | None:
    path = folder / REPORT
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else None
    except ValueError as error:
        raise ConfigError(f"--out: {path} is damaged: {error}; remove it or choose another folder") from error


def _whole(out: Path, report: dict[str, Any]) -> bool:
    tars = [(out / split / name, size) for split, n in report["splits"].items() for name, size in n["shards"]]
    return all(tar.is_file() and tar.stat().st_size == size and index_path(tar).is_file() for tar, size in tars)


def index_existing(shards: str | Path | Sequence[str | Path], *, workers: int = 2) -> dict[str, Any]:
    """Index tars that exist already.

    Args:
        shards: Tars, folders of tars (with ``train`` and ``heldout`` below it or not), globs or brace patterns.
        workers: Tars read at once, >= 1.

    Returns:
        Counts: ``tars``, ``samples`` and ``bad`` by cause.
    """
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    tars: dict[str, None] = {}
    for path in given:
        below = [Path(path) / split for split in SPLITS if any((Path(path) / split).glob("*.tar"))]
        nested = below if below and not any(Path(path).glob("*.tar")) else [path]
        for folder in nested:
            tars |= dict.fromkeys(str(tar) for tar in find_shards(str(folder)))
    samples, causes = 0, Counter[str]()
    num_bytes = sum(Path(tar).stat().st_size for tar in tars if Path(tar).is_file())
    with Progress(len(tars), "indexing", unit="tar") as progress:
        for tar, count, bad in _run(list(tars), _index, workers=workers, num_bytes=num_bytes):
            samples += count
            causes.update(record.cause for record in bad)
            for record in bad[:20]:
                logger.warning("%s: %r left out: %s: %s", tar, record.key, record.cause, record.message)
            progress.update()
    return {"tars": len(tars), "samples": samples, "bad": dict(sorted(causes.items()))}


def _index(tar: str) -> tuple[str, int, list[BadSample]]:
    entries, bad = index_tar(tar)
    return tar, len(entries), bad
