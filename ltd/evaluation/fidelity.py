"""How alike two videos are: PSNR and SSIM on 8-bit pixels, and any paired distance such as LPIPS, summed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PEAK = 255.0


class Psnr:
    """Peak signal-to-noise ratio in dB of 8-bit pixels: the mean over clips, and one of the error over all pixels."""

    #: Of ``clip_mean``, in rows of results.
    preprocessing = "8-bit RGB; mean over clips"

    def __init__(self) -> None:
        self.num_clips = 0
        self._clip_sum = 0.0
        self._squared_error = 0.0
        self._num_values = 0

    def update(self, clips: Tensor, references: Tensor) -> None:
        """Count clips.

        Args:
            clips: ``(b, ...)`` pixels in 0..255, any type.
            references: The same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        _check_pair(clips, references)
        errors = (clips.double() - references.double()).square().flatten(1)  # (b, values)
        self.num_clips += len(errors)
        self._clip_sum += sum(_decibel(float(mse)) for mse in errors.mean(dim=1))
        self._squared_error += float(errors.sum())
        self._num_values += errors.numel()

    @property
    def clip_mean(self) -> float:
        """Mean over clips of each clip's PSNR, in dB; infinite when a clip is equal to its reference."""
        return self._clip_sum / _needed(self.num_clips)

    @property
    def overall(self) -> float:
        """PSNR of the mean squared error over all pixels of all clips, in dB; at most ``clip_mean``."""
        return _decibel(self._squared_error / _needed(self._num_values))

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: plain numbers."""
        return {
            "num_clips": self.num_clips,
            "clip_sum": self._clip_sum,
            "squared_error": self._squared_error,
            "num_values": self._num_values,
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has counted."""
        self.num_clips += state["num_clips"]
        self._clip_sum += state["clip_sum"]
        self._squared_error += state["squared_error"]
        self._num_values += state["num_values"]


class _ClipMean:
    """Mean over clips of one number of each."""

    def __init__(self) -> None:
        self.num_clips = 0
        self._clip_sum = 0.0

    @property
    def clip_mean(self) -> float:
        """Mean over clips."""
        return self._clip_sum / _needed(self.num_clips)

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: plain numbers."""
        return {"num_clips": self.num_clips, "clip_sum": self._clip_sum}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has counted."""
        self.num_clips += state["num_clips"]
        self._clip_sum += state["clip_sum"]


class Ssim(_ClipMean):
    """Structural similarity: the mean over clips of the mean over frames and channels, 1 for equal clips."""

    #: In rows of results.
    preprocessing = "8-bit RGB; 11x11 Gaussian window of width 1.5, mean over channels, frames and clips"

    def update(self, clips: Tensor, references: Tensor) -> None:
        """Count clips.

        Args:
            clips: ``(b, t, h, w, c)`` pixels in 0..255, any type, frames of 11 x 11 or more.
            references: The same shape.

        Raises:
            ValueError: If the shapes differ or do not fit.
        """
        _check_pair(clips, references)
        if clips.dim() != 5:
            raise ValueError(f"SSIM needs clips (b, t, h, w, c), got {tuple(clips.shape)}")
        for clip, reference in zip(clips, references, strict=True):  # one by one: float64 moments are large
            self._clip_sum += float(ssim(clip.permute(0, 3, 1, 2), reference.permute(0, 3, 1, 2)).mean())
            self.num_clips += 1


class PairedDistance(_ClipMean):
    """Mean over clips of a distance between a clip and its reference, as LPIPS; 0 for equal clips.

    Args:
        distance: Maps two ``(b, 3, t, h, w)`` in [-1, 1] to ``(b,)``.
    """

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._distance = distance

    @torch.no_grad()
    def update(self, clips: Tensor, references: Tensor) -> None:
        """Count clips.

        Args:
            clips: ``(b, t, h, w, 3)`` pixels in 0..255, any type.
            references: The same shape.

        Raises:
            ValueError: If the shapes differ or do not fit, or a distance is not finite.
        """
        _check_pair(clips, references)
        if clips.dim() != 5:
            raise ValueError(f"a paired distance needs clips (b, t, h, w, c), got {tuple(clips.shape)}")
        x, y = (pixels.float().permute(0, 4, 1, 2, 3) / 127.5 - 1 for pixels in (clips, references))
        distances = self._distance(x, y).double()
        bad = (~torch.isfinite(distances)).nonzero().flatten().tolist()
        if bad:
            named = ", ".join(str(self.num_clips + row) for row in bad)
            raise ValueError(f"distances of {len(bad)} of {len(clips)} clips are NaN or infinite, of clips {named}")
        self._clip_sum += float(distances.sum())
        self.num_clips += len(clips)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Compute structural similarity with the paper's 11 x 11 Gaussian window of width 1.5.

    Windows that leave the image are not counted, variances are those of the population.

    Reference: Wang et al. (2004), doi 10.1109/TIP.2003.819861, Eq. 13 with K1 = 0.01, K2 = 0.03.

    Args:
        images: ``(n, c, h, w)`` pixels in 0..255.
        references: The same shape.

    Returns:
        ``(n,)`` float64, the mean over channels and windows.

    Raises:
        ValueError: If the images are smaller than the window.
    """
    if min(images.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of 11 x 11 or more, got {images.shape[2]} x {images.shape[3]}")
    x, y = images.double(), references.double()
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    window = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    window = window / window.sum()

    def blur(image: Tensor) -> Tensor:
        flat = image.flatten(0, 1)[:, None]  # (n * c, 1, h, w)
        flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return flat.unflatten(0, image.shape[:2])[:, :, 0]

    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x * mean_x
    var_y = blur(y * y) - mean_y * mean_y
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _decibel(mse: float) -> float:
    return math.inf if mse == 0 else 10 * math.log10(_PEAK**2 / mse)


def _needed(count: int) -> int:
    if count == 0:
        raise ValueError("nothing was counted yet: update or merge first")
    return count


def _check_pair(clips: Tensor, references: Tensor) -> None:
    if clips.shape != references.shape:
        raise ValueError(f"clips and references differ in shape: {tuple(clips.shape)} and {tuple(references.shape)}")
    if len(clips) == 0:
        raise ValueError("no clips given")
