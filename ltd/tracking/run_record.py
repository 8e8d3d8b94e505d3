"""Read what a run left on disk: ``config.yaml``, ``metrics.jsonl``, ``quarantine.jsonl``, ``media.jsonl``,
``evaluation.json``, ``lineage.json``, ``init_from.json``, ``hardware.json`` and folders of samples. Knows files, no
model and no page.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ltd.storage import StorageError, latest_checkpoint, read_lineage, read_manifest
from ltd.tracking.journal import read_journal, whole_lines
from ltd.tracking.ledger import LedgerRecord, read_ledger
from ltd.tracking.tracker import MEDIA, METRICS, QUARANTINE

CONFIG = "config.yaml"
EVALUATION = "evaluation.json"
HARDWARE = "hardware.json"
INIT_FROM = "init_from.json"
SAMPLES = "samples.jsonl"
MEDIA_SUFFIXES = (".mp4", ".webm", ".png", ".jpg", ".jpeg", ".webp", ".gif")


@dataclass(frozen=True)
class Sample:
    """One media file, its caption, and in a few words each what else was asked for and how it was made."""

    path: Path
    caption: str
    #: How it was made; may differ between samples that answer the same request.
    details: tuple[str, ...] = ()
    #: What was asked for besides the caption (size, seed): samples that share both answer the same request.
    asked: tuple[str, ...] = ()
    #: Step of training at which it was made; None of one made afterwards.
    step: int | None = None

    @property
    def is_grid(self) -> bool:
        """Whether it is an overview of other samples."""
        return self.path.stem == "grid"


@dataclass(frozen=True)
class RunRecord:
    """What one run left: plain data, ready to be shown."""

    name: str
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Sample] = ()
    evaluation: Sequence[Mapping[str, Any]] = ()
    bad: Mapping[str, int] = field(default_factory=dict)
    ledger: LedgerRecord = field(default_factory=LedgerRecord)
    bad_examples: Sequence[Mapping[str, Any]] = ()
    #: Checkpoints of other runs that it started from, oldest first.
    lineage: Sequence[Mapping[str, Any]] = ()
    #: Whose weights its model began with, where not its own: path, weights, fingerprint.
    init_from: Mapping[str, Any] = field(default_factory=dict)
    #: The device it ran on and its peak.
    hardware: Mapping[str, Any] = field(default_factory=dict)


def read_run(run_dir: Path, *, samples: Path | None = None) -> RunRecord:
    """Read a run directory.

    Args:
        run_dir: Directory with ``config.yaml``, ``metrics.jsonl`` or ``evaluation.json``; the other files are shown
            where present. The run may still be going on.
        samples: Folder of samples to show beside those the run made itself.

    Returns:
        The run's record.

    Raises:
        ValueError: If this is no run directory, or a file in it cannot be read; names the file.
    """
    if not any((run_dir / name).is_file() for name in (METRICS, EVALUATION, CONFIG)):
        raise ValueError(f"{run_dir}: no run here: needs {METRICS} or {CONFIG} (written by train.py), or {EVALUATION}")
    quarantine = list(read_journal(run_dir / QUARANTINE))
    found = _sample_folders(run_dir) + _logged_media(run_dir)
    if samples is not None:
        found += _sample_folder(samples)
    return RunRecord(
        name=run_dir.resolve().name,
        path=run_dir,
        config=_read_config(run_dir / CONFIG),
        rows=list(read_journal(run_dir / METRICS)),
        samples=_unique(found),
        evaluation=_read_evaluation(run_dir / EVALUATION),
        bad=dict(Counter(str(row.get("cause", "unknown")) for row in quarantine).most_common()),
        bad_examples=quarantine[:20],
        ledger=read_ledger(run_dir),
        lineage=_read_lineage(run_dir),
        init_from=_read_init_from(run_dir),
        hardware=_read_object(run_dir / HARDWARE),
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List the fields of a configuration.

    Args:
        tree: Nested plain values.
        prefix: Put before each field.

    Yields:
        (dotted field, value); an empty mapping is a value.
    """
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a configuration: {error}") from error
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def _read_lineage(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return read_lineage(run_dir)
    except StorageError as error:
        raise ValueError(str(error)) from None


def _read_init_from(run_dir: Path) -> dict[str, Any]:
    """Find whose weights a run, or the run it is a fork of, began with: its checkpoints know it, and its own file."""
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None:
        with contextlib.suppress(StorageError):
            found = read_manifest(checkpoint).get("lineage", {}).get("init_from")
            if found:
                return dict(found)
    return _read_object(run_dir / INIT_FROM)


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: needs a JSON object: {error!r}") from error


def _read_evaluation(path: Path) -> list[dict[str, Any]]:
    """Rows of ``evaluation.json``: a list of objects, or an object whose ``rows`` is one."""
    if not path.is_file():
        return []
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        rows = tree["rows"] if isinstance(tree, dict) else tree
        return [{**row, "name": str(row["name"])} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: needs a list of objects with a 'name' under 'rows': {error!r}") from error


def _logged_media(run_dir: Path) -> list[Sample]:
    """Media that training noted; files deleted since are left out."""
    rows = read_journal(run_dir / MEDIA)
    samples = [Sample(run_dir / row["path"], row.get("caption", ""), step=row["step"]) for row in rows]
    return [sample for sample in samples if _is_there(sample.path)]


def _is_there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _sample_folders(run_dir: Path) -> list[Sample]:
    """Samples that ``sample.py`` put under the run: folders that hold a ``samples.jsonl``."""
    found: list[Sample] = []
    for path in sorted(run_dir.glob(f"**/{SAMPLES}")):
        found += _sample_folder(path.parent)
    return found


def _sample_folder(folder: Path) -> list[Sample]:
    """Media of a folder: what ``samples.jsonl`` lists with its prompts, then whatever else lies there (the grid)."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of samples")
    listed: list[Sample] = []
    step: int | None = None
    for number, line in enumerate(whole_lines(folder / SAMPLES), start=1):
        try:
            row = json.loads(line)
            step = row.get("step")
            shown = row["prompt"] or row.get("class") or (f"class {row['label']}" if "label" in row else "")
            listed.append(Sample(folder / row["file"], str(shown), _how_made(row), _what_was_asked(row), step))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / SAMPLES}, line {number}: needs 'file' and 'prompt': {error!r}") from error
    known = {sample.path for sample in listed}
    others = sorted(path for path in folder.iterdir() if path.suffix in MEDIA_SUFFIXES and path not in known)
    listed += [Sample(path, path.stem, step=step) for path in others]
    return [sample for sample in listed if _is_there(sample.path)]


def _what_was_asked(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what a sample's request holds besides its prompt, as far as its row tells."""
    parts = []
    if {"num_frames", "height", "width"} <= row.keys():
        parts.append(f"{row['num_frames']}x{row['height']}x{row['width']}")
    parts += [f"seed {row['seed']}"] if "seed" in row else []
    parts += [f"no. {row['repetition'] + 1}"] if row.get("repetition") else []
    parts += [f"{row['task']}: {', '.join(map(str, row.get('condition') or ()))}"] if "task" in row else []
    return tuple(parts)


def _how_made(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Say how a sample was made, as far as its row tells."""
    parts = [f"guidance {row['guidance']:g}"] if "guidance" in row else []
    parts += [f"negative {row['negative']!r}"] if row.get("negative") else []
    if "steps" in row:
        parts.append(f"{row['steps']} {row.get('solver', '')} steps".replace("  ", " "))
    if "weights" in row:
        parts.append(f"{row['weights']} weights")
    return tuple(parts)


def _unique(samples: Sequence[Sample]) -> list[Sample]:
    """Drop files that were found twice, keeping the first."""
    return list({sample.path.resolve(): sample for sample in reversed(samples)}.values())[::-1]
