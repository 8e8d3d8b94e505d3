"""TransNetV2 in plain layers: a shot detector, whose trunk is the video feature network of the Frechet distances.

The network was trained to find cuts. Its features describe a clip's layout and how alike its frames are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WINDOW = 101  # frames a frame is compared with, itself in the middle
_DILATIONS = (1, 2, 4, 8)


class TransNetV2Trunk(nn.Module):
    """3D convolutions with similarity and colour branches; names are those of the published state dict.

    Reference: Soucek and Lokoc (2020), 2008.04838, Fig. 1.
    """

    dim = 1024

    def __init__(self) -> None:
        super().__init__()
        self.SDDCNN = nn.ModuleList([_Stage(3, 16), _Stage(64, 32), _Stage(128, 64)])
        self.frame_sim_layer = nn.ModuleDict({"projection": nn.Linear(448, 128), "fc": nn.Linear(_WINDOW, 128)})
        self.color_hist_layer = nn.ModuleDict({"fc": nn.Linear(_WINDOW, 128)})
        self.fc1 = nn.Linear(256 * 3 * 6 + 128 + 128, self.dim)

    def forward(self, frames: Tensor) -> Tensor:
        """Compute one vector per frame.

        Args:
            frames: ``(b, t, 27, 48, 3)`` uint8.

        Returns:
            ``(b, t, 1024)``, not negative: what the cut classifiers read.
        """
        x = frames.permute(0, 4, 1, 2, 3).float() / 255  # (b, 3, t, 27, 48)
        means = []
        for stage in self.SDDCNN:
            x = stage(x)
            means.append(x.mean(dim=(3, 4)))  # (b, c, t)
        grid = x.permute(0, 2, 3, 4, 1).flatten(2)  # (b, t, 3 * 6 * 256)
        pooled = torch.cat(means, dim=1).transpose(1, 2)  # (b, t, 448)
        similar = self._compare(self.frame_sim_layer["projection"](pooled), self.frame_sim_layer["fc"])
        colours = self._compare(_colour_histograms(frames), self.color_hist_layer["fc"])
        return F.relu(self.fc1(torch.cat((colours, similar, grid), dim=2)))

    @staticmethod
    def _compare(vectors: Tensor, layer: nn.Module) -> Tensor:
        """Compare each frame's vector ``(b, t, d)`` with its neighbours' -> ``(b, t, 128)``."""
        unit = F.normalize(vectors, dim=2)
        similarity = F.pad(unit @ unit.transpose(1, 2), (_WINDOW // 2, _WINDOW // 2))  # (b, t, t + 100)
        steps = torch.arange(unit.shape[1], device=unit.device)[:, None]
        columns = steps + torch.arange(_WINDOW, device=unit.device)  # (t, 101)
        out: Tensor = F.relu(layer(similarity.gather(2, columns.expand(len(unit), -1, -1))))
        return out


class TransNetV2(TransNetV2Trunk):
    """The trunk with its classifiers of frames before a cut.

    Reference: Soucek and Lokoc (2020), 2008.04838, Fig. 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cls_layer1 = nn.Linear(self.dim, 1)  # the last frame before a cut, or the middle of a transition
        self.cls_layer2 = nn.Linear(self.dim, 1)  # all frames of a transition; only trained beside the other

    def forward(self, frames: Tensor) -> Tensor:
        """Compute how probable a cut is after each frame.

        Args:
            frames: ``(b, t, 27, 48, 3)`` uint8.

        Returns:
            ``(b, t)`` in 0 to 1.
        """
        logits: Tensor = self.cls_layer1(super().forward(frames))  # (b, t, 1)
        return logits.squeeze(2).sigmoid()


class _Stage(nn.Module):
    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([_Dilated(channels, filters), _Dilated(4 * filters, filters)])

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.DDCNN[0](x))
        return F.avg_pool3d(F.relu(self.DDCNN[1](first)) + first, kernel_size=(1, 2, 2))


class _Dilated(nn.Module):
    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        for dilation in _DILATIONS:
            space = nn.Conv3d(channels, 2 * filters, (1, 3, 3), padding=(0, 1, 1), bias=False)
            time = nn.Conv3d(
                2 * filters, filters, (3, 1, 1), dilation=(dilation, 1, 1), padding=(dilation, 0, 0), bias=False
            )
            layers = nn.Sequential(space, time)
            self.add_module(f"Conv3D_{dilation}", nn.ModuleDict({"layers": layers}))
        self.bn = nn.BatchNorm3d(4 * filters, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.get_submodule(f"Conv3D_{dilation}.layers")(x) for dilation in _DILATIONS]
        normed: Tensor = self.bn(torch.cat(branches, dim=1))
        return normed


def _colour_histograms(frames: Tensor) -> Tensor:
    """Count 8 x 8 x 8 colours per frame: uint8 ``(b, t, h, w, 3)`` -> float ``(b, t, 512)``."""
    bins = frames.long() >> 5
    index = ((bins[..., 0] << 6) + (bins[..., 1] << 3) + bins[..., 2]).flatten(2)  # (b, t, h * w)
    counts = torch.zeros(*index.shape[:2], 512, device=frames.device)
    return counts.scatter_add_(2, index, torch.ones_like(index, dtype=counts.dtype))
