"""Autoencoders on disk: exported folders and the checkpoints of runs, and the hash that ties latents to an autoencoder.

Knows the format of neither: both are ``ltd.storage``'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltd import config as ltd_config
from ltd import storage
from ltd.autoencoders.autoencoder import Autoencoder
from ltd.autoencoders.build import AutoencoderConfig, build_autoencoder
from ltd.config import ConfigError

#: Tensors of a run that no export has.
TRAINING_ONLY = "alignment."


def save(model: Autoencoder, directory: str | Path, *, lineage: Mapping[str, Any] | None = None) -> None:
    """Write an exported folder: weights, latent statistics and configuration.

    Args:
        model: Autoencoder.
        directory: Folder to make; an existing export is replaced.
        lineage: Plain values that say where the weights come from, such as the run and its step.
    """
    config = {"family": "autoencoder", "model": _plain(model), "lineage": dict(lineage or {})}
    storage.save_model(directory, model.state_dict(), config)


def load(
    path: str | Path,
    *,
    weights: str = "ema",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Autoencoder:
    """Read an autoencoder, ready to use: in evaluation mode, without gradients.

    Args:
        path: Exported folder; run directory (its export ``model/`` if that is of the latest checkpoint and ``weights``
            is "ema", else the latest checkpoint); or a checkpoint inside a run directory.
        weights: Which weights of a checkpoint: ``ema``, the first average that the run lists; ``raw``; or the name of
            one average, such as ``ema_0.9999``.
        device: Where to; CPU by default.
        dtype: Floating type of parameters and buffers; as stored by default.

    Returns:
        The autoencoder.

    Raises:
        ConfigError: If the path holds no autoencoder, or the tensors do not fit the configuration.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory; needed an exported autoencoder or a run directory")
    if weights == "ema":
        path = newest_export(path) or path
    if (path / "model.safetensors").is_file():
        tensors, tree = storage.load_model(path)
        if tree.get("family") != "autoencoder":
            raise ConfigError(f"{path}: holds a {tree.get('family')}, needed an autoencoder")
    else:
        tensors, tree = storage.read_run(path, weights)
        if tree.get("kind") != "autoencoder":
            raise ConfigError(f"{path}: is a run of kind {tree.get('kind')!r}, needed an autoencoder's")
    model = build_autoencoder(ltd_config.from_dict(AutoencoderConfig, tree["model"]))
    _fill(model, {name: value for name, value in tensors.items() if not name.startswith(TRAINING_ONLY)}, path)
    model.latents_of = tree.get("lineage", {}).get("latents_of") if tree.get("family") else None
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    model.lay_out_kernels()
    return model


def weights_hash(model: Autoencoder) -> str:
    """Hash the configuration and every stored tensor in fp32.

    Args:
        model: Autoencoder.

    Returns:
        SHA-256 as 64 hex digits; the same on every device. The latent statistics are left out: they do not change the
        raw latents that a cache holds. An export whose decoder alone was trained has the hash of the autoencoder that
        it went on from: caches and denoisers of that one's latents go with it.
    """
    if model.latents_of is not None:
        return model.latents_of
    config = _plain(model)
    if config["bottleneck"] == {"kind": "kl"}:  # as before there were others, so that older caches keep their hash
        del config["bottleneck"]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("latent_norm."):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _plain(model: Autoencoder) -> dict[str, Any]:
    return ltd_config.to_dict(model.config)


def newest_export(run_dir: Path) -> Path | None:
    """Find the export that a run made of its latest checkpoint; None where training went on since, or never ended."""
    export, checkpoint = run_dir / "model", storage.latest_checkpoint(run_dir)
    if not (export / "model.safetensors").is_file():
        return None
    if checkpoint is None:
        return export
    _, tree = storage.load_model(export)
    return export if tree.get("lineage", {}).get("step") == storage.read_manifest(checkpoint)["step"] else None


def _fill(model: Autoencoder, tensors: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected))
    wrong = [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]
    if missing or extra or wrong:
        raise ConfigError(
            f"{path}: tensors do not fit the configuration: missing {missing[:3]}, unknown {extra[:3]}, "
            f"of another shape {wrong[:3]} ({len(missing)}, {len(extra)} and {len(wrong)} in all)"
        )
    model.load_state_dict(tensors)
