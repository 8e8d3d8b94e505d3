"""Operations of the autoencoders' two halves, counted from a configuration and the size of the clips.

Norms, FSQ, shortcuts and resampling without weights make no products that would count; a codebook's distances do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from ltd.autoencoders.bottleneck import num_moments
from ltd.autoencoders.build import AutoencoderConfig
from ltd.autoencoders.causal_vae import CausalVaeConfig
from ltd.autoencoders.conv_vae import ConvVaeConfig
from ltd.autoencoders.quantizers import VqConfig
from ltd.nn.causal_conv import Factors
from ltd.nn.flops import Flops, attention, convolution, linear, total
from ltd.shapes import VideoShape


@dataclass(frozen=True)
class _Grid:
    """Frames, height and width of a batch of clips somewhere in the network."""

    rows: int
    t: int
    h: int
    w: int

    @property
    def cells(self) -> int:
        return self.rows * self.t * self.h * self.w

    def down(self, factors: Factors) -> _Grid:
        ft, fh, fw = factors
        return _Grid(self.rows, 1 + (self.t - 1) // ft, self.h // fh, self.w // fw)

    def up(self, factors: Factors) -> _Grid:
        ft, fh, fw = factors
        return _Grid(self.rows, 1 + (self.t - 1) * ft, self.h * fh, self.w * fw)


@dataclass(frozen=True)
class _Guide:
    """The latents that conditional norms read, and whether they need no gradient."""

    grid: _Grid
    leaf: bool


def encode_flops(config: AutoencoderConfig, shape: VideoShape, rows: int = 1) -> Flops:
    """Count the operations of encoding; the pixels need no gradient.

    Args:
        config: The autoencoder's.
        shape: Size of the clips in pixels.
        rows: Number of clips.

    Returns:
        The operations.
    """
    grid = _Grid(rows, shape.num_frames, shape.height, shape.width)
    codes = 0.0
    if isinstance(config.bottleneck, VqConfig):
        latent = config.compression.latent(shape)
        codes = 2.0 * rows * latent.num_cells * config.latent_channels * config.bottleneck.num_codes
    match config:
        case CausalVaeConfig():
            return _causal_encoder(config, grid) + Flops(codes)
        case ConvVaeConfig():
            return _conv_encoder(config, grid) + Flops(codes)


def decode_flops(config: AutoencoderConfig, latent: VideoShape, rows: int = 1, *, leaf: bool = False) -> Flops:
    """Count the operations of decoding.

    Args:
        config: The autoencoder's.
        latent: Size of the latents in cells.
        rows: Number of clips.
        leaf: Whether the latents need no gradient, as behind a frozen encoder.

    Returns:
        The operations.
    """
    grid = _Grid(rows, latent.num_frames, latent.height, latent.width)
    match config:
        case CausalVaeConfig():
            return _causal_decoder(config, grid, leaf)
        case ConvVaeConfig():
            return _conv_decoder(config, grid, leaf)


def _causal_encoder(config: CausalVaeConfig, grid: _Grid) -> Flops:
    pixels, widths = grid, config.channels
    grid = grid.down(config.front)
    folded = config.in_channels * prod(config.front)
    parts = [_haar(config, grid), convolution(grid.cells, folded, widths[0], config.stem_kernel, leaf=True)]
    for level, width in enumerate(widths):
        parts.append(_causal_block(config, grid, width) * config.encoder_blocks[level])
        if level < len(config.factors):
            factors = config.factors[level]
            grid = grid.down(factors)
            parts.append(convolution(grid.cells, width, widths[level + 1], factors))
    moments = num_moments(config.bottleneck, config.latent_channels)
    parts.append(convolution(grid.cells, widths[-1], moments, config.stem_kernel))
    if config.linear_path:
        cells, block = _linear_path(config, pixels)
        parts.append(convolution(cells, block, config.latent_channels, (1, 1, 1), leaf=True, fixed=True))
    return total(parts)


def _causal_decoder(config: CausalVaeConfig, grid: _Grid, leaf: bool) -> Flops:
    widths, cells = config.channels, grid.cells
    parts = [convolution(cells, config.latent_channels, widths[-1], config.stem_kernel, leaf=leaf)]
    for level in reversed(range(len(widths))):
        parts.append(_causal_block(config, grid, widths[level]) * config.decoder_blocks[level])
        if level:
            factors = config.factors[level - 1]
            parts.append(convolution(grid.cells, widths[level], widths[level - 1] * prod(factors), (1, 1, 1)))
            grid = grid.up(factors)
    folded = config.in_channels * prod(config.front)
    parts.append(convolution(grid.cells, widths[0], folded, config.stem_kernel))
    rotation = _haar(config, grid)
    parts.append(replace(rotation, backward=rotation.forward))
    if config.linear_path:
        block = config.in_channels * prod((config.compression.t, config.compression.h, config.compression.w))
        parts.append(convolution(cells, config.latent_channels, block, config.linear_kernel, leaf=leaf, fixed=True))
    return total(parts)


def _causal_block(config: CausalVaeConfig, grid: _Grid, width: int) -> Flops:
    hidden, (first, second) = round(width * config.expansion), config.block_kernels
    return convolution(grid.cells, width, hidden, first) + convolution(grid.cells, hidden, width, second)


def _haar(config: CausalVaeConfig, grid: _Grid) -> Flops:
    """Count the fixed rotation of folded blocks; no gradient passes the encoder's."""
    if config.front_transform != "haar":
        return Flops()
    return Flops(2.0 * grid.cells * config.in_channels * prod(config.front) ** 2)


def _linear_path(config: CausalVaeConfig, pixels: _Grid) -> tuple[int, int]:
    block = (config.compression.t, config.compression.h, config.compression.w)
    return pixels.down(block).cells, config.in_channels * prod(block)


def _conv_encoder(config: ConvVaeConfig, grid: _Grid) -> Flops:
    widths = config.widths("encoder")
    grid = grid.down((1, config.patch, config.patch))
    folded = config.in_channels * config.patch**2
    parts = [convolution(grid.cells, folded, widths[0], _kernel(config), leaf=True)]
    before = widths[0]
    for level, width in enumerate(widths):
        parts += [_conv_block(config, grid, a, b) for a, b in pairwise([before, *[width] * config.blocks])]
        before = width
        if level < len(widths) - 1:
            halves = config.factors(level)[0] == 2
            grid = grid.down((1, 2, 2))
            parts.append(convolution(grid.cells, width, width, (3, 3)))
            if halves:
                grid = grid.down((2, 1, 1))
                behind_first = replace(grid, t=grid.t - 1)
                parts.append(convolution(behind_first.cells, width, width, (3,)))
    moments = num_moments(config.bottleneck, config.latent_channels)
    parts += [_middle(config, grid, widths[-1]), convolution(grid.cells, widths[-1], moments, _kernel(config))]
    if config.quant_conv:
        parts.append(convolution(grid.cells, moments, moments, (1,)))
    return total(parts)


def _conv_decoder(config: ConvVaeConfig, grid: _Grid, leaf: bool) -> Flops:
    widths, latent, base = config.widths("decoder"), config.latent_channels, _Guide(grid, leaf)
    first_of_two = config.post_quant_conv
    parts = [convolution(grid.cells, latent, widths[-1], _kernel(config), leaf=leaf and not first_of_two)]
    if first_of_two:
        parts.append(convolution(grid.cells, latent, latent, (1,), leaf=leaf))
    parts.append(_middle(config, grid, widths[-1], base))
    before = widths[-1]
    for level in reversed(range(len(widths))):
        width = widths[level]
        path = [before, *[width] * (config.blocks + 1)]
        parts += [_conv_block(config, grid, a, b, base) for a, b in pairwise(path)]
        before = width
        if level:
            if config.factors(level - 1)[0] == 2:
                behind_first = replace(grid, t=grid.t - 1)
                parts.append(convolution(behind_first.cells, width, 2 * width, (3,)))
                grid = grid.up((2, 1, 1))
            before = width // 2 if config.narrow_before and not config.shortcuts else width
            # Four kernels of 2x2 pixels on the small grid, which is padded by one (``conv_parts.SpatialUp``).
            padded = grid.rows * grid.t * (grid.h + 1) * (grid.w + 1)
            parts.append(convolution(padded, width, 4 * before, (2, 2)))
            grid = grid.up((1, 2, 2))
    parts += [_guided(config, grid, before, base)]
    parts.append(convolution(grid.cells, before, config.in_channels * config.patch**2, _kernel(config)))
    return total(parts)


def _middle(config: ConvVaeConfig, grid: _Grid, width: int, guide: _Guide | None = None) -> Flops:
    parts = [_conv_block(config, grid, width, width, guide) * 2]
    if config.attention:
        pixels, frames = grid.h * grid.w, grid.rows * grid.t
        parts += [linear(grid.cells, width, 4 * width), attention(pixels, pixels, width) * frames]
    return total(parts)


def _conv_block(config: ConvVaeConfig, grid: _Grid, inputs: int, outputs: int, guide: _Guide | None = None) -> Flops:
    parts = [convolution(grid.cells, inputs, outputs, _kernel(config))]
    parts.append(convolution(grid.cells, outputs, outputs, _kernel(config)))
    if inputs != outputs:
        parts.append(convolution(grid.cells, inputs, outputs, (1,)))
    if guide is not None:
        parts += [_guided(config, grid, inputs, guide), _guided(config, grid, outputs, guide)]
    return total(parts)


def _guided(config: ConvVaeConfig, grid: _Grid, channels: int, guide: _Guide) -> Flops:
    """Count what a conditional norm makes of the latents, whose frames are repeated to those of the grid."""
    if not config.conditional_norm:
        return Flops()
    cells = replace(guide.grid, t=grid.t).cells
    return convolution(cells, config.latent_channels, 2 * channels, (1,), leaf=guide.leaf)


def _kernel(config: ConvVaeConfig) -> Factors:
    return config.temporal_kernel, 3, 3
