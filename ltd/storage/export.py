"""Exported folders: one model's tensors in ``model.safetensors``, and plain values in ``config.yaml``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from yaml import YAMLError

from ltd.storage.directories import atomic_directory
from ltd.storage.errors import StorageError
from ltd.storage.tensor_file import TensorFileWriter

EXPORT_FORMAT = 1
"""Format number of exported folders."""

TENSORS, CONFIG = "model.safetensors", "config.yaml"


def save_model(directory: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an exported folder: ``model.safetensors`` and ``config.yaml``, whole or not at all.

    Args:
        directory: Folder to make; an existing one is replaced.
        tensors: The model's state.
        config: Plain values: at least the model's configuration.
    """
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    stream_model(directory, shapes, lambda name: tensors[name], config)


def stream_model(
    directory: str | Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    config: Mapping[str, Any],
) -> None:
    """Write an exported folder one tensor at a time.

    Args:
        directory: Folder to make; an existing one is replaced.
        shapes: Dtype and shape by name.
        read: Gives the tensor of a name; called once for each.
        config: Plain values: at least the model's configuration.
    """
    with atomic_directory(directory) as incomplete:
        with TensorFileWriter(incomplete / TENSORS, shapes) as writer:
            for name in writer.order:
                writer.write(name, read(name))
        plain = {"format": EXPORT_FORMAT, **config}
        (incomplete / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))


def is_export(directory: str | Path) -> bool:
    """Say whether a directory is an exported folder."""
    return (Path(directory) / TENSORS).is_file()


def read_export_config(directory: str | Path) -> dict[str, Any]:
    """Read an exported folder's plain values.

    Args:
        directory: Folder that ``save_model`` wrote.

    Returns:
        The configuration.

    Raises:
        StorageError: If a file is missing, or of another format.
    """
    directory = Path(directory)
    for name in (TENSORS, CONFIG):
        if not (directory / name).is_file():
            raise StorageError(f"{directory / name}: not found; {directory} is no exported folder")
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(directory / CONFIG))
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{directory / CONFIG}: cannot be read ({error})") from error
    if not isinstance(config, dict) or "format" not in config:
        raise StorageError(f"{directory / CONFIG}: has no format number; {directory} is no exported folder")
    if config["format"] != EXPORT_FORMAT:
        raise StorageError(f"{directory}: format {config['format']}, this version of ltd reads {EXPORT_FORMAT}")
    found: dict[str, Any] = config
    return found


def load_model(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an exported folder.

    Args:
        directory: Folder that ``save_model`` wrote.

    Returns:
        The tensors by name, and the plain configuration.

    Raises:
        StorageError: If a file is missing, damaged, or of another format.
    """
    config = read_export_config(directory)
    try:
        return load_file(Path(directory) / TENSORS), config
    except SafetensorError as error:
        raise StorageError(f"{Path(directory) / TENSORS}: damaged ({error})") from error
