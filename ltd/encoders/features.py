"""Features for metrics: clips -> one vector each, from a file of the user's or a network that a package ships.

Every feature carries its ``name`` (with a hash of the user's file) and ``preprocessing``, so that each number can say
where it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, cast, get_args, runtime_checkable

import torch
from torch import Tensor

from ltd.config import ConfigError, load
from ltd.encoders.onnx_file import OnnxFeatures, OnnxFeaturesConfig
from ltd.encoders.packaged import PackagedFeaturesConfig, PackagedName, build_packaged
from ltd.encoders.pretrained import TransformersFeaturesConfig, build_transformers
from ltd.encoders.torchscript import (
    I3dFeatures,
    I3dFeaturesConfig,
    InceptionFeatures,
    InceptionFeaturesConfig,
    TorchScriptFeatures,
    TorchScriptFeaturesConfig,
)


class Features(Protocol):
    """A frozen map from clips to vectors."""

    name: str
    preprocessing: str
    dim: int

    def __call__(self, clips: Tensor) -> Tensor:
        """Map uint8 ``(b, t, h, w, 3)`` to float32 ``(b, dim)``."""
        ...


@runtime_checkable
class ManyOutputs(Protocol):
    """Features that have other outputs beside the pooled vector: ``logits`` (Inception score), ``spatial`` (sFID)."""

    #: Width of each output by name; ``features`` is the pooled vector.
    dims: Mapping[str, int]

    def outputs(self, clips: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Map uint8 ``(b, t, h, w, 3)`` to float32 ``(b, dims[name])`` by name, in one pass."""
        ...


@runtime_checkable
class CaptionFeatures(Protocol):
    """Features whose space captions share, as CLIP's."""

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Map ``b`` captions to float32 ``(b, dim)``."""
        ...


FeaturesConfig: TypeAlias = (
    PackagedFeaturesConfig
    | InceptionFeaturesConfig
    | I3dFeaturesConfig
    | TorchScriptFeaturesConfig
    | OnnxFeaturesConfig
    | TransformersFeaturesConfig
)


def build_features(config: FeaturesConfig, *, device: torch.device | str = "cpu") -> Features:
    """Build a frozen network of features.

    Args:
        config: Which network.
        device: Where it runs.

    Returns:
        The features; ``ManyOutputs`` and ``CaptionFeatures`` tell what else they can do.

    Raises:
        ConfigError: If a file or package is missing, or a file is not what the config says.
    """
    match config:
        case PackagedFeaturesConfig():
            return build_packaged(config.name, device=device)
        case InceptionFeaturesConfig():
            return InceptionFeatures(config, device=device)
        case I3dFeaturesConfig():
            return I3dFeatures(config, device=device)
        case TorchScriptFeaturesConfig():
            return TorchScriptFeatures(config, device=device)
        case OnnxFeaturesConfig():
            return OnnxFeatures(config, device=device)
        case TransformersFeaturesConfig():
            return build_transformers(config, device=device)


def parse_features(text: str) -> FeaturesConfig:
    """Read a network as a command line names it.

    Args:
        text: Name of a packaged network; ``inception:FILE``, ``i3d:FILE`` or ``transformers:FOLDER``; or a YAML file
            with a config.

    Returns:
        The config.

    Raises:
        ConfigError: If it is none of these.
    """
    kind, _, path = text.partition(":")
    names = get_args(PackagedName)
    if text in names:
        return PackagedFeaturesConfig(name=cast("PackagedName", text))
    if Path(text).suffix in {".yaml", ".yml"}:
        config: FeaturesConfig = load(FeaturesConfig, text)
        return config
    match kind:
        case "inception" if path:
            return InceptionFeaturesConfig(path=path)
        case "i3d" if path:
            return I3dFeaturesConfig(path=path)
        case "transformers" if path:
            return TransformersFeaturesConfig(path=path)
    raise ConfigError(
        f"features: got {text!r}, needed {', '.join(names)}, inception:FILE, i3d:FILE, transformers:FOLDER "
        "or a YAML file"
    )
