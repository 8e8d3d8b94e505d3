"""Alignment of a denoiser with a frozen vision network in training (REPA): features of clean pixels, token by token."""

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
from ltd.data.latents import LatentCache, check_cache
from ltd.denoisers.alignment import DenoiserAlignmentConfig, TokenProjector, alignment_loss
from ltd.encoders.vision import TeacherConfig, build_teacher
from ltd.inference.cache import features_identity
from ltd.inference.media import pixels_to_video
from ltd.shapes import Compression


@dataclass(frozen=True, kw_only=True)
class DenoiserAlignmentRun(DenoiserAlignmentConfig):
    """Alignment of a denoiser's tokens with a frozen vision network.

    Reference: Yu et al. (2024), arXiv 2410.06940 (REPA).
    """

    #: The network, which sees the clean pixels of every training sample, or saw them when a latent cache was made.
    teacher: TeacherConfig


class Aligner:
    """Give the features that belong to the tokens of a batch, and compare both.

    Args:
        config: Block, weight and frames.
        teacher: The network, frozen and on its device; None where batches bring its features.
        num_features: Channels of its maps.
        compression: Of the autoencoder.
        patch: Latent cells per token of the denoiser, along (t, h, w).
    """

    def __init__(
        self,
        config: DenoiserAlignmentConfig,
        teacher: Teacher | None,
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
        """Ask the network about the clean pixels, or take what a cache has of it.

        Args:
            batch: Media or cached latents with features, on the network's device.

        Returns:
            ``(b, n, d)`` fp32, without gradient; in the order of the denoiser's tokens.

        """
        if self.teacher is None:
            assert batch.mean is not None and batch.features is not None  # ``build_aligner`` asked for them
            _, _, t, h, w = batch.mean.shape
            return features_per_token(batch.features.float(), (t, h, w), self.patch)
        assert batch.pixels is not None
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
    *,
    read_features: bool,
) -> Aligner | None:
    """Load the network that tokens are aligned with.

    Args:
        config: The section ``alignment``.
        caches: Latent cache of each training data set; None for media.
        compression: Of the autoencoder.
        patch: Latent cells per token of the denoiser, along (t, h, w).
        device: Where the network runs.
        read_features: Whether batches of caches bring features: ``data.read_features``.

    Returns:
        The aligner; None without a section, or at weight 0. On caches it has no network: they hold its features.

    Raises:
        ConfigError: If a cache has no features, or those of another network, or the network does not load.
    """
    if config is None or not config.weight:
        return None
    cached = [cache for cache in caches if cache is not None]
    if cached:
        num_features = _cached_features(config, cached)
        if not read_features:
            raise ConfigError("data.read_features: got false, but alignment on a latent cache needs it; set it to true")
        return Aligner(config, None, num_features, compression, patch)
    try:
        teacher = build_teacher(config.teacher).to(device)
    except ConfigError as error:
        raise ConfigError(f"alignment.teacher.{error}") from None
    return Aligner(config, teacher, teacher.dim, compression, patch)


def _cached_features(config: DenoiserAlignmentRun, caches: Sequence[LatentCache]) -> int:
    """Refuse caches whose features are not those of the section; give the channels of a feature."""
    try:
        wanted = features_identity(config.teacher, config.frames)
    except ConfigError as error:
        raise ConfigError(f"alignment.teacher.{error}") from None
    channels = 0
    for cache in caches:
        if cache.num_features is None:
            raise ConfigError(
                f"alignment: got the latent cache {cache.directory} as data, which has no pixels for the teacher to "
                "look at and none of its features; make it again in another directory with the same teacher "
                "(tools/cache_latents.py), train on media shards, or set alignment to null"
            )
        check_cache(cache.manifest, features=wanted)
        channels = cache.num_features
    return channels


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
