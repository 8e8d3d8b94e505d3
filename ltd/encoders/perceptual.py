"""Perceptual distance between clips: LPIPS, with the network that a package ships or with VGG-16 weights of your own.

``st_lpips`` is the shift-tolerant AlexNet of a package. It is not the canonical LPIPS (whose backbone cannot be had in
a package), so its numbers compare only with themselves. ``vgg_lpips`` is the canonical one, from torchvision's VGG-16
weights in a local file and the heads that the ``lpips`` package ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.encoders.package_files import load_frozen, package_directory, read_weights

_CHANNELS = (64, 192, 384, 256, 256)
#: VGG-16's 3x3 convolutions by stage; a stage begins with 2x2 max-pooling, but for the first.
_VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
#: Where they lie in torchvision's ``features``.
_VGG_PLACES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
#: LPIPS' own normalisation of frames in [-1, 1].
_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True, kw_only=True)
class StLpipsConfig:
    """The shift-tolerant AlexNet and heads of the package stlpips-pytorch."""

    kind: Literal["st_lpips"] = "st_lpips"
    #: Frames of each clip that are compared, evenly spaced with the first and the last; null for all.
    max_frames: int | None = None

    def __post_init__(self) -> None:
        _check_frames(self.max_frames)


@dataclass(frozen=True, kw_only=True)
class VggLpipsConfig:
    """LPIPS 0.1 on VGG-16, from weights in local files; nothing is downloaded or unpickled."""

    kind: Literal["vgg_lpips"] = "vgg_lpips"
    #: torchvision's VGG-16 weights, a .pth or .safetensors file (``features.0.weight``, ...).
    backbone: str
    #: File of the heads (``lin0.model.1.weight``, ...), or "package:lpips", which ships them.
    heads: str = "package:lpips"
    #: Frames of each clip that are compared, evenly spaced with the first and the last; null for all.
    max_frames: int | None = None

    def __post_init__(self) -> None:
        _check_frames(self.max_frames)


PerceptualConfig: TypeAlias = StLpipsConfig | VggLpipsConfig


class PerceptualDistance(nn.Module):
    """LPIPS over frames: weighted squared differences of unit-length features.

    Gradients reach the inputs; the weights are frozen. Needs frames of at least 32 x 32 pixels.

    Reference: Zhang et al. (2018), arXiv 1801.03924, Eq. 1; Ghildyal and Liu (2022), arXiv 2207.13686 for ``st_lpips``.

    Args:
        config: Which network.
        field: Config field, or option of a tool, that asked for it, for messages.

    Raises:
        ConfigError: If a package or file is missing, or holds other weights.
    """

    def __init__(self, config: PerceptualConfig, *, field: str = "perceptual") -> None:
        super().__init__()
        self.max_frames = config.max_frames
        self.preprocessing = "frames in [-1, 1] at their own size"
        if config.max_frames is not None:
            self.preprocessing += f"; at most {config.max_frames} evenly spaced frames of each clip"
        match config:
            case StLpipsConfig():
                self.name = "st-lpips alexnet (shift-tolerant)"
                self.network, heads = _load_shift_tolerant(field)
            case VggLpipsConfig():
                self.name = f"lpips 0.1 vgg16 ({config.backbone})"
                self.network, heads = _load_vgg(config, field)
        for i, head in enumerate(heads):
            self.register_buffer(f"head{i}", head.float(), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compare clips.

        Args:
            x: ``(b, 3, t, h, w)`` in [-1, 1].
            y: The same shape and range.

        Returns:
            ``(b,)`` float32, 0 for equal clips; the mean over frames.

        Raises:
            ValueError: If the shapes differ or the frames are smaller than 32 x 32.
        """
        if x.shape != y.shape or x.dim() != 5 or x.shape[1] != 3:
            raise ValueError(
                f"perceptual distance needs two (b, 3, t, h, w), got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if min(x.shape[3:]) < 32:
            raise ValueError(f"perceptual distance needs frames of 32 x 32 or more, got {x.shape[3]} x {x.shape[4]}")
        if self.max_frames is not None and self.max_frames < x.shape[2]:
            index = torch.linspace(0, x.shape[2] - 1, self.max_frames, device=x.device).round().long()
            x, y = x[:, :, index], y[:, :, index]
        b, t = x.shape[0], x.shape[2]
        both = torch.stack((x, y)).transpose(2, 3).flatten(0, 2).float()  # (2 * b * t, 3, h, w)
        total = both.new_zeros(b * t)
        for i, features in enumerate(self.network(both)):
            fx, fy = _unit_length(features).chunk(2)
            weight = self.get_buffer(f"head{i}")
            total = total + torch.einsum("nchw,c->nhw", (fx - fy).square(), weight).mean(dim=(1, 2))
        return total.unflatten(0, (b, t)).mean(dim=1)


def build_perceptual(
    config: PerceptualConfig | None = None, *, device: torch.device | str = "cpu", field: str = "perceptual"
) -> PerceptualDistance:
    """Build the perceptual distance.

    Args:
        config: Which network; the one a package ships by default.
        device: Where it runs.
        field: Config field, or option of a tool, that asked for it, for messages.

    Returns:
        The frozen network.
    """
    return PerceptualDistance(config or StLpipsConfig(), field=field).to(device)


def _check_frames(max_frames: int | None) -> None:
    if max_frames is not None and max_frames < 1:
        raise ConfigError(f"max_frames: got {max_frames}, needed 1 or more, or null")


def _load_shift_tolerant(field: str) -> tuple[nn.Module, list[Tensor]]:
    folder = package_directory("stlpips_pytorch", field=field, pip_name="stlpips-pytorch==0.0.2", extra="eval")
    weights = read_weights(folder / "weights/vST0.0/alex_shift_tolerant.pth", field=field)
    with torch.device("meta"):
        network = _ShiftTolerantAlexNet()
    heads = [weights[f"lin{i}.model.1.weight"].flatten() for i in range(len(_CHANNELS))]
    return load_frozen(network, _rename(weights)), heads


def _load_vgg(config: VggLpipsConfig, field: str) -> tuple[nn.Module, list[Tensor]]:
    # An option of a tool has no fields below it.
    heads_field, backbone_field = (field if field[0] == "-" else f"{field}.{part}" for part in ("heads", "backbone"))
    heads_file = Path(config.heads)
    if config.heads.startswith("package:"):
        folder = package_directory(config.heads.removeprefix("package:"), field=heads_field)
        heads_file = folder / "weights/v0.1/vgg.pth"
    heads = _pick(
        _read(heads_file, heads_field),
        {f"lin{i}.model.1.weight": (1, stage[-1], 1, 1) for i, stage in enumerate(_VGG_STAGES)},
        heads_field,
        heads_file,
    )
    needed: dict[str, tuple[int, ...]] = {}
    renamed: dict[str, str] = {}
    before, number = 3, 0
    for widths, places in zip(_VGG_STAGES, _VGG_PLACES, strict=True):
        for width, place in zip(widths, places, strict=True):
            needed |= {f"features.{place}.weight": (width, before, 3, 3), f"features.{place}.bias": (width,)}
            renamed |= {f"features.{place}.{part}": f"convs.{number}.{part}" for part in ("weight", "bias")}
            before, number = width, number + 1
    path = Path(config.backbone)
    weights = _pick(_read(path, backbone_field), needed, backbone_field, path)
    with torch.device("meta"):
        network = _Vgg16()
    tensors = {renamed[name]: tensor for name, tensor in weights.items()}
    tensors |= {
        "shift": torch.tensor(_LPIPS_SHIFT).view(1, 3, 1, 1),
        "scale": torch.tensor(_LPIPS_SCALE).view(1, 3, 1, 1),
    }
    return load_frozen(network, tensors), [head.flatten() for head in heads.values()]


def _read(path: Path, field: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"{field}: no file {path}; needed weights as .pth or .safetensors")
    needed = "needed tensors by name, a state dict of torch.save (.pth) or a .safetensors file"
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else read_weights(path, field=field)
    except Exception as error:  # unpickling refused, or no such format; PyTorch says so in several lines
        raise ConfigError(f"{field}: {path} cannot be read as weights ({type(error).__name__}); {needed}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConfigError(f"{field}: {path} holds something else than weights; {needed}")
    return weights


def _pick(
    weights: Mapping[str, Tensor], needed: Mapping[str, tuple[int, ...]], field: str, path: Path
) -> dict[str, Tensor]:
    wrong = [name for name, shape in needed.items() if name not in weights or tuple(weights[name].shape) != shape]
    if wrong:
        got = tuple(weights[wrong[0]].shape) if wrong[0] in weights else "nothing"
        raise ConfigError(
            f"{field}: {path} has {got} for {wrong[0]}, needed {needed[wrong[0]]} ({len(wrong)} names do not fit)"
        )
    return {name: weights[name] for name in needed}


class _Vgg16(nn.Module):
    """The convolutions of VGG-16; returns the features after the last ReLU of each of five stages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        widths = [width for stage in _VGG_STAGES for width in stage]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip((3, *widths[:-1]), widths, strict=True)
        )

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Compute the features of ``(n, 3, h, w)`` in [-1, 1]."""
        x = (frames - self.get_buffer("shift")) / self.get_buffer("scale")
        outputs, convs = [], iter(self.convs)
        for stage, widths in enumerate(_VGG_STAGES):
            x = F.max_pool2d(x, 2) if stage else x
            for _ in widths:
                x = F.relu(next(convs)(x))
            outputs.append(x)
        return outputs


class _ShiftTolerantAlexNet(nn.Module):
    """AlexNet with stride 1 everywhere and blurred subsampling; returns the features after each of five layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        kernels, paddings, inputs = (11, 5, 3, 3, 3), (2, 2, 1, 1, 1), (3, *_CHANNELS)
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs[i], out, kernels[i], padding=paddings[i]) for i, out in enumerate(_CHANNELS)
        )

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Compute the features of ``(n, 3, h, w)`` in [-1, 1] after each layer's ReLU."""
        x = (frames - self.get_buffer("shift")) / self.get_buffer("scale")
        x = F.relu(_blur_half(self.convs[0](x)))
        outputs = [x]
        for i, conv in enumerate(list(self.convs)[1:]):
            if i < 2:  # the second and third convolutions work at half the size of what came before
                x = _blur_half(F.max_pool2d(x, kernel_size=3, stride=1))
            x = F.relu(conv(x))
            outputs.append(x)
        return outputs


def _blur_half(x: Tensor) -> Tensor:
    """Blur ``(n, c, h, w)`` with the 3 x 3 binomial filter after reflecting two pixels, and keep every second."""
    taps = x.new_tensor((0.25, 0.5, 0.25))
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def _unit_length(features: Tensor) -> Tensor:
    # The 1e-20 keeps the gradient finite where all features of a position are zero.
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-20).sqrt()


def _rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the published names to those of the plain layers."""
    names = ("net.slice1.0", "net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13")
    renamed = {
        f"convs.{i}.{part}": weights[f"{name}.{part}"] for i, name in enumerate(names) for part in ("weight", "bias")
    }
    return renamed | {part: weights[f"scaling_layer.{part}"] for part in ("shift", "scale")}
