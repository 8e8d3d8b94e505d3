"""Read what a run left on disk: ``config.yaml``, ``metrics.jsonl``, ``quarantine.jsonl``, ``media.jsonl``,
``evaluation.json``, ``lineage.json`` and folders of samples. Knows files, no model and no page.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ltd.storage import StorageError, read_lineage
from ltd.tracking.journal import read_journal
from ltd.tracking.ledger import LedgerRecord, read_ledger
from ltd.tracking.tracker import MEDIA, METRICS, QUARANTINE

CONFIG = "config.yaml"
EVALUATION = "evaluation.json"
SAMPLES = "samples.jsonl"
MEDIA_SUFFIXES = (".mp4", ".webm", ".png", ".jpg", ".jpeg", ".webp", ".gif")


@dataclass(frozen=True)
class Sample:
    """One media file, its caption, and in a few words each how it was made."""

    path: Path
    caption: str
    details: tuple[str, ...] = ()


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


def read_run(run_dir: Path, *, samples: Path | None = None) -> RunRecord:
    """Read a run directory.

    Args:
        run_dir: Directory with ``metrics.jsonl`` or ``evaluation.json``; the other files are shown where present.
        samples: Folder of samples to show beside those the run made itself.

    Returns:
        The run's record.

    Raises:
        ValueError: If this is no run directory, or a file in it cannot be read; names the file.
    """
    if not (run_dir / METRICS).is_file() and not (run_dir / EVALUATION).is_file():
        raise ValueError(f"{run_dir}: no run here: needs {METRICS} (written by train.py) or {EVALUATION}")
    quarantine = list(read_journal(run_dir / QUARANTINE))
    found = _logged_media(run_dir) + _sample_folders(run_dir)
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
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def _read_lineage(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return read_lineage(run_dir)
    except StorageError as error:
        raise ValueError(str(error)) from None


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
    """Media that training noted, those of the latest step of each name; files deleted since are left out."""
    rows = list(read_journal(run_dir / MEDIA))
    latest = {row["name"]: row["step"] for row in rows}
    chosen = [row for row in rows if row["step"] == latest[row["name"]]]
    samples = [Sample(run_dir / row["path"], row.get("caption", ""), (f"step {row['step']:,}",)) for row in chosen]
    return [sample for sample in samples if sample.path.is_file()]


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
    if (folder / SAMPLES).is_file():
        for number, line in enumerate((folder / SAMPLES).read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                shown = row["prompt"] or row.get("class") or (f"class {row['label']}" if "label" in row else "")
                listed.append(Sample(folder / row["file"], str(shown), _how_made(row)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{folder / SAMPLES}, line {number}: needs 'file' and 'prompt': {error!r}") from error
    known = {sample.path for sample in listed}
    others = sorted(path for path in folder.iterdir() if path.suffix in MEDIA_SUFFIXES and path not in known)
    return [sample for sample in listed if sample.path.is_file()] + [Sample(path, path.stem) for path in others]


def _how_made(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Say how ``sample.py`` made a file, as far as its row tells."""
    parts = []
    if {"num_frames", "height", "width"} <= row.keys():
        parts.append(f"{row['num_frames']}x{row['height']}x{row['width']}")
    parts += [f"{name} {row[name]}" for name in ("seed", "guidance") if name in row]
    if "steps" in row:
        parts.append(f"{row['steps']} {row.get('solver', '')} steps".replace("  ", " "))
    if "weights" in row:
        parts.append(f"{row['weights']} weights")
    return tuple(parts)


def _unique(samples: Sequence[Sample]) -> list[Sample]:
    """Drop files that were found twice, keeping the first."""
    return list({sample.path.resolve(): sample for sample in reversed(samples)}.values())[::-1]
