"""Reading what others saved: configurations and weights. Nothing is unpickled but plain tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ltd.config import ConfigError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Args:
        folder: Folder of a model.

    Returns:
        Its mapping.

    Raises:
        ConfigError: If it is missing or no mapping.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: holds no config.json; needed a folder that diffusers saved")
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no mapping")
    return tree


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read one file of weights, or the parts that an index lists.

    Args:
        folder: Folder of a model.

    Returns:
        Tensors by name.

    Raises:
        ConfigError: If there are none, or a file cannot be read.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        old = next(iter(sorted(folder.glob("*.bin"))), None)
        hint = f"; {old.name} is a pickle, which is never read: save it with safe_serialization=True" if old else ""
        raise ConfigError(f"{folder}: holds no {WEIGHTS}{hint}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{index}: names {name!r}, which is not a file of this folder")
        try:
            tensors |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{folder / name}: cannot be read ({error})") from None
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint of one file: safetensors, or a file of torch that holds nothing but tensors and plain values.

    Args:
        path: The file. Of ``{"ema": ..., "model": ...}`` the average is taken.

    Returns:
        Tensors by name, without the prefix of a parallel wrapper.

    Raises:
        ConfigError: If it cannot be read without running code of it, or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch refuses to unpickle has an error type of its own
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: cannot be read as plain tensors ({first})") from None
    for name in ("ema", "model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(x, Tensor) for x in found.values()):
        raise ConfigError(f"{path}: holds no mapping of names to tensors")
    prefix = "module."
    whole = all(name.startswith(prefix) for name in found)
    return {name.removeprefix(prefix) if whole else name: value for name, value in found.items()}


def check_dtypes(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse tensors of several dtypes, or of none that is floating.

    Args:
        tensors: By name.
        folder: Where they are from, for the message.

    Raises:
        ConfigError: Names a tensor of each dtype.
    """
    found: dict[torch.dtype, str] = {}
    for name, value in tensors.items():
        found.setdefault(value.dtype, name)
    if len(found) > 1 or not all(dtype.is_floating_point for dtype in found):
        listed = ", ".join(f"{name}: {str(dtype).removeprefix('torch.')}" for dtype, name in found.items())
        raise ConfigError(f"{folder}: tensors are of several or no floating types ({listed}); needed one")


def check_settings(
    tree: Mapping[str, Any], known: Mapping[str, Any], name: str, nullable: Collection[str] = ()
) -> None:
    """Refuse settings that are unknown, or of another type than their default.

    Args:
        tree: Contents of a ``config.json``. Keys that begin with ``_`` are notes of who wrote it; unknown ones that are
            null or false are off.
        known: Default of every setting: None stands for an integer, or none; ``...`` for what is checked elsewhere.
        name: Of the class, for the message.
        nullable: Further settings that may be null.

    Raises:
        ConfigError: Names the first setting that is unknown or of another type.
    """
    for key, value in tree.items():
        if key.startswith("_"):
            continue
        if key not in known:
            if value is None or value is False:  # of a wider class that the model was saved as before
                continue
            raise ConfigError(f"{name}.{key}: got {value!r}, which no known setting of {name} is")
        default = known[key]
        if default is ...:
            continue
        may_be_null = default is None or key in nullable
        if not (may_be_null and value is None) and not _is_like(value, 1 if default is None else default):
            needed = _needed(1 if default is None else default) + (" or null" if may_be_null else "")
            raise ConfigError(f"{name}.{key}: got {value!r}, needed {needed}")


def _is_like(value: Any, default: Any) -> bool:
    """Say whether a value is of its default's type; integers count 1 or more, floats are finite and 0 or more."""
    if isinstance(default, list):
        return isinstance(value, list | tuple) and len(value) == len(default) and all(type(x) is int for x in value)
    if isinstance(default, bool | str):
        return type(value) is type(default)
    if isinstance(value, bool):
        return False
    if isinstance(default, int):
        return isinstance(value, int) and value >= 1
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _needed(default: Any) -> str:
    if isinstance(default, list):
        return f"a list of {len(default)} integers"
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, str):
        return "a text"
    return "an integer of 1 or more" if isinstance(default, int) else "a number of 0 or more"
