"""A trained model out of a run's checkpoint: which weights, their tensors, and the run's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ltd.storage.errors import StorageError
from ltd.storage.paths import MANIFEST, latest_checkpoint
from ltd.storage.reader import Reader

LINEAGE = "lineage.json"
"""Where a run that started from another's checkpoint keeps its ancestors."""


def open_run(path: str | Path) -> Reader:
    """Open a checkpoint for reading.

    Args:
        path: Run directory (its latest checkpoint is taken), or one checkpoint inside it.

    Returns:
        The reader.

    Raises:
        StorageError: If there is no whole checkpoint, or it is damaged.
    """
    path = Path(path)
    checkpoint = path if (path / MANIFEST).is_file() else latest_checkpoint(path)
    if checkpoint is None:
        raise StorageError(f"{path}: neither an exported folder (model.safetensors) nor a run with a whole checkpoint")
    return Reader(checkpoint)


def read_lineage(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read the ancestors of a run.

    Args:
        run_dir: Run directory.

    Returns:
        Oldest first, each with ``run``, ``step``, ``fingerprint`` and ``overrides``; none where the run started anew.

    Raises:
        StorageError: If the file cannot be read.
    """
    file = Path(run_dir) / LINEAGE
    if not file.is_file():
        return []
    try:
        return [{**entry, "run": str(entry["run"])} for entry in json.loads(file.read_bytes())["ancestors"]]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{file}: needs a list of ancestors, each with a run: {error!r}") from error


def weights_group(reader: Reader, weights: str) -> str:
    """Find the group of tensors that a choice of weights means.

    Args:
        reader: The checkpoint.
        weights: ``ema`` (the first average that the run's configuration lists), ``raw`` (the masters), or the name of a
            group, such as ``ema_0.9999``.

    Returns:
        The group's name.

    Raises:
        StorageError: If the checkpoint does not hold those weights.
    """
    averages = reader.averages()
    group = {"raw": "master", "ema": averages[0] if averages else ""}.get(weights, weights)
    if group not in reader.groups() or group not in ["master", *averages]:
        held = ", ".join(["raw", *averages])
        raise StorageError(f"weights: got {weights!r}, but {reader.directory} holds {held}")
    return group


def read_run(path: str | Path, weights: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a model's tensors and the run's configuration out of a checkpoint.

    Args:
        path: Run directory (its latest checkpoint is taken), or one checkpoint inside it.
        weights: ``ema``, ``raw``, or the name of one average (``weights_group``).

    Returns:
        Weights and buffers by name, on the CPU, and the configuration that the checkpoint was written under.

    Raises:
        StorageError: If there is no whole checkpoint, or it lacks those weights.
    """
    reader = open_run(path)
    tensors = reader.read_full(weights_group(reader, weights))
    if "buffer" in reader.groups():
        tensors |= reader.read_full("buffer")
    return tensors, model_config(reader)


def model_config(reader: Reader) -> dict[str, Any]:
    """Take the run's configuration out of a checkpoint's manifest.

    Args:
        reader: The checkpoint.

    Returns:
        Plain values with a section ``model``.

    Raises:
        StorageError: If the manifest has none.
    """
    config = reader.manifest.get("config")
    if not isinstance(config, dict) or "model" not in config:
        raise StorageError(f"{reader.directory}: its manifest has no configuration of a model")
    return config
