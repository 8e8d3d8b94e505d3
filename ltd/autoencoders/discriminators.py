"""Patch discriminators of images and videos: logits that each judge one region of a sample as real or reconstructed.

No statistic is shared between samples, nor between the frames of one: logits do not depend on what else is in a batch
or how it is dealt over processes, and images and clips are normalised alike. Knows nothing of losses or training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.nn.causal_conv import pad_front
from ltd.nn.norm import ChannelRMSNorm, FrameGroupNorm

#: The deeper layers are at most this many times as wide as the first.
_MAX_WIDENING = 8


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Architecture of a ``PatchDiscriminator``."""

    #: What a logit sees: "patch2d" a patch of one frame, "patch3d" a patch of several.
    kind: Literal["patch2d", "patch3d"] = "patch2d"
    #: Colour channels of the video.
    in_channels: int = 3
    #: Width of the first layer; it doubles with each further one, up to 8 times.
    channels: int = 64
    #: Layers that halve height and width, two more follow that do not; 3 give each logit a view of 70 x 70 pixels.
    num_layers: int = 3
    #: Norm behind all layers but the first and last: over groups of channels of a whole frame, over the channels of
    #: each pixel (which keeps a logit's view a patch), or none.
    norm: Literal["group", "rms", "none"] = "group"
    #: Groups of channels of the group norm; divides ``2 * channels``.
    num_groups: int = 32
    #: Frames that each kernel of patch3d covers, odd.
    time_kernel: int = 3
    #: How many of the halving layers of patch3d, from the first, halve time as well.
    time_strides: int = 2

    def __post_init__(self) -> None:
        for name in ("in_channels", "channels", "num_layers", "num_groups", "time_kernel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 1 or more")
        if self.norm == "group" and 2 * self.channels % self.num_groups:
            raise ConfigError(
                f"num_groups: got {self.num_groups}, needed a divisor of 2 * channels = {2 * self.channels}"
            )
        if self.time_kernel % 2 == 0:
            raise ConfigError(f"time_kernel: got {self.time_kernel}, needed an odd number")
        if self.kind == "patch3d" and not 0 <= self.time_strides <= self.num_layers:
            raise ConfigError(f"time_strides: got {self.time_strides}, needed 0 to num_layers = {self.num_layers}")

    @property
    def least_size(self) -> int:
        """Least height and width in pixels; one of this size has one logit per frame."""
        return 3 * 2**self.num_layers


class PatchDiscriminator(nn.Module):
    """Convolutional discriminator of patches; computes in its parameters' dtype and casts its input to it.

    Height and width: ``num_layers`` times halved, rounding down, then less 2. Frames: patch2d has logits for each;
    patch3d halves them ``time_strides`` times, *rounding up*, so that any number of frames will do and an image has one
    frame of logits. In time its kernels are centred and see the clip's first and last frame repeated beyond the ends: a
    clip of equal frames is judged as the image it shows, and no zeros tell a clip's ends from its middle.

    Reference: Isola et al. (2016), arXiv 1611.07004, App. 6.1.2 (70 x 70 PatchGAN; its batch norm is replaced).

    Args:
        config: Architecture.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(*_layers(config))

    def forward(self, video: Tensor) -> Tensor:
        """Judge videos or images.

        Args:
            video: ``(b, in_channels, t, h, w)`` in [-1, 1], any ``t``; h and w at least ``config.least_size``.

        Returns:
            Logits ``(b, 1, t', h', w')`` in the parameters' dtype, higher for real.

        Raises:
            ValueError: If the channels differ or a frame is too small.
        """
        self._check(video)
        weight = next(self.parameters())
        folded = self.config.kind == "patch2d"
        x = rearrange(video, "b c t h w -> (b t) c h w") if folded else video
        layout = torch.channels_last if folded else torch.channels_last_3d
        x = self.layers(x.to(device=weight.device, dtype=weight.dtype, memory_format=layout))
        return rearrange(x, "(b t) c h w -> b c t h w", b=video.shape[0]) if folded else x

    def decay_groups(self) -> dict[str, list[str]]:
        """Sort parameter names into those that weight decay applies to ("decay") and biases and norms ("no_decay")."""
        groups: dict[str, list[str]] = {"decay": [], "no_decay": []}
        for name, parameter in self.named_parameters():
            groups["decay" if parameter.ndim > 1 else "no_decay"].append(name)
        return groups

    def _check(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != self.config.in_channels or not video.shape[2]:
            raise ValueError(
                f"video: got shape {tuple(video.shape)}, needed (b, {self.config.in_channels}, t, h, w) "
                "(discriminator in_channels)"
            )
        if min(video.shape[3:]) < self.config.least_size:
            raise ValueError(
                f"video: got frames of {video.shape[3]} x {video.shape[4]} pixels, a discriminator with num_layers "
                f"{self.config.num_layers} needs at least {self.config.least_size} x {self.config.least_size}"
            )


def build_discriminator(config: DiscriminatorConfig) -> PatchDiscriminator:
    """Build the discriminator a configuration describes.

    Args:
        config: Architecture.

    Returns:
        The discriminator, with fresh weights.
    """
    return PatchDiscriminator(config)


class _Conv3d(nn.Conv3d):
    """3D convolution centred in time, with the first and last frame repeated beyond a clip's ends."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, t, h, w)`` to ``(b, c', ceil(t / stride), h', w')``."""
        beyond = self.kernel_size[0] // 2
        x = torch.cat([pad_front(x, beyond)] + [x[:, :, -1:]] * beyond, dim=2) if beyond else x
        return super().forward(x)


def _layers(config: DiscriminatorConfig) -> list[nn.Module]:
    """List the modules, from pixels to logits."""
    modules: list[nn.Module] = []
    width = config.in_channels
    for depth in range(config.num_layers + 1):
        halves = depth < config.num_layers
        wider = config.channels * min(2**depth, _MAX_WIDENING)
        time_stride = 2 if halves and depth < config.time_strides else 1
        modules.append(_conv(config, width, wider, stride=2 if halves else 1, time_stride=time_stride))
        if depth:
            modules += _norm(config, wider)
        modules.append(nn.LeakyReLU(0.2))
        width = wider
    return [*modules, _conv(config, width, 1)]


def _conv(config: DiscriminatorConfig, width: int, wider: int, *, stride: int = 1, time_stride: int = 1) -> nn.Module:
    conv: nn.Conv2d | nn.Conv3d
    if config.kind == "patch2d":
        conv = nn.Conv2d(width, wider, 4, stride, padding=1)
    else:
        kernel, strides = (config.time_kernel, 4, 4), (time_stride, stride, stride)
        conv = _Conv3d(width, wider, kernel, strides, padding=(0, 1, 1))
    nn.init.normal_(conv.weight, std=0.02)  # Isola et al. (2016), App. 6.2
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _norm(config: DiscriminatorConfig, width: int) -> list[nn.Module]:
    match config.norm:
        case "group":
            return [FrameGroupNorm(config.num_groups, width)]
        case "rms":
            return [ChannelRMSNorm(width)]
        case "none":
            return []
