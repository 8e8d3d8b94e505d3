"""Denoisers on disk: exported folders, and weights out of a training run's checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    model = build_denoiser(from_dict(DitConfig, config["model"]))
    _load_strictly(model, _exported(tensors), path)
    model = model.to(device=device, dtype=dtype).eval()
    objective = config.get("objective") or config.get("run", {}).get("objective") or {}
    try:
        parametrization = read_parametrization(objective)
    except ConfigError as error:
        raise ConfigError(f"{path}: objective.{error}") from None
    return model if parametrization == ParametrizationConfig() else Parametrized(model, parametrization).eval()


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
    model.load_state_dict(dict(tensors), assign=True)  # takes the stored dtype


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
