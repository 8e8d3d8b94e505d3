"""Frames on their way into a network: chosen, resized, cropped and normalised as in its training; said in words too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ltd.config import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: Forward passes take at most about this many pixels at once, so that memory does not grow with the batch.
PIXELS_PER_PASS = 32 * 224 * 224


@dataclass(frozen=True, kw_only=True)
class FramesConfig:
    """How a network wants its frames."""

    #: Side in pixels of the square that it sees; null for frames at their own size.
    size: int | None = 224
    #: ``whole``: the whole frame is squeezed into the square; ``crop``: its shorter side becomes ``shorter`` and the
    #: middle square is taken.
    fit: Literal["whole", "crop"] = "whole"
    #: Length of the shorter side before the crop; null for ``size``.
    shorter: int | None = None
    #: Filter of the resizing, antialiased, on 8-bit pixels: Pillow's, which the published processors use.
    resize: Literal["bilinear", "bicubic"] = "bicubic"
    #: What 0..255 becomes: ``byte`` (0..255), ``unit`` (0..1) or ``signed`` (-1..1); mean and deviation follow.
    range: Literal["byte", "unit", "signed"] = "unit"
    #: Subtracted from R, G and B.
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    #: R, G and B are divided by it. Above 0.
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    #: Order of the dimensions; without t the network sees frames one by one and the outputs are averaged.
    layout: Literal["nchw", "nhwc", "ncthw", "ntchw"] = "nchw"
    #: Frames that a network of clips sees, evenly spread over the clip; null for all.
    num_frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "shorter", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, needed 1 or more, or null")
        if self.shorter is not None and (self.size is None or self.fit != "crop" or self.shorter < self.size):
            raise ConfigError(f"shorter: got {self.shorter}, needed at least size, with fit: crop")
        if min(self.std) <= 0:
            raise ConfigError(f"std: got {list(self.std)}, needed numbers above 0")
        if self.num_frames is not None and not self.sees_clips:
            raise ConfigError(f"num_frames: got {self.num_frames}, needed null for a network of single frames")

    @property
    def sees_clips(self) -> bool:
        """Whether the network sees several frames at once."""
        return "t" in self.layout

    def __str__(self) -> str:
        parts = []
        if self.num_frames is not None:
            parts.append(f"{self.num_frames} frames of each clip, evenly spread")
        if self.size is None:
            parts.append("frames at their own size")
        elif self.fit == "whole":
            parts.append(f"Pillow's {self.resize} resize of the whole frame to {self.size}x{self.size}")
        else:
            side = self.shorter or self.size
            parts.append(f"Pillow's {self.resize} resize of the shorter side to {side}")
            parts.append(f"middle {self.size}x{self.size}")
        parts.append({"byte": "0..255", "unit": "0..1", "signed": "-1..1"}[self.range])
        if self.mean != (0, 0, 0) or self.std != (1, 1, 1):
            parts.append(f"less {_listed(self.mean)}, over {_listed(self.std)}")
        if not self.sees_clips:
            parts.append("mean over frames")
        return ", ".join(parts)


def prepare(clips: Tensor, config: FramesConfig) -> Tensor:
    """Make a network's input.

    Args:
        clips: uint8 ``(b, t, h, w, 3)``.
        config: What it wants.

    Returns:
        float32 in the config's layout; ``n`` is ``b`` for a network of clips, ``b * t`` for one of frames.

    Raises:
        ValueError: If a clip has fewer frames than the network needs.
    """
    if config.num_frames is not None:
        clips = clips[:, spread(clips.shape[1], config.num_frames)]
    b, t = clips.shape[:2]
    x = clips.flatten(0, 1).permute(0, 3, 1, 2)  # (b * t, 3, h, w)
    if config.size is not None:
        x = _fit(x, config)
    x = x.float()
    scale, shift = {"byte": (1.0, 0.0), "unit": (255.0, 0.0), "signed": (127.5, 1.0)}[config.range]
    x = x / scale - shift
    x = (x - x.new_tensor(config.mean).view(3, 1, 1)) / x.new_tensor(config.std).view(3, 1, 1)
    match config.layout:
        case "nchw":
            return x
        case "nhwc":
            return x.permute(0, 2, 3, 1).contiguous()
        case "ntchw":
            return x.unflatten(0, (b, t))
        case "ncthw":
            return x.unflatten(0, (b, t)).transpose(1, 2).contiguous()


def spread(length: int, count: int) -> list[int]:
    """Pick the middle frame of each of ``count`` equal spans.

    Args:
        length: Frames there are.
        count: Frames wanted.

    Returns:
        Their numbers.

    Raises:
        ValueError: If there are fewer than wanted.
    """
    if length < count:
        raise ValueError(f"clips of {length} frames: this network needs {count} or more")
    return [math.floor((i + 0.5) * length / count) for i in range(count)]


def in_passes(
    clips: Tensor, config: FramesConfig, network: Callable[[Tensor], Tensor], *, batch: int | None = None
) -> Tensor:
    """Run a network over clips in passes of bounded size.

    Args:
        clips: uint8 ``(b, t, h, w, 3)``.
        config: What the network wants.
        network: Maps ``prepare``'s result to ``(n, dim)``.
        batch: Inputs of each pass; None fits them to the pixels.

    Returns:
        float32 ``(b, dim)`` on the CPU, mean over frames for a network of single frames.
    """
    check_clips(clips)
    b, t, height, width = clips.shape[:4]
    units = clips if config.sees_clips else clips.flatten(0, 1)[:, None]  # (n, t or 1, h, w, 3)
    seen = config.num_frames or units.shape[1]
    pixels = seen * (height * width if config.size is None else config.size**2)
    outputs = [network(prepare(part, config)) for part in units.split(batch or max(1, PIXELS_PER_PASS // pixels))]
    found = torch.cat([output.float().cpu() for output in outputs])
    return found if config.sees_clips else found.unflatten(0, (b, t)).mean(dim=1)


def check_clips(clips: Tensor) -> None:
    """Check that clips are uint8 ``(b, t, h, w, 3)``, none of it empty; ``ValueError`` if not."""
    if clips.dtype != torch.uint8 or clips.dim() != 5 or clips.shape[-1] != 3 or 0 in clips.shape:
        raise ValueError(f"features need clips uint8 (b, t, h, w, 3), got {clips.dtype} {tuple(clips.shape)}")


def _fit(x: Tensor, config: FramesConfig) -> Tensor:
    assert config.size is not None
    height, width = x.shape[2:]
    if config.fit == "whole":
        target = (config.size, config.size)
    else:
        side = config.shorter or config.size
        short = min(height, width)
        target = (int(side * height / short), int(side * width / short))
    if target != (height, width):
        # Pillow itself: it rounds to 8 bits between the two directions, so that even torch's 8-bit filter differs.
        rule = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[config.resize]
        frames = [Image.fromarray(frame).resize(target[::-1], rule) for frame in x.permute(0, 2, 3, 1).cpu().numpy()]
        x = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
    top, left = (target[0] - config.size) // 2, (target[1] - config.size) // 2
    return x[:, :, top : top + config.size, left : left + config.size]


def _listed(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
