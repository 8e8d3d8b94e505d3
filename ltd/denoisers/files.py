"""Denoisers on disk: exported folders, and weights out of a training run's checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltd import storage
from ltd.config import ConfigError, from_dict, to_dict
from ltd.denoisers.config import DitConfig
from ltd.denoisers.dit import Dit
from ltd.denoisers.parametrized import Parametrized
from ltd.diffusion import ParametrizationConfig, read_parametrization
from ltd.storage import StorageError

TIME_CONVENTION = "noise-at-1"
"""t = 0 is data, t = 1 is noise; a loaded denoiser predicts dx_t/dt."""

TRAINING_ONLY = "alignment."
"""Tensors of a run that no export has."""


def build_denoiser(config: DitConfig) -> Dit:
    """Build a denoiser with freshly drawn parameters from its configuration."""
    match config:
        case DitConfig():
            return Dit(config)
        case _:
            raise ConfigError(f"model: no denoiser is built from {type(config).__name__}")


def save(model: Dit | Parametrized, directory: str | Path, *, lineage: Mapping[str, Any] | None = None) -> None:
    """Write an exported folder that ``load`` reads: weights, configuration, time convention, path and prediction.

    Args:
        model: Denoiser, whole on this process.
        directory: Folder to make; an existing one is replaced.
        lineage: Where the weights are from.
    """
    config = {"family": "denoiser", "model": to_dict(model.config), "time": TIME_CONVENTION}
    if lineage:
        config["lineage"] = dict(lineage)
    if isinstance(model, Parametrized):
        config["objective"] = to_dict(model.parametrization)
        model = model.network
    storage.save_model(directory, _exported(model.state_dict()), config)


def load(
    path: str | Path,
    *,
    weights: str = "ema",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Dit | Parametrized:
    """Load a denoiser, in evaluation mode.

    Args:
        path: Exported folder, run directory (its latest checkpoint is taken), or one checkpoint inside a run directory.
        weights: Which weights of a checkpoint: ``ema``, the first average that the run lists; ``raw``; or the name of
            one average, such as ``ema_0.9999``. An exported folder holds one set only.
        device: Where to put it; the CPU by default.
        dtype: Dtype of the parameters; as stored by default.

    Returns:
        A module ``(x_t, t, cond) -> v``: the network itself where it predicts the velocity of the linear path, else
        wrapped with the path and the prediction that it was trained with.

    Raises:
        ConfigError: If nothing is there, or the weights do not belong to the configuration.
        StorageError: If a tensor is of no floating type, parameters are of several, or a value is not finite.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file():
        tensors, config = storage.load_model(path)
        if config.get("time") != TIME_CONVENTION:
            raise ConfigError(f"{path / 'config.yaml'}: time: got {config.get('time')!r}, needed {TIME_CONVENTION!r}")
    else:
        tensors, config = storage.read_run(path, weights)
        if config.get("kind") != "denoiser":
            raise ConfigError(f"{path}: is a run of kind {config.get('kind')!r}, needed a denoiser's")
    if "model" not in config:
        raise ConfigError(f"{path}: its config.yaml has no section 'model'; not a denoiser's")
    model = build_denoiser(read_model(path, config["model"]))
    _load_strictly(model, _exported(tensors), path)
    model = model.to(device=device, dtype=dtype).eval()
    objective = config.get("objective") or config.get("run", {}).get("objective") or {}
    try:
        parametrization = read_parametrization(objective)
    except ConfigError as error:
        raise ConfigError(f"{path}: objective.{error}") from None
    return model if parametrization == ParametrizationConfig() else Parametrized(model, parametrization).eval()


def read_model(path: Path, section: Mapping[str, Any]) -> DitConfig:
    """Read the section ``model`` of an exported folder or of a run.

    Args:
        path: Where it is from, for the message.
        section: Plain values.

    Returns:
        The configuration.

    Raises:
        ConfigError: Names the folder, and the field that is unknown or wrong.
    """
    try:
        found: DitConfig = from_dict(DitConfig, section)
    except ConfigError as error:
        raise ConfigError(f"{path}: model: {error}") from None
    return found


def _exported(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith(TRAINING_ONLY)}


def _load_strictly(model: Dit, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give the model the tensors as its parameters; every name and shape must match."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        shapes = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
        raise ConfigError(
            f"{path}: the weights are of another model than its config.yaml: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}, {len(shapes)} of another shape "
            f"{[(name, found[name], expected[name]) for name in shapes[:3]]}"
        )
    _check_values(tensors, {name for name, _ in model.named_parameters()}, path)
    model.load_state_dict(dict(tensors), assign=True)  # takes the stored dtype


def _check_values(tensors: Mapping[str, Tensor], parameters: Set[str], path: Path) -> None:
    """Refuse tensors that no training leaves, and parameters of several dtypes."""
    file = path / "model.safetensors" if storage.is_export(path) else path
    first = next(name for name in tensors if name in parameters)
    for name, value in tensors.items():
        check_tensor(file, name, value)
        if name in parameters and value.dtype != tensors[first].dtype:
            raise StorageError(
                f"{file}: {name} is {_name(value)} and {first} {_name(tensors[first])}, needed one type for all"
            )


def check_tensor(file: Path, name: str, value: Tensor) -> None:
    """Refuse a tensor that no training leaves.

    Args:
        file: Where it is from, for the message.
        name: Its name, for the message.
        value: The tensor.

    Raises:
        StorageError: If it is of no floating type, or a value is not finite.
    """
    if not value.is_floating_point():
        raise StorageError(f"{file}: {name} is {_name(value)}, needed a floating type")
    finite = value.isfinite()
    if not bool(finite.all()):
        raise StorageError(f"{file}: {int((~finite).sum())} of {value.numel()} values of {name} are not finite")


def _name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def describe(model: Dit) -> str:
    """Say in words what the model is: its size, and the options that change it."""
    defaults = DitConfig()
    changed = {
        field.name: getattr(model.config, field.name)
        for field in dataclasses.fields(DitConfig)
        if getattr(model.config, field.name) != getattr(defaults, field.name)
    }
    options = ", ".join(f"{name}={value}" for name, value in changed.items())
    return f"DiT with {count_parameters(model.config):,} parameters" + (f" ({options})" if options else "")


def count_parameters(config: DitConfig) -> int:
    """Count the parameters of a configuration's model, without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_denoiser(config).parameters())
