"""One long decode by a sequence group: each member decodes a strip of rows, streamed in time.

Members trade the rows, pixels and sums that a strip depends on inside the network (``ltd.parallel.halo``), so the
result is that of one process at any depth, with attention over frames too, and each does its share of the work.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ltd.autoencoders.streaming import ChunkedAutoencoder, stream_decode
from ltd.parallel import Layout
from ltd.parallel.halo import gather_parts, share_first, strips

_HEIGHT = 3


@torch.no_grad()
def stream_strips(
    model: ChunkedAutoencoder,
    latents: Tensor,
    layout: Layout,
    *,
    frames_per_chunk: int = 16,
    everywhere: bool = False,
) -> Iterator[Tensor | None]:
    """Decode one clip by all members of the sequence group, chunk by chunk, without gradients.

    All members must call it and run through the iterator together, and leave the model alone until its end.

    Args:
        model: Causal autoencoder with row seams, the same on all members.
        latents: ``(b, latent_channels, t, h, w)`` raw; the first member's are decoded, of the others' only dtype and
            device are read.
        layout: This process's position in its sequence group.
        frames_per_chunk: Most frames of decoded video in a chunk.
        everywhere: Whether all members receive the frames; otherwise the first alone does.

    Yields:
        ``(b, c, t', h', w')`` frames of each chunk; None on members that receive nothing.

    Raises:
        ConfigError: If the model has no row seams, there are too few rows for the group, or a chunk is too short; on
            all members alike.
    """
    assert isinstance(model, nn.Module)
    latents = share_first(latents, layout)
    rows, unit = latents.shape[_HEIGHT], model.compression.h
    sizes = [rows * (m + 1) // layout.sequence - rows * m // layout.sequence for m in range(layout.sequence)]
    with strips(model, rows, layout) as own:
        for chunk in stream_decode(model, latents[..., own, :], frames_per_chunk):
            parts = gather_parts(chunk, [size * unit for size in sizes], layout, axis=_HEIGHT, everywhere=everywhere)
            yield None if parts is None else torch.cat(parts, _HEIGHT)


def decode_strips(
    model: ChunkedAutoencoder,
    latents: Tensor,
    layout: Layout,
    *,
    frames_per_chunk: int = 16,
    everywhere: bool = False,
) -> Tensor | None:
    """Decode one clip by all members of the sequence group, without gradients; all members must call it.

    Args:
        model: Causal autoencoder with row seams, the same on all members.
        latents: ``(b, latent_channels, t, h, w)`` raw; the first member's are decoded, of the others' only dtype and
            device are read.
        layout: This process's position in its sequence group.
        frames_per_chunk: Most frames of decoded video in a chunk.
        everywhere: Whether all members receive the video; otherwise the first alone does.

    Returns:
        ``(b, c, t', h', w')``, as one process decodes it; None on members that receive nothing.

    Raises:
        ConfigError: If the group cannot split the clip, or a chunk is too short; on all members alike.
    """
    chunks = stream_strips(model, latents, layout, frames_per_chunk=frames_per_chunk, everywhere=everywhere)
    received = [chunk for chunk in chunks if chunk is not None]
    return torch.cat(received, 2) if received else None
