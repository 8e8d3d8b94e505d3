"""Checkpoints of a run: one ``Saver.save`` that every process calls, whole or not at all, and ``load`` for any layout.

What lies in ``RUN/checkpoints/step-XXXXXXXX``: one shard of flat slices per process (``ltd.storage``) and, written
last, the manifest. ``RUN/latest`` names the newest. A save that fails on any process leaves older checkpoints whole.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ltd import storage
from ltd.config import ConfigError
from ltd.parallel.ema import Ema
from ltd.parallel.interface import Engine, full_shape
from ltd.parallel.layout import Layout
from ltd.parallel.saver import CRITIC, Saver, kept_buffers
from ltd.storage import Fill, Reader, StorageError

__all__ = ["Saver", "check_same_model", "load", "resolve"]

logger = logging.getLogger(__name__)


def resolve(resume: str, run_dir: str | Path) -> Path | None:
    """Find the checkpoint that ``resume`` asks for.

    Args:
        resume: ``auto`` (the run's newest, if any), ``never``, or the path of a run or a checkpoint. A checkpoint of
            the run itself is gone back to once; what was saved since, under the same ``resume``, is gone on from.
        run_dir: Directory of the run.

    Returns:
        Directory of a whole checkpoint; None to start from nothing.

    Raises:
        ConfigError: If a path was given and there is no whole checkpoint at it, or ``never`` would write over a run.
    """
    if resume == "never":
        if storage.latest_checkpoint(run_dir) is not None:
            raise ConfigError(
                f"run_dir: {run_dir} has checkpoints and resume is never; change run_dir, delete it, or resume=auto"
            )
        return None
    if resume == "auto":
        return storage.latest_checkpoint(run_dir)
    path = Path(resume)
    is_own = path.parent.resolve() == (Path(run_dir) / "checkpoints").resolve()
    own = storage.latest_checkpoint(run_dir)
    if is_own and own is not None and _came_after(own, path, resume):
        logger.info("went back to %s before: going on from %s", path, own)
        return own
    if own is not None and not is_own:
        logger.info("%s has checkpoints of its own: going on from %s, not from resume = %s", run_dir, own, resume)
        return own
    if (path / "manifest.json").is_file():
        return path
    found = storage.latest_checkpoint(path) if path.is_dir() else None
    if found is None:
        raise ConfigError(
            f"resume: got {resume}, no whole checkpoint there; needs auto, never, or a run or step directory"
        )
    return found


def _came_after(newest: Path, path: Path, resume: str) -> bool:
    """Say whether the newest checkpoint was saved by a run that had gone back to ``path``."""
    if storage.checkpoint_step(newest) <= storage.checkpoint_step(path):
        return False
    try:
        return bool(storage.read_manifest(newest).get("config", {}).get("resume") == resume)
    except StorageError:
        return False


def load(
    path: str | Path,
    engine: Engine,
    ema: Ema | None,
    layout: Layout | None = None,
    *,
    critic: Engine | None = None,
    field: str = "resume",
) -> dict[str, Any]:
    """Restore weights, optimizer state, buffers and averages; called by all processes, whatever layout wrote them.

    Every byte that is read is compared with its checksum. A checkpoint of another model raises ``ConfigError``
    (``check_same_model``) before anything is changed.

    Args:
        path: Checkpoint directory.
        engine: Engine of a freshly built model of the same configuration. Parameters that were trained and are frozen
            now, or the other way, are taken over, with a warning.
        ema: Averaged weights to restore; those that the checkpoint lacks start from the masters.
        layout: Processes that load together, and stop together if one of them meets damage; None for one alone.
        critic: Engine of a discriminator; it stays as it is, with a warning, where the checkpoint has none.
        field: Field of the configuration that named the checkpoint, for messages.

    Returns:
        The manifest: what ``save`` was given as ``extra``, ``step``, and how it was written.

    Raises:
        StorageError: On all processes, if a file is missing or damaged; names it, and an older checkpoint to use.
    """
    reader: Reader = _SharedReader(path, layout)
    reader = _Refit(reader, engine)
    check_same_model(reader, engine, field)
    engine.load_shards(reader, int(reader.manifest["optimizer_step"]))
    reader.fill(_buffer_fills(engine))
    if ema is not None:
        ema.load(reader)
    if critic is not None:
        _load_critic(reader, critic, field)
    return reader.manifest


def _load_critic(reader: Reader, critic: Engine, field: str) -> None:
    if reader.manifest.get("critic_step") is None:
        logger.warning("%s has no discriminator: it starts anew", reader.directory)
        return
    part = _CriticReader(reader)
    check_same_model(part, critic, field)
    critic.load_shards(part, int(reader.manifest["critic_step"]))
    part.fill(_buffer_fills(critic))


def _buffer_fills(engine: Engine) -> list[Fill]:
    return [Fill("buffer", name, 0, buffer) for name, buffer in kept_buffers(engine).items()] + engine.frozen.fills()


class _CriticReader(Reader):
    """The groups of a discriminator in a checkpoint, under the names that any model's have."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.directory, self.manifest = reader.directory, reader.manifest

    def groups(self) -> set[str]:
        return {group.removeprefix(CRITIC) for group in self._reader.groups() if group.startswith(CRITIC)}

    def names(self, group: str) -> list[str]:
        return self._reader.names(CRITIC + group)

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        return self._reader.shape(CRITIC + group, name)

    def fill(self, fills: Iterable[Fill]) -> None:
        self._reader.fill([dataclasses.replace(fill, group=CRITIC + fill.group) for fill in fills])


class _Refit(Reader):
    """A checkpoint as an engine needs it that trains other parameters than the one that wrote it.

    Trained parameters lie under "master", frozen ones under "buffer". A parameter that was frozen has no averages,
    which then start from its value, and no moments, which then start at zero.
    """

    def __init__(self, reader: Reader, engine: Engine) -> None:
        self._reader = reader
        self.directory, self.manifest = reader.directory, reader.manifest
        names = {group: set(reader.names(group)) for group in reader.groups()}
        trained = {name: p.requires_grad for name, p in engine.module.named_parameters()}
        masters, buffers = names.get("master", set()), names.get("buffer", set())
        self._thawed = {name for name, now in trained.items() if now and name in buffers and name not in masters}
        self._frozen = {name for name, now in trained.items() if not now and name in masters}
        for what, found in (("trained and are frozen", self._frozen), ("frozen and are trained", self._thawed)):
            if found:
                logger.warning("%s: %d parameters were %s now", reader.directory, len(found), what)

    def groups(self) -> set[str]:
        return self._reader.groups() | ({"buffer"} if self._frozen else set())

    def names(self, group: str) -> list[str]:
        names = self._reader.names(group)
        match group:
            case "master":
                return [name for name in names if name not in self._frozen] + sorted(self._thawed)
            case "buffer":
                return [name for name in names if name not in self._thawed] + sorted(self._frozen)
        return names

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._group(group, name), name)

    def fill(self, fills: Iterable[Fill]) -> None:
        found = []
        for item in fills:
            if item.name in self._thawed and item.group not in ("master", "buffer", *self._reader.averages()):
                item.target.zero_()
            else:
                found.append(dataclasses.replace(item, group=self._group(item.group, item.name)))
        self._reader.fill(found)

    def _group(self, group: str, name: str) -> str:
        if name in self._frozen and group == "buffer":
            return "master"
        return "buffer" if name in self._thawed else group


class _SharedReader(Reader):
    """A reader of which all processes hear of the damage that one of them met, before the next collective."""

    def __init__(self, path: str | Path, layout: Layout | None) -> None:
        self._layout = layout
        self._together(lambda: super(_SharedReader, self).__init__(path))

    def fill(self, fills: Iterable[Fill]) -> None:
        self._together(lambda: super(_SharedReader, self).fill(fills))

    def _together(self, action: Callable[[], None]) -> None:
        problem = None
        try:
            action()
        except (StorageError, OSError) as error:
            problem = str(error)
        problems = [problem]
        if self._layout is not None and self._layout.any(problem is not None):
            problems = self._layout.gather_objects(problem)
        found = list(dict.fromkeys(text for text in problems if text is not None))
        if found:
            more = f" ({len(found) - 1} more files are damaged)" if len(found) > 1 else ""
            raise StorageError(f"{found[0]}{more}")


def check_same_model(reader: Reader, engine: Engine, field: str = "resume") -> None:
    """Compare names and shapes of a checkpoint with a model's.

    Args:
        reader: The checkpoint.
        engine: Engine of the model.
        field: Field of the configuration that named the checkpoint.

    Raises:
        ConfigError: If they differ; names up to three missing, extra and differently shaped tensors.
    """
    needed = {
        ("master", name): full_shape(parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    needed |= {("buffer", name): tuple(buffer.shape) for name, buffer in kept_buffers(engine).items()}
    stored = {
        (group, name): reader.shape(group, name)
        for group in ("master", "buffer")
        for name in (reader.names(group) if group in reader.groups() else [])
    }
    problems = {
        "missing in the checkpoint": [name for key, name in needed if (key, name) not in stored],
        "not in the model": [name for key, name in stored if (key, name) not in needed],
        "of another shape": [
            f"{key[1]} {stored[key]} instead of {shape}"
            for key, shape in needed.items()
            if key in stored and stored[key] != shape
        ],
    }
    found = [f"{what}: {', '.join(names[:3])} ({len(names)} in all)" for what, names in problems.items() if names]
    if found:
        raise ConfigError(f"{field}: {reader.directory} is a checkpoint of another model; {'; '.join(found)}")
