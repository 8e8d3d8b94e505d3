"""Where a run keeps its checkpoints, which is the newest, and which older one to offer when one is damaged."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from ltd.storage.directories import replace_file
from ltd.storage.errors import StorageError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Written last: a directory that has it is a whole checkpoint."""

_PREFIX = "step-"
_PATTERN = _PREFIX + "[0-9]" * 8


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """Name the checkpoint directory of a step."""
    return Path(run_dir) / "checkpoints" / f"{_PREFIX}{step:08d}"


def is_checkpoint(path: str | Path) -> bool:
    """Tell whether a directory is a whole checkpoint."""
    return (Path(path) / MANIFEST).is_file()


def checkpoint_step(path: str | Path) -> int:
    """Tell the step of a checkpoint by its name."""
    return int(Path(path).name.removeprefix(_PREFIX))


def checkpoints(run_dir: str | Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    found = (Path(run_dir) / "checkpoints").glob(_PATTERN)
    return sorted(path for path in found if (path / MANIFEST).is_file())


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """Find the checkpoint that ``RUN/latest`` names, the newest whole one otherwise."""
    pointer = Path(run_dir) / "latest"
    if pointer.is_file():
        target = Path(run_dir) / "checkpoints" / pointer.read_text().strip()
        if (target / MANIFEST).is_file():
            return target
    found = checkpoints(run_dir)
    return found[-1] if found else None


def write_latest(run_dir: str | Path, checkpoint: Path) -> None:
    """Point ``RUN/latest`` at a checkpoint."""
    replace_file(Path(run_dir) / "latest", (checkpoint.name + "\n").encode())


def remove_incomplete(run_dir: str | Path) -> None:
    """Remove what saves and removals that were killed left behind in a run's checkpoints."""
    for path in (Path(run_dir) / "checkpoints").glob("*.incomplete"):
        logger.info("removing %s, left by a save that did not end", path)
        shutil.rmtree(path, ignore_errors=True)
    for pointer in Path(run_dir).glob("latest.*.incomplete"):
        pointer.unlink(missing_ok=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; from the first moment on, no reader takes it for a whole one."""
    if path.exists():
        removed = path.with_name(path.name + ".removed.incomplete")
        path.rename(removed)
        shutil.rmtree(removed)


def set_aside_newer(run_dir: str | Path, checkpoint: Path) -> None:
    """Rename the checkpoints that are newer than one the run went back to, so that none of them counts any more.

    Args:
        run_dir: Directory of the run.
        checkpoint: The one it goes on from; ``RUN/latest`` names it afterwards.
    """
    newer = [path for path in checkpoints(run_dir) if checkpoint_step(path) > checkpoint_step(checkpoint)]
    for path in newer:
        aside = path.with_name(f"{path.name}.abandoned")
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        logger.warning("went back to %s: %s is now %s", checkpoint.name, path.name, aside.name)
    if newer:
        write_latest(run_dir, checkpoint)


def expired(run_dir: str | Path, newest: Path, *, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """List the checkpoints that a run no longer keeps.

    Args:
        run_dir: Directory of the run.
        newest: The checkpoint just written; always kept.
        keep_last: How many of the newest are kept; None keeps all.
        keep_every: Checkpoints whose step is a multiple are kept for good; None for no such rule.

    Returns:
        Directories to remove, oldest first.
    """
    if keep_last is None:
        return []
    old = checkpoints(run_dir)[: -max(keep_last, 1)]
    return [p for p in old if p != newest and not (keep_every and checkpoint_step(p) % keep_every == 0)]


def damaged(directory: str | Path, what: str) -> StorageError:
    """Make the error for a checkpoint that must not be used; it offers the newest older one that is whole.

    Args:
        directory: The checkpoint.
        what: Which file, and what is wrong with it.

    Returns:
        The error, to be raised.
    """
    older = _older(Path(directory))
    if older is None:
        return StorageError(f"{what}; the checkpoint is damaged, and there is no older whole one beside it")
    fork = f"fork={older.parent.parent}@{checkpoint_step(older)}"
    return StorageError(
        f"{what}; the checkpoint is damaged; the older {older} is whole: go on from it with resume={older}, or {fork}"
    )


def _older(directory: Path) -> Path | None:
    """Find the newest checkpoint before this one whose files are all there in their full length."""
    try:
        before = [path for path in checkpoints(directory.parent.parent) if path.name < directory.name]
    except OSError:
        return None
    return next((path for path in reversed(before) if _has_all_files(path)), None)


def _has_all_files(checkpoint: Path) -> bool:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        for name, shard in manifest.get("shards", {}).items():
            json.loads((checkpoint / f"{name}.json").read_bytes())
            if (checkpoint / f"{name}.safetensors").stat().st_size != shard["bytes"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True
