"""Checkpoints of a run: one ``save`` that every process calls, whole or not at all, and ``load`` for any layout.

What lies in ``RUN/checkpoints/step-XXXXXXXX``: one shard of flat slices per process (``ltd.storage``) and, written
last, the manifest. ``RUN/latest`` names the newest. A save that fails on any process leaves older checkpoints whole.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from ltd import storage
from ltd.config import ConfigError
from ltd.parallel.ema import GROUP, Ema
from ltd.parallel.interface import Engine, assign, flat, full_shape
from ltd.parallel.layout import Layout
from ltd.storage import Reader, Slice

logger = logging.getLogger(__name__)


def save(
    run_dir: str | Path,
    step: int,
    engine: Engine,
    ema: Ema | None,
    extra: dict[str, Any],
    layout: Layout,
    *,
    keep_last: int | None = None,
) -> Path:
    """Write the checkpoint of a step; called by all processes.

    Where writing fails on any of them, all raise ``OSError`` naming the path, the bytes needed and the bytes free.

    Args:
        run_dir: Directory of the run.
        step: Training steps done.
        engine: Engine whose masters, optimizer state and buffers are written.
        ema: Averaged weights, if there are any.
        extra: Plain values for the manifest (data position, tracker id, ...); the main process's are written.
        layout: This process's position.
        keep_last: Older checkpoints beyond this number are removed; None keeps all.

    Returns:
        Directory of the checkpoint.
    """
    path = storage.checkpoint_path(run_dir, step)
    _on_main(layout, path, lambda: storage.begin_directory(path))
    failure = None
    try:
        storage.write_shard(
            storage.incomplete_path(path), f"rank_{layout.global_rank:05d}", _slices(engine, ema, layout)
        )
    except OSError as error:
        failure = f"process {layout.global_rank}: {error}"
    _raise_anywhere(layout, path, failure)
    manifest = {
        **extra,
        "step": step,
        "optimizer_step": engine.applied_steps,
        "world_size": layout.world_size,
        "engine": engine.resolved_config(),
        "ema": ema is not None,
    }
    _on_main(layout, path, lambda: _finish(Path(run_dir), path, manifest, keep_last))
    return path


def resolve(resume: str, run_dir: str | Path) -> Path | None:
    """Find the checkpoint that ``resume`` asks for.

    Args:
        resume: ``auto`` (the run's newest, if any), ``never``, or the path of a run or a checkpoint.
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


def load(path: str | Path, engine: Engine, ema: Ema | None) -> dict[str, Any]:
    """Restore weights, optimizer state, buffers and averages; called by all processes, whatever layout wrote them.

    A checkpoint of another model raises ``ConfigError`` (``check_same_model``) before anything is changed.

    Args:
        path: Checkpoint directory.
        engine: Engine of a freshly built model of the same configuration.
        ema: Averaged weights to restore; they start from the masters if the checkpoint holds none.

    Returns:
        The manifest: what ``save`` was given as ``extra``, ``step``, and how it was written.
    """
    reader = Reader(path)
    check_same_model(reader, engine)
    engine.load_shards(reader, int(reader.manifest["optimizer_step"]))
    for name, buffer in _buffers(engine).items():
        assign(buffer, reader.read("buffer", name))
    if ema is not None:
        if GROUP in reader.groups():
            ema.load(reader)
        else:
            logger.warning("%s holds no averaged weights; the average starts from the loaded weights", path)
            ema.restart()
    return reader.manifest


def check_same_model(reader: Reader, engine: Engine) -> None:
    """Compare names and shapes of a checkpoint with a model's.

    Args:
        reader: The checkpoint.
        engine: Engine of the model.

    Raises:
        ConfigError: If they differ; names up to three missing, extra and differently shaped tensors.
    """
    needed = {
        ("master", name): full_shape(parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    needed |= {("buffer", name): tuple(buffer.shape) for name, buffer in _buffers(engine).items()}
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
        raise ConfigError(f"resume: {reader.directory} is a checkpoint of another model; {'; '.join(found)}")


def _slices(engine: Engine, ema: Ema | None, layout: Layout) -> list[Slice]:
    slices = [item for shard in engine.master_shards() if shard.owner for item in shard.slices()]
    if ema is not None:
        slices += ema.slices()
    if layout.is_main:
        slices += [Slice("buffer", name, tuple(b.shape), 0, flat(b)) for name, b in _buffers(engine).items()]
    return slices


def _buffers(engine: Engine) -> dict[str, Any]:
    """List what a checkpoint keeps besides trained tensors: persistent buffers and frozen parameters."""
    kept = engine.module.state_dict().keys()
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    return {name: b for name, b in engine.module.named_buffers() if name in kept} | frozen


def _finish(run_dir: Path, path: Path, manifest: dict[str, Any], keep_last: int | None) -> None:
    storage.write_manifest(storage.incomplete_path(path), manifest)
    storage.commit_directory(path)
    storage.write_latest(run_dir, path)
    if keep_last is not None:
        for old in storage.checkpoints(run_dir)[: -max(keep_last, 1)]:
            if old != path:
                shutil.rmtree(old)


def _on_main(layout: Layout, path: Path, action: Any) -> None:
    failure = None
    if layout.is_main:
        try:
            action()
        except OSError as error:
            failure = f"process 0: {error}"
    _raise_anywhere(layout, path, failure)


def _raise_anywhere(layout: Layout, path: Path, failure: str | None) -> None:
    failures = [text for text in layout.gather_objects(failure) if text is not None]
    if not failures:
        return
    if layout.is_main:
        storage.abort_directory(path)
    raise storage.StorageWriteError(
        f"checkpoint {path} was not written, older ones are whole; free some space and run the same command to resume: "
        f"{'; '.join(failures)}"
    )
