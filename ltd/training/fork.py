"""Forks: a run that starts from a checkpoint of another run, with the same configuration or a changed one.

A fork takes over all that a resumed run does (weights, optimizer state, averages, data position, guards, counts), so
that one without changes repeats what the other run did next. Its ancestors are kept with it, oldest first: in every
checkpoint's manifest and in ``RUN/lineage.json``. Knows no model.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ltd import config as config_io
from ltd import storage
from ltd.config import ConfigError
from ltd.training.run import RunConfig

#: What every run has of its own: no difference of configuration.
_OWN = ("run_dir", "resume", "fork")
#: Fields of ``model`` that say how it is run, not what it computes between its latents and its weights.
_HANDLING = ("model.clamp", "model.odd_sizes")


def split_fork(fork: str) -> tuple[str, int | None]:
    """Split ``RUN@STEP`` into the run and the step; a text without ``@STEP`` has no step."""
    match = re.fullmatch(r"(.+)@(\d+)", fork)
    return (match[1], int(match[2])) if match else (fork, None)


def resolve_fork(fork: str, run_dir: str | Path) -> Path:
    """Find the checkpoint that a fork starts from.

    A fork of a run's latest checkpoint that was killed before it had one of its own starts where it did before.

    Args:
        fork: ``RUN@STEP``, or ``RUN`` for its latest checkpoint.
        run_dir: Directory of the fork.

    Returns:
        Directory of a whole checkpoint.

    Raises:
        ConfigError: If there is none, or the run is the fork itself.
    """
    run, step = split_fork(fork)
    if Path(run).resolve() == Path(run_dir).resolve():
        raise ConfigError(f"fork: got {fork}, which is run_dir itself; change run_dir, or go back with resume")
    steps = [storage.checkpoint_step(path) for path in storage.checkpoints(run)]
    if not steps:
        raise ConfigError(f"fork: got {fork}, no whole checkpoint there; needed RUN@STEP, or RUN for its latest")
    if step is None:
        before = storage.read_lineage(run_dir)
        if before and Path(before[-1]["run"]).resolve() == Path(run).resolve():
            step = int(before[-1]["step"])
    if step is not None and step not in steps:
        raise ConfigError(f"fork: got {fork}, but {run} keeps the steps {', '.join(map(str, steps))}")
    found = storage.latest_checkpoint(run) if step is None else storage.checkpoint_path(run, step)
    assert found is not None
    return found


def check_same_origin(fork: str, ancestors: Sequence[Mapping[str, Any]], run_dir: str) -> None:
    """Refuse to go on with checkpoints of a run that started elsewhere than ``fork`` says.

    Args:
        fork: Of the configuration.
        ancestors: Of the run's own checkpoint.
        run_dir: The run, for the message.

    Raises:
        ConfigError: If they differ.
    """
    run, step = split_fork(fork)
    before = ancestors[-1] if ancestors else None
    if before is not None and Path(before["run"]).resolve() == Path(run).resolve() and step in (None, before["step"]):
        return
    origin = "anew" if before is None else f"from {before['run']}@{before['step']}"
    raise ConfigError(
        f"fork: got {fork}, but {run_dir} has checkpoints of a run that started {origin}; change run_dir, or leave "
        "fork out to go on from them"
    )


def check_same_model(before: Mapping[str, Any], run: RunConfig, source: str) -> None:
    """Refuse a fork of another architecture; tensors and latents are compared as the checkpoint is loaded.

    Args:
        before: Configuration in the checkpoint.
        run: Of the fork.
        source: What is forked, for the message.

    Raises:
        ConfigError: Names the first field that differs.
    """
    kind, own = before.get("kind"), getattr(run, "kind", None)
    if kind != own:
        raise ConfigError(f"fork: {source} is a run of kind {kind!r}, this one is of kind {own!r}")
    model = getattr(run, "model", None)
    if model is None or "model" not in before:
        return
    # Through the schema, so that fields that are younger than the checkpoint have their defaults.
    built = config_io.from_dict(typing.get_type_hints(type(run))["model"], before["model"])
    was, now = ({"model": config_io.to_dict(item)} for item in (built, model))
    for field, (old, new) in differences(was, now).items():
        if not field.startswith(_HANDLING):
            raise ConfigError(
                f"{field}: is {new!r} now, but {source} was trained with {old!r}: a fork keeps the model; set it to "
                "that, or start anew"
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """List the fields in which two runs' configurations differ.

    Args:
        before: Plain values.
        now: Plain values.

    Returns:
        (before, now) by dotted field; what each run has of its own, also paths inside its directory, is no difference.
    """
    old, new = (_flat(_relative(tree, str(tree.get("run_dir") or ""))) for tree in (before, now))
    fields = [field for field in sorted(old.keys() | new.keys()) if field not in _OWN]
    return {field: [old.get(field), new.get(field)] for field in fields if old.get(field) != new.get(field)}


def add_ancestor(checkpoint: Path, manifest: Mapping[str, Any], run: RunConfig) -> list[dict[str, Any]]:
    """Make the list of ancestors of a run that starts from another run's checkpoint.

    Args:
        checkpoint: Where it starts.
        manifest: Of the checkpoint.
        run: The new run.

    Returns:
        Oldest first: ``run``, ``step``, ``fingerprint`` (SHA-256 of the state), ``overrides`` that were made on
        starting from it, and ``wandb_id``.
    """
    config = manifest.get("config", {})
    entry = {
        "run": str(checkpoint.parent.parent),
        "step": int(manifest["step"]),
        "fingerprint": storage.fingerprint(checkpoint),
        "overrides": differences(config, config_io.to_dict(run)),
        "wandb_id": (manifest.get("tracker") or {}).get("wandb_id"),
    }
    return [*manifest.get("ancestors", ()), entry]


def inherited_counts(tracker: Mapping[str, Any] | None) -> dict[str, Any]:
    """Take what a fork's tracker goes on from out of another run's state: counts of bad samples, not its W&B run."""
    return {"inherited_bad": dict((tracker or {}).get("bad", {}))}


def _relative(tree: Any, run_dir: str) -> Any:
    """Write paths inside a run's own directory without it."""
    if isinstance(tree, Mapping):
        return {name: _relative(item, run_dir) for name, item in tree.items()}
    if isinstance(tree, list):
        return [_relative(item, run_dir) for item in tree]
    inside = isinstance(tree, str) and run_dir and tree.startswith(run_dir.rstrip("/") + "/")
    return "RUN_DIR" + tree.removeprefix(run_dir.rstrip("/")) if inside else tree


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        return {key: value for name, item in tree.items() for key, value in _flat(item, f"{path}.{name}").items()}
    return {path.removeprefix("."): tree}
