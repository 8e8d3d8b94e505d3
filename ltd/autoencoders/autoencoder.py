"""What all autoencoders of videos share: whole clips and streams, latent scale, checks. Knows no architecture."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ltd.autoencoders.bottleneck import build_bottleneck, quantize
from ltd.autoencoders.latents import LOGVAR_RANGE, LatentNorm, Posterior
from ltd.autoencoders.streaming import decode_checkpointed, encode_checkpointed
from ltd.nn.causal_conv import START, State, is_first
from ltd.shapes import Compression, VideoShape

#: Half of an autoencoder.
Side: TypeAlias = Literal["encode", "decode"]


class Autoencoder(nn.Module):
    """Autoencoder of clips, of which an image is one of a single frame; computes in its parameters' dtype.

    Args:
        config: Architecture; has ``compression``, ``in_channels``, ``latent_channels`` and ``bottleneck``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.compression: Compression = config.compression
        self.in_channels: int = config.in_channels
        self.latent_channels: int = config.latent_channels
        self.quantizer = build_bottleneck(config.bottleneck, config.latent_channels)
        self.latent_norm = LatentNorm(config.latent_channels)
        #: ``weights_hash`` of the autoencoder whose latents these are, where only the decoder was trained since.
        self.latents_of: str | None = None
        #: What only training needs: a projection of the latents; never exported.
        self.alignment: nn.Module | None = None

    @abstractmethod
    def _moments(self, video: Tensor, state: State) -> tuple[Tensor, Tensor | None, State]:
        """Encode one checked chunk up to the bottleneck: mean, log-variance (None before a quantiser), next state."""

    @abstractmethod
    def decode_chunk(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode one chunk of a stream.

        Args:
            latents: ``(b, latent_channels, t, h, w)`` raw, any ``t`` of at least 1.
            state: ``START`` first, then what the previous chunk returned; ``None`` for a whole clip.

        Returns:
            The chunk's frames (``1 + (t - 1) * compression.t`` first, then ``t * compression.t``), and the next state.

        Raises:
            ValueError: If the number of channels is not ``latent_channels``.
        """

    def spatial_halo(self, side: Side) -> tuple[int, int] | None:
        """Say how many latent cells beyond its own a cell depends on, or reaches, along height and width.

        Args:
            side: ``decode``: pixels of one cell see this many cells further. ``encode``: a cell sees the pixels of this
                many cells further.

        Returns:
            Cells (height, width); None where a cell may see the whole frame.
        """
        return None

    def encode_chunk(
        self, video: Tensor, state: State, *, draws: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Posterior, State]:
        """Encode one chunk of a stream.

        Args:
            video: ``(b, c, t, h, w)``: ``1 + k * compression.t`` frames first, then multiples of ``compression.t``.
            state: ``START`` first, then what the previous chunk returned; ``None`` for a whole clip.
            draws: Global sample numbers ``(b,)``; only where a codebook is to learn from the chunk.
            weight: Weight of each sample ``(b,)``, for the codebook.

        Returns:
            Posterior over the chunk's latents, and the state for the next chunk.

        Raises:
            ValueError: If a size does not fit the compression.
        """
        first, crop = is_first(state), getattr(self.config, "odd_sizes", "refuse") == "crop"
        self._check_video(video, first=first, crop=crop)
        mean, logvar, state = self._moments(self._enter(video), state)
        if self.quantizer is not None:
            return quantize(self.quantizer, mean, draws, weight), state
        assert logvar is not None
        return Posterior(widen(mean), widen(logvar).clamp(*LOGVAR_RANGE)), state

    def encode(self, video: Tensor) -> Posterior:
        """Encode a whole clip.

        Args:
            video: ``(b, c, t, h, w)`` in [-1, 1], ``t = 1 + k * compression.t``.

        Returns:
            Posterior over the raw latents ``(b, latent_channels, 1 + k, h / compression.h, w / compression.w)``.
        """
        return self.encode_chunk(video, None)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the raw latents of a whole clip.

        Args:
            latents: ``(b, latent_channels, t, h, w)``.

        Returns:
            ``(b, c, 1 + (t - 1) * compression.t, h * compression.h, w * compression.w)``.
        """
        return self.decode_chunk(latents, None)[0]

    def forward(
        self,
        video: Tensor,
        noise: Tensor | None,
        *,
        draws: Tensor | None = None,
        weight: Tensor | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
        frames_per_chunk: int | None = None,
        tap: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Posterior]:
        """Encode, sample and decode.

        Args:
            video: ``(b, c, t, h, w)`` in [-1, 1].
            noise: Standard normal noise of the latents' shape; ``None`` decodes the posterior's mean.
            draws: Global sample numbers ``(b,)``; only where a codebook is to learn from the clips.
            weight: Weight of each sample ``(b,)``, for the codebook.
            change: What is done to the latents before they are decoded; they may change in size.
            frames_per_chunk: Frames that are encoded and decoded at a time, each chunk again in the backward pass, so
                that memory does not grow with a clip's length; None for whole clips.
            tap: Is given the reconstruction as the decoder made it; what is returned is then a view of it, so that an
                engine's hooks on what the model returns lie behind it in the graph.

        Returns:
            Reconstruction, and the posterior.
        """
        if frames_per_chunk is None:
            posterior, _ = self.encode_chunk(video, None, draws=draws, weight=weight)
        else:
            posterior = encode_checkpointed(self, video, frames_per_chunk)
        latents = posterior.mean if noise is None else posterior.sample(noise)
        latents = latents if change is None else change(latents)
        if frames_per_chunk is None:
            reconstruction = self.decode(latents)
        else:
            reconstruction = decode_checkpointed(self, latents, frames_per_chunk)
        if tap is not None:
            tap(reconstruction)
            reconstruction = reconstruction.view_as(reconstruction)
        return reconstruction, posterior

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Posterior]:
        """Encode a clip that comes in chunks, yielding each chunk's posterior; equal to encoding it whole.

        Args:
            chunks: ``(b, c, t, h, w)`` each: ``1 + k * compression.t`` frames first, then multiples of it.

        Yields:
            Posterior over each chunk's latents.
        """
        states: list[State] = [START]
        for chunk in chunks:
            posterior, state = self.encode_chunk(chunk, states.pop())  # nobody else holds the state that is used up
            states.append(state)
            del state
            yield posterior

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode latents that come in chunks, yielding each chunk's frames; equal to decoding them whole.

        Args:
            chunks: ``(b, latent_channels, t, h, w)`` raw latents each, any number of latent frames.

        Yields:
            ``(b, c, t', h, w)`` frames of each chunk.
        """
        states: list[State] = [START]
        for chunk in chunks:
            video, state = self.decode_chunk(chunk, states.pop())  # nobody else holds the state that is used up
            states.append(state)
            del state
            yield video
            del video

    def normalize(self, latents: Tensor) -> Tensor:
        """Map raw latents to the unit scale a denoiser sees."""
        return self.latent_norm.normalize(latents)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Map unit-scale latents back to raw ones, ready for ``decode``."""
        return self.latent_norm.denormalize(latents)

    def set_latent_norm(self, mean: Tensor, std: Tensor) -> None:
        """Take the data set's latent statistics, ``(latent_channels,)`` each."""
        self.latent_norm.set(mean, std)

    def lay_out_kernels(self) -> None:
        """Put the kernels of convolutions into the activations' memory layout, so that no call has to."""
        for parameter in self.parameters():
            if parameter.ndim in (4, 5):
                layout = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=layout)

    def decay_groups(self) -> dict[str, list[str]]:
        """Sort parameter names into those that weight decay applies to ("decay") and biases and norms ("no_decay")."""
        groups: dict[str, list[str]] = {"decay": [], "no_decay": []}
        for name, parameter in self.named_parameters():
            groups["decay" if parameter.ndim > 1 else "no_decay"].append(name)
        return groups

    def _enter(self, x: Tensor) -> Tensor:
        weight = next(self.parameters())
        # Channels last throughout: the fast layout of half-precision convolutions on CPU and GPU.
        return x.to(device=weight.device, dtype=weight.dtype, memory_format=torch.channels_last_3d)

    def _check_video(self, video: Tensor, *, first: bool, crop: bool = False) -> None:
        if video.ndim != 5 or video.shape[1] != self.in_channels:
            raise ValueError(
                f"video: got shape {tuple(video.shape)}, needed (b, {self.in_channels}, t, h, w) (model.in_channels)"
            )
        _refuse_empty(video, "video")
        frames, height, width = video.shape[2:]
        if not first and frames % self.compression.t:
            raise ValueError(f"a later chunk needs a multiple of {self.compression.t} frames, got {frames}")
        if crop:
            least = self.compression.h
            if min(height, width) < least:
                raise ValueError(f"video: got {height} x {width} pixels, needed {least} or more (compression)")
            height, width = height // least * least, width // least * least
        self.compression.latent(VideoShape(frames + (not first), height, width))

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents: got shape {tuple(latents.shape)}, needed (b, {self.latent_channels}, t, h, w) "
                "(model.latent_channels)"
            )
        _refuse_empty(latents, "latents")


def _refuse_empty(x: Tensor, name: str) -> None:
    if not x.numel():
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, needed 1 or more of each: samples, frames and pixels")


def widen(x: Tensor) -> Tensor:
    """Bring half precision to fp32 and leave fp64 alone."""
    return x if x.dtype == torch.float64 else x.float()
