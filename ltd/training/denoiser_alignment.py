"""Alignment of a denoiser with a frozen vision network in training (REPA): features of clean pixels, on the token grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ltd.autoencoders.alignment import Teacher, features_per_latent, teacher_features
from ltd.config import ConfigError
from ltd.data import Batch
from ltd.data.latents import LatentCache
from ltd.denoisers.alignment import DenoiserAlignmentConfig, TokenProjector, alignment_loss
from ltd.encoders.vision import TeacherConfig, build_teacher
from ltd.inference.media import pixels_to_video
from ltd.shapes import Compression


@dataclass(frozen=True, kw_only=True)
class DenoiserAlignmentRun(DenoiserAlignmentConfig):
    """Alignment of a denoiser's tokens with a frozen vision network.

    Reference: Yu et al. (2024), arXiv 2410.06940 (REPA).
    """

    #: The network, which sees the clean pixels of every training sample.
    teacher: TeacherConfig


class Aligner:
    """Give the features that belong to the tokens of a batch, and compare both.

    Args:
        config: Block, weight and frames.
        teacher: The network, frozen and on its device.
        num_features: Channels of its maps.
        compression: Of the autoencoder.
        patch: Latent cells per token of the denoiser, along (t, h, w).
    """

    def __init__(
        self,
        config: DenoiserAlignmentConfig,
        teacher: Teacher,
        num_features: int,
        compression: Compression,
        patch: tuple[int, int, int],
    ) -> None:
        self.config, self.teacher, self.num_features = config, teacher, num_features
        self.compression, self.patch = compression, patch

    def projector(self, width: int) -> TokenProjector:
        """Build what maps a denoiser's tokens, ``width`` channels each, to features."""
        return TokenProjector(width, self.num_features, self.config)

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """Ask the network about the clean pixels.

        Args:
            batch: Media, on the network's device.

        Returns:
            ``(b, n, d)`` fp32, without gradient; in the order of the denoiser's tokens.

        """
        assert batch.pixels is not None  # ``build_aligner`` refused caches
        video = pixels_to_video(batch.pixels)
        latent_frames = self.compression.latent_frames(video.shape[2])
        size = latent_frames, video.shape[3] // self.compression.h, video.shape[4] // self.compression.w
        found = teacher_features(self.teacher, video, self.compression.t, self.config.frames)
        return features_per_token(found.float(), size, self.patch)

    def loss(self, projected: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """Compare projected tokens with features.

        Args:
            projected: ``(b, n, d)``, or ``(1, n, d)`` of a pack.
            tensors: ``features`` (b, n, d), or of a pack (n, d) with the ``shapes`` (b, 4) of its samples' latents.

        Returns:
            ``(b,)`` fp32, mean negative cosines.
        """
        if "shapes" not in tensors:
            return alignment_loss(projected, tensors["features"])
        lengths = [math.prod(self._grid(shape[1:])) for shape in tensors["shapes"].tolist()]
        return alignment_loss(projected, tensors["features"].unsqueeze(0), lengths)

    def _grid(self, size: Sequence[int]) -> list[int]:
        return [cells // unit for cells, unit in zip(size, self.patch, strict=True)]


def build_aligner(
    config: DenoiserAlignmentRun | None,
    caches: Sequence[LatentCache | None],
    compression: Compression,
    patch: tuple[int, int, int],
    device: torch.device | str,
) -> Aligner | None:
    """Load the network that tokens are aligned with.

    Args:
        config: The section ``alignment``.
        caches: Latent cache of each training data set; None for media.
        compression: Of the autoencoder.
        patch: Latent cells per token of the denoiser, along (t, h, w).
        device: Where the network runs.

    Returns:
        The aligner; None without a section, or at weight 0.

    Raises:
        ConfigError: If a data set is a latent cache, or the network does not load.
    """
    if config is None or not config.weight:
        return None
    for cache in caches:
        if cache is not None:
            raise ConfigError(
                f"alignment: got the latent cache {cache.directory} as data, which has no pixels for the teacher to "
                "look at; train on media shards, or set alignment to null"
            )
    try:
        teacher = build_teacher(config.teacher).to(device)
    except ConfigError as error:
        raise ConfigError(f"alignment.teacher.{error}") from None
    return Aligner(config, teacher, teacher.dim, compression, patch)


def features_per_token(features: Tensor, size: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Bring feature maps to a denoiser's tokens.

    In time features are averaged over the frames of each latent frame (``features_per_latent``), then over the latent
    frames of each token; in space they are interpolated to the grid of tokens.

    Args:
        features: ``(b, d, t', h', w')``, float; one map per frame or per latent frame.
        size: ``(t, h, w)`` of the latents.
        patch: Latent cells per token along (t, h, w).

    Returns:
        ``(b, n, d)``, tokens ordered (t, h, w), the last fastest.
    """
    frames, height, width = size[0], size[1] // patch[1], size[2] // patch[2]
    maps = features_per_latent(features, (frames, height, width))
    maps = maps.unflatten(2, (frames // patch[0], patch[0])).mean(3)
    return rearrange(maps, "b d t h w -> b (t h w) d")
