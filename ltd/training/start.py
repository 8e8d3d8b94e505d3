"""Where a run starts, found by one process for all: nowhere, at its own latest checkpoint, or at another run's."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ltd import config as config_io
from ltd import storage
from ltd.config import ConfigError
from ltd.parallel import checkpoint as checkpoints
from ltd.parallel.layout import Layout
from ltd.tracking.sweep import check_sweep
from ltd.training.fork import add_ancestor, check_same_model, check_same_origin, differences, resolve_fork
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
    #: Whether it is a fork that begins: all state goes on, in a run of its own.
    forked: bool = False
    #: Where its checkpoint is from, oldest first, as ``add_ancestor`` makes them.
    ancestors: list[dict[str, Any]] = field(default_factory=list)

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
        ConfigError: If ``resume`` or ``fork`` names no checkpoint, or one of another kind or with too many steps, or
            ``fork`` one of another model; or if a W&B sweep set fields that did not reach the run.
    """

    def locate() -> Start[R] | None:
        if run.tracking.wandb != "disabled":
            check_sweep(config_io.to_dict(run))
        return _locate_start(run)

    return layout.decide(locate)


def _locate_start(run: R) -> Start[R] | None:
    run_dir = Path(run.run_dir)
    found = checkpoints.resolve(run.resume, run_dir)
    own = found is not None and found.parent.parent.resolve() == run_dir.resolve()
    forked = run.fork is not None and not own
    if run.fork is not None and forked:
        if found is not None:
            raise ConfigError(f"resume: got {run.resume}, but fork = {run.fork} says where to start; set one of them")
        found = resolve_fork(run.fork, run_dir)
    manifest = storage.read_manifest(found) if found else {}
    ancestors = list(manifest.get("ancestors", ()))
    if run.fork is not None and own:
        check_same_origin(run.fork, ancestors, run.run_dir)
    elif found and not own:
        ancestors = add_ancestor(found, manifest, run)
    start = Start(run, found, manifest, own, forked, ancestors)
    before, now = manifest.get("config", {}).get("kind"), getattr(run, "kind", None)
    if found and forked:
        check_same_model(manifest.get("config", {}), run, str(found))
    elif found and before != now:
        raise ConfigError(f"run_dir: {found} is a checkpoint of kind {before!r}, this run is of kind {now!r}")
    if found and start.step >= run.steps:
        if not own:
            asked = f"fork = {run.fork}" if forked else f"resume = {run.resume}"
            raise ConfigError(f"steps: got {run.steps}, but {asked} has {start.step} already; raise steps")
        logger.info("%s already has its %d steps; nothing to train (raise steps to go on)", run_dir, run.steps)
        return None
    _announce(start)
    return start


def _announce(start: Start[R]) -> None:
    if start.checkpoint is None:
        logger.info("starting anew in %s", start.base.run_dir)
        return
    if start.forked:
        overrides = start.ancestors[-1]["overrides"]
        logger.info("forked from %s at step %d, %d fields changed", start.checkpoint, start.step, len(overrides))
        for key, (old, new) in overrides.items():
            logger.info("%s was %r in the run it is forked from and is %r now", key, old, new)
        return
    logger.info("resuming from %s at step %d", start.checkpoint, start.step)
    for key, (old, new) in differences(start.manifest["config"], config_io.to_dict(start.base)).items():
        logger.warning("%s was %r in the checkpoint and is %r now", key, old, new)
