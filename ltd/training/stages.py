"""Stages of one run: fields that change at a step, such as sizes, data, learning rate, losses and what is trained.

A stage begins from the checkpoint of the step before, like any resumed run, so going on through a boundary and resuming
at it are the same. Knows no model and no processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ltd.config import ConfigError, from_dict, merge_stages, to_dict

#: What a run keeps from its first step to its last.
_FIXED = (
    "kind",
    "run_dir",
    "steps",
    "seed",
    "resume",
    "fork",
    "num_threads",
    "model",
    "stages",
    "ema",
    "tracking",
    "toy_data",
    "start_from",
    "initialize_from",
    "init_from",
    "alignment",
    "autoencoder",
    "untrained_autoencoder",
    "text",
    "objective.path",
    "objective.prediction",
    "parallel.engine",
    "parallel.sequence",
    "parallel.slow_s",
    "parallel.timeout_s",
)

#: What the state of an optimiser or a discriminator is of: it may come or go, and not become another.
_KEPT = ("optim.kind", "adversarial.discriminator", "adversarial.optim.kind")

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A part of a run that begins after a step and changes fields of what was before."""

    #: Steps done when it begins.
    from_step: int
    #: Fields it changes, written as in the file; a list takes the place of the list before.
    set: dict[str, Any]

    def __post_init__(self) -> None:
        if self.from_step < 1:
            raise ConfigError(f"from_step: got {self.from_step}, needed 1 or more; the fields of the run hold before")
        for path in _FIXED:
            if _has(self.set, path.split(".")):
                raise ConfigError(f"set.{path}: is one for the whole run, a stage cannot change it")


def check_stages(run: Any, stages: Sequence[StageConfig], steps: int) -> None:
    """Refuse stages out of order, and such whose fields do not fit the run's.

    Args:
        run: The run's configuration, a dataclass with ``stages``.
        stages: Its stages.
        steps: Its steps.

    Raises:
        ConfigError: Names the stage and the field.
    """
    before = 0
    for number, stage in enumerate(stages):
        if not before < stage.from_step < steps:
            raise ConfigError(
                f"stages[{number}].from_step: got {stage.from_step}, needed more than {before} and less than steps "
                f"({steps})"
            )
        try:
            earlier, now = (at_step(run, step)[0] for step in (before, stage.from_step))
            _check_kept(to_dict(earlier), to_dict(now))
        except ConfigError as error:
            raise ConfigError(f"stages[{number}].set.{error}") from None
        before = stage.from_step


def at_step(run: R, step: int) -> tuple[R, int]:
    """Say what holds after a number of steps.

    Args:
        run: The run's configuration, a dataclass with ``stages`` and ``steps``.
        step: Steps done.

    Returns:
        The configuration with the fields of all stages that have begun, and without stages; and the steps done at the
        end of the stage.

    Raises:
        ConfigError: If a field does not fit.
    """
    tree, until = merge_stages(to_dict(run), step)
    built: R = from_dict(type(run), tree)
    return built, tree["steps"] if until is None else until


def _check_kept(before: Any, now: Any) -> None:
    for path in _KEPT:
        found = []
        for tree in (before, now):
            for key in path.split("."):
                tree = tree.get(key) if isinstance(tree, Mapping) else None
            found.append(tree)
        if None not in found and found[0] != found[1]:
            raise ConfigError(f"{path}: changes from {found[0]!r} to {found[1]!r}; its state cannot go on as that")


def _has(tree: Mapping[str, Any], path: Sequence[str]) -> bool:
    if path[0] not in tree:
        return False
    below = tree[path[0]]
    return len(path) == 1 or (isinstance(below, Mapping) and _has(below, path[1:]))
