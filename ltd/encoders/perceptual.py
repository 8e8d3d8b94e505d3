"""Perceptual distance between clips: LPIPS with the shift-tolerant AlexNet that a package ships, in plain layers.

It is not the canonical LPIPS (whose backbone cannot be had in a package), so its numbers compare only with themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.encoders.package_files import load_frozen, package_directory, read_weights

_CHANNELS = (64, 192, 384, 256, 256)


class PerceptualDistance(nn.Module):
    """LPIPS over frames: weighted squared differences of unit-length AlexNet features.

    Gradients reach the inputs; the weights are frozen. Needs frames of at least 32 x 32 pixels.

    Reference: Zhang et al. (2018), 1801.03924, Eq. 1; Ghildyal and Liu (2022), 2207.13686 for the network.

    Args:
        max_frames: Frames of each clip that are compared, evenly spaced with the first and the last; None for all.
    """

    name = "st-lpips alexnet (shift-tolerant)"
    preprocessing = "frames in [-1, 1] at their own size"

    def __init__(self, *, max_frames: int | None = None) -> None:
        super().__init__()
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"max_frames: got {max_frames}, needed 1 or more, or None")
        self.max_frames = max_frames
        folder = package_directory(
            "stlpips_pytorch", field="perceptual", pip_name="stlpips-pytorch==0.0.2", extra="eval"
        )
        weights = read_weights(folder / "weights/vST0.0/alex_shift_tolerant.pth", field="perceptual")
        with torch.device("meta"):
            network = _ShiftTolerantAlexNet()
        self.network = load_frozen(network, _rename(weights))
        heads = [weights[f"lin{i}.model.1.weight"].flatten() for i in range(len(_CHANNELS))]
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


def build_perceptual(*, max_frames: int | None = None, device: torch.device | str = "cpu") -> PerceptualDistance:
    """Build the perceptual distance.

    Args:
        max_frames: Frames of each clip that are compared; None for all.
        device: Where the network runs.

    Returns:
        The frozen network.
    """
    return PerceptualDistance(max_frames=max_frames).to(device)


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
