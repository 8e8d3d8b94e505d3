"""Whole clips through a causal autoencoder in chunks of time: memory stays flat, numbers and gradients stay the same.

With gradients on, each chunk runs under activation checkpointing: what the backward pass keeps is the clip, its latents
and the state at each border between chunks (longer chunks have fewer borders); the activations of one chunk at a time
are recomputed. The carried state is an input and an output of each chunk, so gradient flows back through it into the
chunks before. Without gradients nothing is kept.
Written against a protocol: any model that encodes and decodes chunks will do.

Reference: Chen et al. (2016), arXiv 1604.06174, Sec. 4 (recomputation), applied along time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ltd.autoencoders.latents import Posterior
from ltd.config import ConfigError
from ltd.nn.causal_conv import START, State
from ltd.shapes import Compression

T = TypeVar("T")


class ChunkedAutoencoder(Protocol):
    """A causal autoencoder that works chunk by chunk; state is nested tuples of tensors and None, ``START`` first."""

    compression: Compression
    latent_channels: int

    def spatial_halo(self, side: Literal["encode", "decode"]) -> tuple[int, int] | None:
        """Latent cells (height, width) that a cell depends on, or reaches; None where it may be the whole frame."""
        ...

    def encode_chunk(self, video: Tensor, state: State) -> tuple[Posterior, State]:
        """Encode ``1 + k * compression.t`` frames first and multiples of ``compression.t`` later."""
        ...

    def decode_chunk(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode any number of latent frames."""
        ...


def frames_to_chunks(
    num_frames: int, frames_per_chunk: int | Sequence[int], compression: Compression
) -> tuple[int, ...]:
    """Cut a clip into chunks: ``1 + k * compression.t`` frames first, multiples of ``compression.t`` afterwards.

    Args:
        num_frames: Frames of the clip, ``1 + k * compression.t``.
        frames_per_chunk: Most frames of a chunk, or the frames of each chunk.
        compression: Of the model.

    Returns:
        Frames of each chunk, in order; their sum is ``num_frames``.

    Raises:
        ConfigError: If a chunk is shorter than one latent frame, or the given chunks do not make up the clip.
        ValueError: If ``num_frames`` is off the rule.
    """
    factor = compression.t
    compression.latent_frames(num_frames)
    if isinstance(frames_per_chunk, int):
        if frames_per_chunk < factor:
            raise ConfigError(
                f"frames_per_chunk: got {frames_per_chunk}, needed at least {factor} (model.compression.t)"
            )
        first = min(num_frames, 1 + (frames_per_chunk - 1) // factor * factor)
        later = frames_per_chunk // factor * factor
        starts = range(first, num_frames, later)
        return (first, *(min(later, num_frames - start) for start in starts))
    chunks = tuple(frames_per_chunk)
    # A clip of 1 + k * t frames leaves the first chunk as many too, once the others are multiples.
    fits = min(chunks, default=0) > 0 and all(size % factor == 0 for size in chunks[1:])
    if not fits or sum(chunks) != num_frames:
        raise ConfigError(
            f"frames_per_chunk: got chunks {list(chunks)}, needed 1 + k * {factor} frames first, multiples of {factor} "
            f"(model.compression.t) later, {num_frames} in all"
        )
    return chunks


def stream_encode(
    model: ChunkedAutoencoder, video: Tensor, frames_per_chunk: int | Sequence[int]
) -> Iterator[Posterior]:
    """Encode a clip chunk by chunk; a chunk's activations are recomputed in the backward pass.

    Args:
        model: Causal autoencoder.
        video: ``(b, c, t, h, w)`` in [-1, 1], ``t = 1 + k * compression.t``.
        frames_per_chunk: Most frames of a chunk, or the frames of each chunk (see ``frames_to_chunks``).

    Returns:
        Iterator over the chunks' posteriors; joined along axis 2 they are the clip's.

    Raises:
        ConfigError: If the chunks do not fit the clip, before anything is encoded.
    """
    return _stream(
        model.encode_chunk, video, list(frames_to_chunks(video.shape[2], frames_per_chunk, model.compression))
    )


def stream_decode(
    model: ChunkedAutoencoder, latents: Tensor, frames_per_chunk: int | Sequence[int]
) -> Iterator[Tensor]:
    """Decode a clip chunk by chunk; a chunk's activations are recomputed in the backward pass.

    Args:
        model: Causal autoencoder.
        latents: ``(b, latent_channels, t, h, w)`` raw.
        frames_per_chunk: Most frames of decoded video in a chunk, or the frames of each chunk (see
            ``frames_to_chunks``): the same number cuts a clip and its latents at the same places.

    Returns:
        Iterator over the chunks' frames ``(b, c, t', h', w')``; joined along axis 2 they are the clip's.

    Raises:
        ConfigError: If the chunks do not fit the clip, before anything is decoded.
    """
    factor = model.compression.t
    frames = frames_to_chunks(model.compression.video_frames(latents.shape[2]), frames_per_chunk, model.compression)
    return _stream(model.decode_chunk, latents, [-(-size // factor) for size in frames])


def encode_checkpointed(model: ChunkedAutoencoder, video: Tensor, frames_per_chunk: int | Sequence[int]) -> Posterior:
    """Encode a whole clip with memory for one chunk's activations, in the forward and the backward pass.

    Args:
        model: Causal autoencoder.
        video: ``(b, c, t, h, w)`` in [-1, 1], ``t = 1 + k * compression.t``.
        frames_per_chunk: Most frames of a chunk, or the frames of each chunk (see ``frames_to_chunks``).

    Returns:
        Posterior over the latents of the clip; it and its gradients equal those of the whole clip at once.

    Raises:
        ConfigError: If the chunks do not fit the clip, before anything is encoded.
    """
    parts = list(stream_encode(model, video, frames_per_chunk))
    return Posterior(torch.cat([part.mean for part in parts], 2), torch.cat([part.logvar for part in parts], 2))


def decode_checkpointed(model: ChunkedAutoencoder, latents: Tensor, frames_per_chunk: int | Sequence[int]) -> Tensor:
    """Decode a whole clip with memory for one chunk's activations, in the forward and the backward pass.

    Args:
        model: Causal autoencoder.
        latents: ``(b, latent_channels, t, h, w)`` raw.
        frames_per_chunk: Most frames of decoded video in a chunk, or the frames of each chunk (see
            ``frames_to_chunks``).

    Returns:
        ``(b, c, 1 + (t - 1) * compression.t, h', w')``; it and its gradients equal those of the whole clip at once.

    Raises:
        ConfigError: If the chunks do not fit the clip, before anything is decoded.
    """
    return torch.cat(list(stream_decode(model, latents, frames_per_chunk)), 2)


def _stream(call: Callable[[Tensor, State], tuple[T, State]], x: Tensor, sizes: list[int]) -> Iterator[T]:
    states: list[State] = [START]
    for chunk in x.split(sizes, 2):
        if torch.is_grad_enabled():
            result, state = _recomputed(call, chunk, states.pop())
        else:
            result, state = call(chunk, states.pop())  # nobody else holds the state that is used up
        states.append(state)
        del state
        yield result
        del result


def _recomputed(call: Callable[[Tensor, State], tuple[T, State]], x: Tensor, state: State) -> tuple[T, State]:
    leaves, tree = tree_flatten(state)

    # The state goes in as plain tensors: those are what checkpointing saves, and frees, as it does any input.
    def body(x: Tensor, *leaves: Any) -> tuple[T, State]:
        return call(x, tree_unflatten(list(leaves), tree))

    # The project's models draw nothing from the global generators: there is no state of them to restore.
    result: tuple[T, State] = checkpoint(body, x, *leaves, use_reentrant=False, preserve_rng_state=False)
    return result
