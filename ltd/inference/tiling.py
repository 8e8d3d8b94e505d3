"""Large frames through an autoencoder tile by tile, streamed in time inside each tile, and how visible the seams are.

An axis of the frame is cut into overlapping pieces. Where the model says how far a latent cell reaches
(``spatial_halo``) and the overlap is at least twice that, tiles are blended only where both are exact: the result is
the whole frame's. Otherwise they are blended linearly over all of the overlap, and ``SeamReport`` says what is left to
see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from ltd.autoencoders import Posterior, Side
from ltd.autoencoders.streaming import ChunkedAutoencoder, stream_decode, stream_encode
from ltd.config import ConfigError
from ltd.shapes import VideoShape

T = TypeVar("T")
#: Lines between pixels (or cells) ``p - 1`` and ``p``, of rows and of columns.
Boundaries = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class TilingConfig:
    """Size of the tiles that a frame is cut into, in pixels, on both sides of the autoencoder."""

    #: Height and width of a tile; multiples of the compression.
    tile: tuple[int, int] = (512, 512)
    #: Pixels that neighbouring tiles share, at least; a multiple of the compression. ``exact`` takes what the result of
    #: the whole frame needs, twice what a pixel depends on, and refuses models whose pixels depend on the whole frame.
    overlap: int | Literal["exact"] = 128
    #: Most frames that go through the model at once.
    frames_per_chunk: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.overlap, str) and self.overlap != "exact":
            raise ConfigError(f"overlap: got {self.overlap!r}, needed pixels, or exact")
        if self.overlap != "exact" and self.overlap < 0:
            raise ConfigError(f"overlap: got {self.overlap}, needed 0 or more")
        if self.overlap != "exact" and min(self.tile) <= self.overlap:
            raise ConfigError(f"tile: got {self.tile}, needed more than overlap ({self.overlap}) along both axes")
        if self.frames_per_chunk < 1:
            raise ConfigError(f"frames_per_chunk: got {self.frames_per_chunk}, needed 1 or more")


@dataclass(frozen=True)
class SeamReport:
    """How visible tile boundaries are; differences are None without a reference."""

    #: Mean absolute step across boundaries over that elsewhere; 1 where there is no seam.
    ratio: float
    #: The same of the worst boundary alone.
    worst: float
    max_difference: float | None = None
    mean_difference: float | None = None


@dataclass(frozen=True)
class Tiled(Generic[T]):
    """What tiling gave, and what is known of its seams."""

    output: T
    seams: SeamReport
    #: Whether the result is the whole frame's up to rounding: one tile, or an overlap of twice the model's halo.
    exact: bool
    num_tiles: int


@dataclass(frozen=True)
class Piece:
    """One part of an axis of latent cells, and where in the result it is seen."""

    #: Cells that the model is given.
    cells: slice
    #: Pixels (or cells) of the whole result to which it contributes.
    seen: slice
    #: The same within what the model gives for this piece.
    inside: slice
    #: Share of each of them; over all pieces the shares of a pixel sum to 1.
    weight: Tensor


def make_pieces(spans: Sequence[tuple[int, int]], ramps: Sequence[tuple[int, int]], unit: int) -> list[Piece]:
    """Cut an axis: each piece fades in where its predecessor fades out.

    Args:
        spans: First and last cell (exclusive) of each piece, both rising from piece to piece, from end to end.
        ramps: For each border between pieces, the pixels (or cells) of the result over which it is blended; both ends
            rise from border to border. An empty one is a cut.
        unit: Pixels of the result per cell.

    Returns:
        The pieces.
    """
    size = spans[-1][1] * unit
    places = torch.arange(size, dtype=torch.float64) + 0.5
    # The share of all pieces from this one on: what one piece holds is the difference of two such, so shares sum to 1.
    shares = [torch.ones_like(places)]
    shares += [((places - low) / max(high - low, 1e-9)).clamp(0, 1) for low, high in ramps]
    shares += [torch.zeros_like(places)]
    pieces = []
    lows, highs = [0, *(low for low, _ in ramps)], [*(high for _, high in ramps), size]
    for (start, stop), low, high, own, following in zip(spans, lows, highs, shares, shares[1:], strict=False):
        weight = (own - following)[low:high]
        pieces.append(
            Piece(slice(start, stop), slice(low, high), slice(low - start * unit, high - start * unit), weight)
        )
    return pieces


def check_tiles(model: ChunkedAutoencoder, config: TilingConfig, side: Side) -> None:
    """Say before any work whether tiles fit a model.

    Args:
        model: Causal autoencoder.
        config: Tiles.
        side: ``encode`` or ``decode``.

    Raises:
        ConfigError: If they do not.
    """
    _check(model, config, model.spatial_halo(side))


def tiled_decode(
    model: ChunkedAutoencoder, latents: Tensor, config: TilingConfig, *, whole: Tensor | None = None
) -> Tiled[Tensor]:
    """Decode tile by tile, without gradients; memory is the result's and that of one chunk of one tile.

    Args:
        model: Causal autoencoder.
        latents: ``(b, latent_channels, t, h, w)`` raw.
        config: Tiles.
        whole: The video decoded at once, if there is one to compare with.

    Returns:
        Video ``(b, c, t', h', w')``, with its seams.

    Raises:
        ConfigError: If the configuration does not fit the model, before anything is decoded.
    """
    units = (model.compression.h, model.compression.w)
    num_frames = model.compression.video_frames(latents.shape[2])
    plan = _plan(model, config, (latents.shape[3], latents.shape[4]), "decode", units)

    def run(tile: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return ((video,) for video in stream_decode(model, tile, config.frames_per_chunk))

    (video,) = _assemble(run, latents, plan, num_frames)
    return Tiled(video, seam_metric(video, whole, plan.boundaries, period=units), plan.exact, plan.num_tiles)


def tiled_encode(
    model: ChunkedAutoencoder, video: Tensor, config: TilingConfig, *, whole: Posterior | None = None
) -> Tiled[Posterior]:
    """Encode tile by tile, without gradients; means and log-variances are blended, seams are those of the mean.

    Args:
        model: Causal autoencoder.
        video: ``(b, c, t, h, w)`` in [-1, 1].
        config: Tiles.
        whole: The posterior encoded at once, if there is one to compare with.

    Returns:
        Posterior over the latents, with its seams.

    Raises:
        ConfigError: If the configuration does not fit the model, before anything is encoded.
        ValueError: If the video's size does not fit the compression.
    """
    block = model.compression
    latent = block.latent(VideoShape(*video.shape[2:]))
    plan = _plan(model, config, (latent.height, latent.width), "encode", (1, 1))

    def run(tile: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return ((part.mean, part.logvar) for part in stream_encode(model, tile, config.frames_per_chunk))

    mean, logvar = _assemble(run, video, plan, latent.num_frames, (block.h, block.w))
    seams = seam_metric(mean, None if whole is None else whole.mean, plan.boundaries)
    return Tiled(Posterior(mean, logvar), seams, plan.exact, plan.num_tiles)


@torch.no_grad()
def seam_metric(
    tiled: Tensor, whole: Tensor | None, boundaries: Boundaries, *, period: tuple[int, int] = (1, 1)
) -> SeamReport:
    """Compare the step across tile boundaries with the step between neighbouring pixels elsewhere.

    Args:
        tiled: ``(b, c, t, h, w)``.
        whole: The same computed at once, or None.
        boundaries: Rows and columns at which tiles meet: ``p`` is the line between ``p - 1`` and ``p``.
        period: Only lines at a multiple of this distance (rows, columns) from a boundary are compared with it: a
            decoder's own grid is no seam.

    Returns:
        Ratio of the steps over all boundaries and of the worst, and the differences from ``whole``.
    """
    across, elsewhere = 0.0, 0.0
    ratios = []
    for axis, lines, step in zip((-2, -1), boundaries, period, strict=True):
        steps = _steps(tiled, axis)
        free = [p for p in range(1, len(steps) + 1) if p not in lines]
        for line in lines:
            compared = [p - 1 for p in free if (p - line) % step == 0] or [p - 1 for p in free]
            own, usual = float(steps[line - 1]), float(steps[compared].mean()) if compared else 0.0
            ratios.append(_ratio(own, usual))
            across, elsewhere = across + own, elsewhere + usual
    worst = max(ratios, default=1.0)
    if whole is None:
        return SeamReport(_ratio(across, elsewhere), worst)
    largest, total = 0.0, 0.0
    for found, expected in zip(tiled.unbind(2), whole.unbind(2), strict=True):
        difference = (found.double() - expected.double()).abs()
        largest, total = max(largest, float(difference.max())), total + float(difference.mean())
    return SeamReport(_ratio(across, elsewhere), worst, largest, total / tiled.shape[2])


@dataclass(frozen=True)
class _Plan:
    rows: list[Piece]
    columns: list[Piece]
    boundaries: Boundaries
    exact: bool

    @property
    def num_tiles(self) -> int:
        return len(self.rows) * len(self.columns)


def _plan(
    model: ChunkedAutoencoder, config: TilingConfig, sizes: tuple[int, int], side: Side, units: tuple[int, int]
) -> _Plan:
    """Cut both axes of a frame of ``sizes`` latent cells; ``units`` pixels of the result come from a cell."""
    halo = model.spatial_halo(side)
    _check(model, config, halo)
    axes, lines, exact = [], [], True
    blocks = (model.compression.h, model.compression.w)
    for axis, (size, unit, block) in enumerate(zip(sizes, units, blocks, strict=True)):
        tile = config.tile[axis] // block
        overlap = 2 * halo[axis] if config.overlap == "exact" and halo else _pixels(config.overlap) // block
        enough = halo is not None and overlap >= 2 * halo[axis]
        margin = halo[axis] if halo is not None and enough else 0
        spans = _spans(size, tile, overlap)
        ramps = [((start + margin) * unit, (stop - margin) * unit) for (_, stop), (start, _) in pairwise(spans)]
        axes.append(make_pieces(spans, ramps, unit))
        lines.append([(low + high) // 2 for low, high in ramps])  # where a blend is steepest
        exact = exact and (enough or len(spans) == 1)
    return _Plan(axes[0], axes[1], (lines[0], lines[1]), exact)


def _check(model: ChunkedAutoencoder, config: TilingConfig, halo: tuple[int, int] | None) -> None:
    for axis, block in enumerate((model.compression.h, model.compression.w)):
        name = "hw"[axis]
        for field, value in (("tile", config.tile[axis]), ("overlap", _pixels(config.overlap))):
            if value % block:
                shown = config.tile if field == "tile" else value
                raise ConfigError(f"{field}: got {shown}, needed multiples of {block} (model.compression.{name})")
        if config.overlap != "exact":
            continue
        if halo is None:
            raise ConfigError(
                f"overlap: got exact, but pixels of this {type(model).__name__} depend on the whole frame (attention, "
                "or norms over it); give pixels, and tiles are blended"
            )
        if config.tile[axis] <= 2 * halo[axis] * block:
            raise ConfigError(
                f"tile: got {config.tile}, needed more than {2 * halo[axis] * block} pixels along {name} for overlap "
                "exact: twice what a pixel depends on"
            )


def _pixels(overlap: int | str) -> int:
    return 0 if isinstance(overlap, str) else overlap


def _spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Cut ``size`` cells into tiles of one size; the last is moved back to the edge."""
    starts = [0]
    while starts[-1] + tile < size:
        starts.append(min(starts[-1] + tile - overlap, size - tile))
    return [(start, min(start + tile, size)) for start in starts]


@torch.no_grad()
def _assemble(
    run: Callable[[Tensor], Iterator[tuple[Tensor, ...]]],
    x: Tensor,
    plan: _Plan,
    num_frames: int,
    blocks: tuple[int, int] = (1, 1),
) -> list[Tensor]:
    """Run every tile and add up its chunks in their places; ``blocks`` pixels of ``x`` make a cell."""
    outputs: list[Tensor] = []
    size = plan.rows[-1].seen.stop, plan.columns[-1].seen.stop
    for row in plan.rows:
        for column in plan.columns:
            weight = row.weight[:, None] * column.weight
            done = 0
            for parts in run(x[..., _scale(row.cells, blocks[0]), _scale(column.cells, blocks[1])]):
                outputs = outputs or [part.new_zeros(*part.shape[:2], num_frames, *size) for part in parts]
                frames = slice(done, done + parts[0].shape[2])
                for output, part in zip(outputs, parts, strict=True):
                    share = part[..., row.inside, column.inside] * weight.to(part)
                    output[:, :, frames, row.seen, column.seen] += share
                done = frames.stop
    return outputs


def _scale(cells: slice, block: int) -> slice:
    return slice(cells.start * block, cells.stop * block)


def _steps(video: Tensor, axis: int) -> Tensor:
    """Average the absolute difference of neighbours along an axis, frame by frame: one number per line, float64."""
    rows = video.movedim(axis, -1)
    sums = [frame.diff(dim=-1).abs().double().flatten(0, -2).mean(0) for frame in rows.unbind(2)]
    return torch.stack(sums).mean(0)


def _ratio(own: float, usual: float) -> float:
    if own == usual:
        return 1.0
    return own / usual if usual else float("inf")
