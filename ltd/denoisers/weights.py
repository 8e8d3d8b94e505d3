"""Weights of a denoiser as they lie on disk, opened without a model: configuration, shapes, tensors read one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ltd import storage
from ltd.config import ConfigError
from ltd.denoisers.config import DitConfig
from ltd.denoisers.files import TIME_CONVENTION, check_tensor, read_model
from ltd.diffusion import ParametrizationConfig, read_parametrization


@dataclass(frozen=True)
class Weights:
    """One set of weights of a denoiser.

    Attributes:
        config: The model that they are of.
        shapes: Shape of every tensor by name.
        read: Gives the tensor of a name, on the CPU.
        objective: Path and prediction that the model was trained with.
        lineage: What it depends on besides its weights (hashes, statistics of its latents); empty where unknown.
        files: Exported folder or checkpoint that they are read from.
    """

    config: DitConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    objective: ParametrizationConfig = field(default_factory=ParametrizationConfig)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    files: Path | None = None

    @classmethod
    def of(cls, state: Mapping[str, Tensor], config: DitConfig) -> Weights:
        """Take the tensors of a state dict, which belong to the configuration."""
        return cls(config, {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the files hold, as 64 hex digits; reads an exported folder whole."""
        assert self.files is not None
        if storage.is_export(self.files):
            return storage.sha256_file(self.files / "model.safetensors")
        return storage.fingerprint(self.files)


def open_weights(path: str | Path, weights: str = "ema") -> Weights:
    """Open a denoiser's weights without reading them.

    Args:
        path: Exported folder, run directory (its latest checkpoint is taken), or one checkpoint inside a run directory.
        weights: Which weights of a checkpoint: ``ema``, ``raw`` or the name of one average, as for ``load``; an
            exported folder holds one set only.

    Returns:
        The weights; each tensor is verified as it is read, where its file has checksums.

    Raises:
        ConfigError: If what is there is no denoiser.
    """
    path = Path(path)
    if storage.is_export(path):
        return _open_export(path)
    reader = storage.open_run(path)
    group = storage.weights_group(reader, weights)
    config = storage.model_config(reader)
    if config.get("kind") != "denoiser":
        raise ConfigError(f"{path}: is a run of kind {config.get('kind')!r}, needed a denoiser's")
    names = dict.fromkeys(reader.names(group), group)
    if "buffer" in reader.groups():
        names |= dict.fromkeys(reader.names("buffer"), "buffer")
    lineage = reader.manifest.get("lineage") or {}
    _check_time(reader.directory, lineage.get("time", TIME_CONVENTION))
    shapes = {name: reader.shape(where, name) for name, where in names.items()}

    def read(name: str) -> Tensor:
        value = reader.read(names[name], name).view(shapes[name])
        check_tensor(reader.directory, name, value)
        return value

    return Weights(_model(path, config), shapes, read, _objective(path, config), lineage, reader.directory)


def _open_export(path: Path) -> Weights:
    config = storage.read_export_config(path)
    _check_time(path, config.get("time"))
    file = safe_open(path / "model.safetensors", framework="pt")
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)

    def read(name: str) -> Tensor:
        value = file.get_tensor(name)
        check_tensor(path / "model.safetensors", name, value)
        return value

    objective = config if "objective" in config else config.get("run") or {}
    return Weights(_model(path, config), shapes, read, _objective(path, objective), config.get("lineage") or {}, path)


def _model(path: Path, config: Mapping[str, Any]) -> DitConfig:
    if "model" not in config:
        raise ConfigError(f"{path}: its config.yaml has no section 'model'; not a denoiser's")
    return read_model(path, config["model"])


def _objective(path: Path, config: Mapping[str, Any]) -> ParametrizationConfig:
    try:
        return read_parametrization(config.get("objective") or {})
    except ConfigError as error:
        raise ConfigError(f"{path}: objective.{error}") from None


def _check_time(path: Path, time: object) -> None:
    if time != TIME_CONVENTION:
        raise ConfigError(f"{path}: time: got {time!r}, needed {TIME_CONVENTION!r}")
