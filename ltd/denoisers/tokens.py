"""Where the tokens of a sequence lie and what time each belongs to: pure functions around the denoiser's blocks.

A sample's tokens are its prefix, text (of a joint sequence) and registers, and then its patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd.denoisers.conditioning import Frames
from ltd.nn.packing import Repeats
from ltd.nn.patch import patchify


@dataclass(frozen=True)
class Text:
    """Text tokens of the model's width."""

    tokens: Tensor | None = None
    """``(b, m, d)``; of a pack all samples' real tokens one behind another, b = 1; None = none."""
    mask: Tensor | None = None
    """Bool ``(b, m)``, True = read; of a pack ``(samples, 1)``: which have text (``pack_text``); None = all."""
    counts: tuple[int, ...] | None = None
    """Tokens of each sample of a pack; None when a row is a sample."""
    repeats: Repeats | None = None
    """How many tokens of padding the last one stands for; None = it is one."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch of rows, or of one pack."""

    x: Tensor
    """``(b, n, d)``."""
    positions: Tensor
    """``(b or 1, n, 3)``: (t, h, w) of every token."""
    places: Tensor | None = None
    """What is embedded of the positions, of the same shape; None = the positions."""
    levels: Tensor | None = None
    """Which of its row's times a token has, ``(b, n)``, long; of a pack, which of all samples' times one behind
    another. None = the one."""
    num_levels: int = 1
    """Times of a sample."""
    key_mask: Tensor | None = None
    """Bool ``(b, n)``: tokens that are read; None = all."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each sample of a pack; None when a row is a sample."""
    grid: tuple[int, int, int] | None = None
    """Tokens along (t, h, w) that the positions are of; None in a pack."""
    prefix: tuple[int, ...] = (0,)
    """Text tokens and registers before the patches of a row, or of each sample of a pack."""
    streams: tuple[int, ...] | None = None
    """Text tokens, other tokens, and so on sample by sample; None without text in the sequence."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply a function to everything that is held per token."""
        levels = None if self.levels is None else function(self.levels)
        mask = None if self.key_mask is None else function(self.key_mask)
        places = None if self.places is None else function(self.places)
        x, positions = function(self.x), function(self.positions)
        return replace(self, x=x, positions=positions, places=places, levels=levels, key_mask=mask)


def fold_padding(tokens: Tensor, mask: Tensor, length: int, *, packed: bool) -> Text:
    """Bring texts to a length with zeros that are read: alike to cross-attention, so that one stands for many.

    Args:
        tokens: ``(b, m, d)``, m at most ``length``.
        mask: Bool ``(b, m)``, True = a real token.
        length: Tokens that are read of every text.
        packed: Whether the texts are those of a pack; then the mask is waited for, once.

    Returns:
        What there is to embed, the last token of every text a zero; of whole tensors ``(b, min(m + 1, length), d)``.
    """
    width = tokens.shape[1]
    tokens = torch.where(mask[..., None], tokens, 0)
    if not packed:
        if width == length:
            return Text(tokens)
        return Text(F.pad(tokens, (0, 0, 0, 1)), repeats=Repeats.of((length - width,), tokens))
    kept = F.pad(mask, (0, 1), value=True)
    counts: list[int] = mask.sum(1).tolist()
    repeats = Repeats.of(tuple(length - count for count in counts), tokens)
    tokens = F.pad(tokens, (0, 0, 0, 1))[kept].unsqueeze(0)
    return Text(tokens, counts=tuple(count + 1 for count in counts), repeats=repeats)


def scaled_positions(grids: Sequence[tuple[int, int, int]], base: int, positions: Tensor) -> Tensor:
    """Scale the positions of samples one behind another ``(1, n, 3)`` so that each spans ``base`` rows and columns."""
    parts = positions.split([t * h * w for t, h, w in grids], 1)
    scales = [positions.new_tensor([1.0, base / h, base / w]) for _, h, w in grids]
    return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)], 1)


def frame_input(x_t: Tensor, frames: Frames | None, mode: str, mask_channels: int) -> Tensor:
    """Bring known latents into the input.

    Args:
        x_t: Noisy latents ``(b, c, t, h, w)``.
        frames: Known latents; None = none are.
        mode: ``none``, ``times`` or ``channels`` (``DitConfig.frames``).
        mask_channels: Channels of the mask, for ``channels``.

    Returns:
        ``times``: known cells in the place of noisy ones. ``channels``: ``(b, c + mask_channels + c, t, h, w)``, the
        mask before the known latents, both zero where nothing is known; the latents are passed on as they are, so that
        what stands for "unknown" is the caller's.
    """
    if mode == "none":
        return x_t
    if mode == "times":
        return x_t if frames is None else torch.where(frames.mask > 0, frames.latents.to(x_t), x_t)
    if frames is None:
        return torch.cat((x_t, x_t.new_zeros(len(x_t), mask_channels + x_t.shape[1], *x_t.shape[2:])), 1)
    return torch.cat((x_t, frames.mask.to(x_t), frames.latents.to(x_t)), 1)


def levels_of(
    t: Tensor, frames: Frames | None, patch: tuple[int, int, int], grid: tuple[int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """List the times of a batch and which of them every token has.

    Args:
        t: ``(b,)``, or a time for every latent frame ``(b, t)``.
        frames: Known latents whose tokens have time 0; None = all have ``t``.
        patch: Latent cells per token along (t, h, w).
        grid: Tokens along (t, h, w).

    Returns:
        Times ``(b, k)``; number of its time for every token ``(b, n)``, long, or None when there is only one. A token
        has the time of its first frame, and is known when all of its cells are.
    """
    times = t.reshape(len(t), -1)
    if times.shape[1] == 1 and frames is None:
        return times, None
    per_frame = torch.zeros(grid[0], dtype=torch.long, device=t.device)
    if times.shape[1] > 1:
        per_frame = torch.arange(grid[0], device=t.device) * patch[0]
    levels = per_frame.repeat_interleave(grid[1] * grid[2]).expand(len(t), -1)
    if frames is not None:
        known = patchify((frames.mask[:, :1] > 0).float(), patch).amin(-1) > 0  # b n
        levels = torch.where(known, times.shape[1], levels)
        times = torch.cat((times, times.new_zeros(len(t), 1)), 1)
    return times, levels


def levels_of_pack(
    t: Tensor, frames: Sequence[Frames] | None, patch: tuple[int, int, int], grids: Sequence[tuple[int, int, int]]
) -> tuple[Tensor, Tensor | None]:
    """List the times of samples of several sizes and which of them every token of their sequence has.

    Args:
        t: ``(b,)``.
        frames: Known latents of each sample, whose tokens have time 0; None = all have ``t``.
        patch: Latent cells per token along (t, h, w).
        grids: Tokens of each sample along (t, h, w).

    Returns:
        Times ``(b, k)``; for every token ``(1, n)``, long, the number of its time among all samples' ``b k``, or None
        when a sample has only one.
    """
    if frames is None:
        return t.unsqueeze(1), None
    parts = [levels_of(*each) for each in zip(t.split(1), frames, [patch] * len(grids), grids, strict=True)]
    times = torch.cat([part for part, _ in parts])
    numbered = [levels + i * times.shape[1] for i, (_, levels) in enumerate(parts) if levels is not None]
    return times, torch.cat(numbered, 1)


def join_prefix(tokens: Tokens, registers: Tensor | None, text: Text) -> Tokens:
    """Put text and registers before the patches of every sample.

    Args:
        tokens: Patches.
        registers: ``(r, d)``; None = none.
        text: Text that joins the sequence.

    Returns:
        All tokens; those of the prefix lie at position 0 and have a sample's first time.
    """
    if tokens.lengths is not None:
        return _join_pack(tokens, tokens.lengths, registers, text)
    rows, length = tokens.x.shape[:2]
    num = 0 if registers is None else len(registers)
    parts = [] if text.tokens is None else [text.tokens]
    parts += [] if registers is None else [registers.to(tokens.x.dtype).expand(rows, -1, -1)]
    size = sum(part.shape[1] for part in parts)
    levels, mask = tokens.levels, text.mask
    return replace(
        tokens,
        x=torch.cat((*parts, tokens.x), 1),
        positions=torch.cat((tokens.positions.new_zeros(len(tokens.positions), size, 3), tokens.positions), 1),
        levels=None if levels is None else torch.cat((levels.new_zeros(rows, size), levels), 1),
        key_mask=None if mask is None else torch.cat((mask, mask.new_ones(rows, num + length)), 1),
        places=None,
        prefix=(size,),
        streams=None if text.tokens is None else (text.tokens.shape[1], num + length),
    )


def _join_pack(tokens: Tokens, lengths: tuple[int, ...], registers: Tensor | None, text: Text) -> Tokens:
    num = 0 if registers is None else len(registers)
    counts = text.counts or (0,) * len(lengths)
    texts = [] if text.tokens is None else list(text.tokens.split(list(counts), 1))
    pieces, positions, levels = [], [], []
    times = None if tokens.levels is None else tokens.levels.split(list(lengths), 1)
    for i, (own, places) in enumerate(
        zip(tokens.x.split(list(lengths), 1), tokens.positions.split(list(lengths), 1), strict=True)
    ):
        pieces += [texts[i]] if texts else []
        pieces += [] if registers is None else [registers.to(own.dtype).unsqueeze(0)]
        pieces.append(own)
        positions += [places.new_zeros(1, counts[i] + num, 3), places]
        levels += [] if times is None else [times[i].new_full((1, counts[i] + num), i * tokens.num_levels), times[i]]
    return replace(
        tokens,
        x=torch.cat(pieces, 1),
        positions=torch.cat(positions, 1),
        levels=torch.cat(levels, 1) if levels else None,
        lengths=tuple(m + num + n for m, n in zip(counts, lengths, strict=True)),
        places=None,
        prefix=tuple(m + num for m in counts),
        streams=tuple(size for m, n in zip(counts, lengths, strict=True) for size in (m, num + n)) if texts else None,
    )


def strip_prefix(x: Tensor, tokens: Tokens) -> Tensor:
    """Take the prefix of every sample off ``(b, n, ...)``."""
    if not any(tokens.prefix):
        return x
    if tokens.lengths is None:
        return x[:, tokens.prefix[0] :]
    parts = x.split(list(tokens.lengths), 1)
    return torch.cat([part[:, size:] for part, size in zip(parts, tokens.prefix, strict=True)], 1)


def kept_places(kept: Tensor, tokens: Tokens) -> Tensor:
    """List the places ``(b, r + k)`` of the patches that are kept ``(b, k)``, and of the prefix, in the sequence."""
    size = tokens.prefix[0]
    before = torch.arange(size, device=kept.device).expand(len(kept), -1)
    return torch.cat((before, kept + size), 1)


def take_tokens(x: Tensor, places: Tensor) -> Tensor:
    """Take the tokens at ``places (b, k)`` of ``(b or 1, n, ...)``."""
    wide = x.expand(len(places), *x.shape[1:])
    return torch.take_along_dim(wide, places.reshape(*places.shape, *[1] * (x.ndim - 2)), 1)


def put_back(x: Tensor, places: Tensor, num_tokens: int) -> Tensor:
    """Put tokens ``(b, k, d)`` at their places among ``num_tokens``; zeros elsewhere."""
    target = places.unsqueeze(-1).expand_as(x)
    return x.new_zeros(len(x), num_tokens, x.shape[-1]).scatter(1, target, x)
