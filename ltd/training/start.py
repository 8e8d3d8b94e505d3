"""Where a run starts, found by one process for all: nowhere, at its own latest checkpoint, or at another run's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ltd import config as config_io
from ltd import storage
from ltd.config import ConfigError
from ltd.parallel import checkpoint as checkpoints
from ltd.parallel.layout import Layout
from ltd.training.run import RunConfig
from ltd.training.stages import at_step

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=RunConfig)


@dataclass(frozen=True)
class Start(Generic[R]):
    """Where a run starts: nowhere, at its own latest checkpoint, or at another run's; and what holds there."""

    #: The whole run, with its stages.
    base: R
    checkpoint: Path | None
    manifest: dict[str, Any]
    own: bool

    @property
    def run(self) -> R:
        """What holds in the stage that begins or goes on here."""
        return at_step(self.base, self.step)[0]

    @property
    def until(self) -> int:
        """Steps done at the end of that stage."""
        return at_step(self.base, self.step)[1]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.manifest.get("step", 0))


def find_start(run: R, layout: Layout) -> Start[R] | None:
    """Find the checkpoint to start from, the same on all processes.

    Args:
        run: The whole run.
        layout: Its processes.

    Returns:
        Where it starts; None when it has all its steps already.

    Raises:
        ConfigError: If ``resume`` names no checkpoint, or one of another kind or with too many steps.
    """
    found: Start[R] | Exception | None = None
    if layout.is_main:
        try:
            found = _locate_start(run)
        except (ConfigError, storage.StorageError) as error:
            found = error
    # One process decides: file systems show a new checkpoint to some hosts later than to others.
    found = layout.broadcast_object(found)
    if isinstance(found, Exception):
        raise found
    return found


def _locate_start(run: R) -> Start[R] | None:
    run_dir = Path(run.run_dir)
    found = checkpoints.resolve(run.resume, run_dir)
    own = found is not None and found.parent.parent.resolve() == run_dir.resolve()
    start = Start(run, found, storage.read_manifest(found) if found else {}, own)
    before, now = start.manifest.get("config", {}).get("kind"), getattr(run, "kind", None)
    if found and before != now:
        raise ConfigError(f"run_dir: {found} is a checkpoint of kind {before!r}, this run is of kind {now!r}")
    if found and start.step >= run.steps:
        if not own:
            raise ConfigError(
                f"steps: got {run.steps}, but resume = {run.resume} has {start.step} already; raise steps"
            )
        logger.info("%s already has its %d steps; nothing to train (raise steps to go on)", run_dir, run.steps)
        return None
    _announce_resume(found, start.manifest, run)
    return start


def _announce_resume(found: Path | None, manifest: dict[str, Any], run: RunConfig) -> None:
    if found is None:
        logger.info("starting anew in %s", run.run_dir)
        return
    logger.info("resuming from %s at step %d", found, manifest["step"])
    before, now = _flat(manifest["config"]), _flat(config_io.to_dict(run))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key != "resume":
            logger.warning("%s was %r in the checkpoint and is %r now", key, before.get(key), now.get(key))


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {key: value for name, item in tree.items() for key, value in _flat(item, f"{path}.{name}").items()}
    return {path.removeprefix("."): tree}
