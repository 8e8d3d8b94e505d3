"""Denoisers in public layouts, read and written: diffusers' folders, and original checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ltd import storage
from ltd.config import ConfigError
from ltd.denoisers import Dit, DitConfig, Parametrized
from ltd.diffusion import ParametrizationConfig
from ltd.interop import dit, mapping, wan_dit
from ltd.interop.card import write_card
from ltd.interop.mapping import Pair
from ltd.interop.reading import WEIGHTS, check_dtypes, read_config, read_file, read_weights

#: Denoisers of diffusers.
DENOISER_CLASSES = (wan_dit.CLASS_NAME, dit.CLASS_NAME)
LAYOUTS = ("diffusers", "wan", *dit.ORIGINALS)


def import_denoiser(
    source: str | Path, layout: str = "diffusers", *, settings: Mapping[str, Any] | None = None
) -> Dit | Parametrized:
    """Read a denoiser of a public layout.

    Args:
        source: Folder with ``config.json`` (diffusers' model or pipeline, the original Wan), or an original checkpoint
            of DiT, SiT or LightningDiT: a file, or a folder that holds one.
        layout: ``diffusers``, ``wan``, ``dit``, ``sit`` or ``lightning_dit``.
        settings: What an original checkpoint does not tell: ``num_heads``, ``use_rope``; of an export of ours, its
            ``config.json`` tells it.

    Returns:
        A module ``(x_t, t, cond) -> v`` in the dtype of the files, in evaluation mode.

    Raises:
        ConfigError: If there is no such model, or a key, shape, dtype or setting does not fit.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout: got {layout!r}, needed one of {', '.join(LAYOUTS)}")
    if settings and layout not in dit.ORIGINALS:
        raise ConfigError(f"settings: got {', '.join(settings)}; layout {layout} says all in its config.json")
    path = Path(source)
    try:
        config, pairs, theirs = _read(path, layout, settings or {})
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"{path}: its configuration or index of weights cannot be read: {error!r}") from None
    check_dtypes(theirs, path)
    with torch.device("meta"):
        model = Dit(config)
    try:
        ours = mapping.to_ours(pairs, theirs, model.state_dict())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (RuntimeError, IndexError, ValueError) as error:
        raise ConfigError(f"{path}: a tensor has other axes than its configuration says: {error}") from None
    model.load_state_dict(ours, assign=True)
    model = model.eval().requires_grad_(False)
    # Of all these layouts, those without classes are Wan's, which predict velocities.
    meant = ParametrizationConfig() if config.num_classes is None else dit.parametrization(layout)
    return model if meant == ParametrizationConfig() else Parametrized(model, meant).eval()


def export_denoiser(
    model: Dit | Parametrized,
    directory: str | Path,
    layout: str = "diffusers",
    *,
    lineage: Mapping[str, Any] | None = None,
) -> str:
    """Write a denoiser in a public layout.

    Args:
        model: Denoiser, whole on this process.
        directory: Folder to make.
        layout: As in ``import_denoiser``.
        lineage: What the card says of where the weights are from.

    Returns:
        What was written, in words.

    Raises:
        ConfigError: If the layout has no such architecture, says what differs; or the folder exists.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout: got {layout!r}, needed one of {', '.join(LAYOUTS)}")
    meant = model.parametrization if isinstance(model, Parametrized) else ParametrizationConfig()
    network = model.network if isinstance(model, Parametrized) else model
    if Path(directory).exists():
        raise ConfigError(f"{directory}: exists; name a new folder")
    name, tree, tensors = _written(network, layout)
    needed = ParametrizationConfig() if name in ("WanTransformer3DModel", "WanModel") else dit.parametrization(layout)
    if meant != needed:
        raise ConfigError(
            f"objective: the network predicts {meant.prediction.kind} on path {meant.path.kind}, {name} predicts "
            f"{needed.prediction.kind} on path {needed.path.kind}"
        )
    with storage.atomic_directory(directory) as folder:
        storage.write_json(folder / "config.json", tree)
        target = WEIGHTS if layout in ("diffusers", "wan") else "model.safetensors"
        save_file({key: value.cpu() for key, value in tensors.items()}, folder / target, {"format": "pt"})
        write_card(folder / "README.md", name, network.config, meant, lineage or {})
    return name


def _read(path: Path, layout: str, settings: Mapping[str, Any]) -> tuple[DitConfig, list[Pair], dict[str, Tensor]]:
    """Read configuration, map and weights."""
    if layout in dit.ORIGINALS:
        file = _only_file(path)
        theirs = read_file(file)
        told = dit.merge_settings(layout, _own_settings(file.parent), settings, str(file.parent / "config.json"))
        config = dit.original_config(layout, theirs, told)
        return config, dit.original_pairs(layout, config), dit.without_constants(config, theirs)
    if not (path / "config.json").is_file() and (path / "transformer" / "config.json").is_file():
        path = path / "transformer"
    tree, theirs = read_config(path), read_weights(path)
    name = tree.get("_class_name")
    needed = (wan_dit.ORIGINAL_CLASS_NAME,) if layout == "wan" else DENOISER_CLASSES
    if name not in needed:
        raise ConfigError(f"{path}: holds a {name!r}, needed {' or '.join(needed)} for layout {layout}")
    if name == dit.CLASS_NAME:
        config = dit.to_config(tree, theirs)
        return config, dit.pairs(config), theirs
    config = wan_dit.to_config(tree)
    return config, wan_dit.pairs(config, original=layout == "wan"), theirs


def _written(network: Dit, layout: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Make the class's name, its configuration and its tensors."""
    config, ours = network.config, network.state_dict()
    if layout in dit.ORIGINALS:
        dit.check_original(layout, config)
        tensors = mapping.to_theirs(dit.original_pairs(layout, config), ours) | dit.constants(config)
        return layout, {"layout": layout, "num_heads": config.num_heads, "use_rope": config.rotary}, tensors
    if layout == "wan":
        tree = wan_dit.original_config(config)
        return wan_dit.ORIGINAL_CLASS_NAME, tree, mapping.to_theirs(wan_dit.pairs(config, original=True), ours)
    if config.text_dim is not None:
        return wan_dit.CLASS_NAME, wan_dit.from_config(config), mapping.to_theirs(wan_dit.pairs(config), ours)
    return dit.CLASS_NAME, dit.from_config(config), mapping.to_theirs(dit.pairs(config), ours)


def _own_settings(folder: Path) -> dict[str, Any] | None:
    """Read the ``config.json`` beside an original checkpoint, if it is one that says the layout, as our exports do."""
    if not (folder / "config.json").is_file():
        return None
    tree = read_config(folder)
    return tree if "layout" in tree else None


def _only_file(path: Path) -> Path:
    """Find the checkpoint: the file itself, or the only one of a folder."""
    if path.is_file():
        return path
    found = sorted(p for suffix in (".safetensors", ".pt", ".pth", ".bin") for p in path.glob(f"*{suffix}"))
    if len(found) != 1:
        raise ConfigError(f"{path}: holds {len(found)} checkpoints, needed one file (.safetensors, .pt, .pth, .bin)")
    return found[0]
