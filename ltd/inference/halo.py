"""One long decode by a sequence group: each member decodes a strip of rows, streamed in time.

A strip is decoded with the latent rows around it that its pixels depend on (``spatial_halo``); what lies beyond its own
rows is thrown away. Members exchange nothing but the latents before and the frames after each chunk, and the result is
that of one process. A model whose cells see the whole frame has no such rows: its strips can only be blended.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ltd.autoencoders.streaming import ChunkedAutoencoder, stream_decode
from ltd.config import ConfigError
from ltd.inference.tiling import Piece, known_halo, make_pieces, spatial_halo
from ltd.parallel import Layout
from ltd.parallel.halo import gather_parts, share_first

__all__ = ["decode_strips", "plan_strips", "spatial_halo", "stream_strips"]

_HEIGHT = 3


def plan_strips(model: ChunkedAutoencoder, height: int, members: int, *, blend: int = 0) -> list[Piece]:
    """Cut the rows of a frame into one strip per member, as even as whole rows allow.

    Args:
        model: Causal autoencoder.
        height: Latent rows of the frame.
        members: Processes of the sequence group.
        blend: For a model whose halo is unknown: latent rows that a strip reaches into its neighbours, over which the
            two are blended linearly; the result is then near that of one process, not equal to it. 0 refuses the model.

    Returns:
        Strips from top to bottom.

    Raises:
        ConfigError: If there are fewer rows than members, or the model's halo is unknown and ``blend`` is 0.
    """
    if height < members:
        raise ConfigError(f"parallel.sequence: got {members}, needed at most {height}, one latent row per member")
    if blend < 0:
        raise ConfigError(f"blend: latent rows, got {blend}, needed 0 or more")
    halo = known_halo(model)
    if halo is None and members > 1 and not blend:
        raise ConfigError(
            f"parallel.sequence: got {members}, but {type(model).__name__} does not say how far a latent cell reaches "
            "(spatial_halo), so strips of a frame differ from the whole; needed 1, or blend of 1 or more latent rows"
        )
    unit = model.compression.h
    cuts = [height * member // members for member in range(members + 1)]
    reach = blend if halo is None else halo[0]
    spans = [(max(0, start - reach), min(height, stop + reach)) for start, stop in pairwise(cuts)]
    if halo is None:
        ramps = [(following[0] * unit, own[1] * unit) for own, following in pairwise(spans)]
    else:
        ramps = [(cut * unit, cut * unit) for cut in cuts[1:-1]]
    return make_pieces(spans, ramps, unit)


@torch.no_grad()
def stream_strips(
    model: ChunkedAutoencoder,
    latents: Tensor,
    layout: Layout,
    *,
    frames_per_chunk: int = 16,
    blend: int = 0,
    everywhere: bool = False,
) -> Iterator[Tensor | None]:
    """Decode one clip by all members of the sequence group, chunk by chunk, without gradients.

    All members must call it and run through the iterator together.

    Args:
        model: Causal autoencoder, the same on all members.
        latents: ``(b, latent_channels, t, h, w)`` raw; the first member's are decoded, of the others' only dtype and
            device are read.
        layout: This process's position in its sequence group.
        frames_per_chunk: Most frames of decoded video in a chunk.
        blend: Latent rows of blending for a model whose halo is unknown; 0 refuses it (see ``plan_strips``).
        everywhere: Whether all members receive the frames; otherwise the first alone does.

    Yields:
        ``(b, c, t', h', w')`` frames of each chunk; None on members that receive nothing.

    Raises:
        ConfigError: If the group cannot split the clip, or a chunk is too short; on all members alike.
    """
    latents = share_first(latents, layout)
    pieces = plan_strips(model, latents.shape[_HEIGHT], layout.sequence, blend=blend)
    own = pieces[layout.sequence_rank]
    sizes = [piece.seen.stop - piece.seen.start for piece in pieces]
    for chunk in stream_decode(model, latents[..., own.cells, :], frames_per_chunk):
        strip = chunk[..., own.inside, :] * own.weight[:, None].to(chunk)
        parts = gather_parts(strip, sizes, layout, axis=_HEIGHT, everywhere=everywhere)
        yield None if parts is None else _join(parts, pieces)


def decode_strips(
    model: ChunkedAutoencoder,
    latents: Tensor,
    layout: Layout,
    *,
    frames_per_chunk: int = 16,
    blend: int = 0,
    everywhere: bool = False,
) -> Tensor | None:
    """Decode one clip by all members of the sequence group, without gradients; all members must call it.

    Args:
        model: Causal autoencoder, the same on all members.
        latents: ``(b, latent_channels, t, h, w)`` raw; the first member's are decoded, of the others' only dtype and
            device are read.
        layout: This process's position in its sequence group.
        frames_per_chunk: Most frames of decoded video in a chunk.
        blend: Latent rows of blending for a model whose halo is unknown; 0 refuses it (see ``plan_strips``).
        everywhere: Whether all members receive the video; otherwise the first alone does.

    Returns:
        ``(b, c, t', h', w')``, as one process decodes it; None on members that receive nothing.

    Raises:
        ConfigError: If the group cannot split the clip, or a chunk is too short; on all members alike.
    """
    chunks = stream_strips(
        model, latents, layout, frames_per_chunk=frames_per_chunk, blend=blend, everywhere=everywhere
    )
    received = [chunk for chunk in chunks if chunk is not None]
    return torch.cat(received, 2) if received else None


def _join(parts: list[Tensor], pieces: list[Piece]) -> Tensor:
    """Add the strips up in their places."""
    shape = list(parts[0].shape)
    shape[_HEIGHT] = pieces[-1].seen.stop
    frames = parts[0].new_zeros(shape)
    for part, piece in zip(parts, pieces, strict=True):
        frames[..., piece.seen, :] += part
    return frames
