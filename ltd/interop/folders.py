"""Folders of diffusers' autoencoders, read and written: ``config.json`` and safetensors. Nothing is unpickled."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ltd import storage
from ltd.autoencoders import Autoencoder, ConvVae, ConvVaeConfig
from ltd.config import ConfigError
from ltd.interop import kl_vae, mapping, wan_vae
from ltd.interop.reading import WEIGHTS, check_dtypes, read_config, read_weights

logger = logging.getLogger(__name__)

_LAYOUTS: dict[str, ModuleType] = {layout.CLASS_NAME: layout for layout in (wan_vae, kl_vae)}
#: Autoencoders of diffusers.
AUTOENCODER_CLASSES = tuple(_LAYOUTS)


def import_autoencoder(source: str | Path, *, subfolder: str = "vae") -> ConvVae:
    """Read an autoencoder that diffusers saved.

    Args:
        source: Its folder, or that of a pipeline that holds it.
        subfolder: Where in a pipeline it lies.

    Returns:
        The autoencoder in the dtype of the files, with its latent statistics.

    Raises:
        ConfigError: If the folder holds no such autoencoder, or a key, shape or dtype does not fit its configuration.
    """
    folder = Path(source)
    if not (folder / "config.json").is_file() and (folder / subfolder / "config.json").is_file():
        folder = folder / subfolder
    tree = read_config(folder)
    layout = _LAYOUTS.get(tree.get("_class_name", ""))
    if layout is None:
        raise ConfigError(
            f"{folder}: holds a {tree.get('_class_name', 'model without _class_name')!r}, "
            f"needed {' or '.join(_LAYOUTS)}"
        )
    try:
        config: ConvVaeConfig = layout.to_config(tree)
        statistics = _statistics(tree, config.latent_channels)
        theirs = read_weights(folder)
    except ConfigError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"{folder}: config.json or the index of weights cannot be read: {error!r}") from None
    if layout is kl_vae:
        theirs = kl_vae.renamed(theirs)
    check_dtypes(theirs, folder)
    with torch.device("meta"):
        expected = _weights(ConvVae(config))
    try:
        ours = mapping.to_ours(layout.pairs(config), theirs, expected)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    except (RuntimeError, IndexError, ValueError) as error:
        raise ConfigError(f"{folder}: a tensor has other axes than its configuration says: {error}") from None
    model = ConvVae(config)
    # The latent statistics keep their own precision.
    model.load_state_dict(
        ours | {f"latent_norm.{k}": v for k, v in model.latent_norm.state_dict().items()}, assign=True
    )
    model.set_latent_norm(*statistics)
    model.lay_out_kernels()
    return model.eval().requires_grad_(False)


def export_autoencoder(model: Autoencoder, directory: str | Path) -> str:
    """Write an autoencoder so that diffusers loads it.

    Args:
        model: Autoencoder of an architecture that diffusers has.
        directory: Folder to make.

    Returns:
        Name of their class.

    Raises:
        ConfigError: If diffusers has no such architecture, says what differs; or the folder exists.
    """
    if not isinstance(model, ConvVae):
        raise ConfigError(f"diffusers has no architecture for kind {model.config.kind!r}, only for 'conv_vae'")
    layout = wan_vae if model.config.temporal_kernel == 3 else kl_vae
    clamps = layout is wan_vae
    if model.config.clamp != clamps:
        logger.warning("decoded frames are %s in diffusers, unlike here", "clamped" if clamps else "not clamped")
    statistics = model.latent_norm.to_plain()
    tree = layout.from_config(model.config, statistics["mean"], statistics["std"])
    theirs = mapping.to_theirs(layout.pairs(model.config), _weights(model))
    if Path(directory).exists():
        raise ConfigError(f"{directory}: exists; name a new folder")
    with storage.atomic_directory(directory) as folder:
        storage.write_json(folder / "config.json", tree)
        save_file({name: value.cpu() for name, value in theirs.items()}, folder / WEIGHTS, {"format": "pt"})
    return layout.CLASS_NAME


def _weights(model: ConvVae) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("latent_norm.")}


def _statistics(tree: Mapping[str, Any], channels: int) -> tuple[Tensor, Tensor]:
    """Read what maps raw latents to the scale that a denoiser sees."""
    mean, std = tree.get("latents_mean"), tree.get("latents_std")
    is_video = tree["_class_name"] == wan_vae.CLASS_NAME
    if is_video and (mean is None or std is None):
        raise ConfigError(f"latents_mean, latents_std: missing in config.json, needed {channels} numbers each")
    scale = 1.0 if is_video else tree.get("scaling_factor", 0.18215)
    if not isinstance(scale, int | float) or not scale > 0:
        raise ConfigError(f"scaling_factor: got {scale!r}, needed a number above 0")
    if mean is None or std is None:
        shift = tree.get("shift_factor") or 0.0
        if not _are_numbers([shift]):
            raise ConfigError(f"shift_factor: got {shift!r}, needed a number or null")
        mean, std = [shift] * channels, [1.0] * channels
    for name, value in (("latents_mean", mean), ("latents_std", std)):
        if not _are_numbers(value):
            raise ConfigError(f"{name}: got {value!r}, needed a list of numbers")
        if len(value) != channels:
            raise ConfigError(f"{name}: got {len(value)} numbers, needed one for each of {channels} latent channels")
    # With statistics of each channel, pipelines compute z * latents_std / scaling_factor + latents_mean.
    deviation = torch.tensor(std, dtype=torch.float64) / scale
    if not bool((deviation > 0).all()):
        raise ConfigError(f"latents_std: got {std}, needed numbers above 0")
    return torch.tensor(mean), deviation.float()


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(each, int | float) and math.isfinite(each) for each in values)
