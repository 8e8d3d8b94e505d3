"""A causal 3D convolutional variational autoencoder of videos; an image is a clip of one frame.

Two paths run side by side from pixels to latents and back. The *linear path*, if configured, is one fixed linear map of
each block of pixels to its latents and one of each neighbourhood of latents to a block of pixels. It is zero until it
is computed from data in closed form (``ltd.autoencoders.initialize_from_data``); then the model starts as the best
linear autoencoder. The *convolutional path* is trained and adds what a fixed linear map cannot do. Knows nothing of
losses, data sets or devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ltd.autoencoders.autoencoder import Autoencoder, Side, widen
from ltd.autoencoders.blocks import (
    Downsample,
    Fold,
    NormActivation,
    ResidualBlock,
    Unfold,
    Upsample,
    haar_rotation,
    zero_init,
)
from ltd.autoencoders.bottleneck import BottleneckConfig, KlConfig, num_moments
from ltd.autoencoders.latents import LOGVAR_RANGE
from ltd.config import ConfigError
from ltd.nn.causal_conv import CausalConv3d, Factors, FixedCausalConv3d, State, is_first, run
from ltd.shapes import Compression


@dataclass(frozen=True, kw_only=True)
class CausalVaeConfig:
    """Architecture of a ``CausalVae``; levels are listed from the pixels' side to the latents' side."""

    kind: Literal["causal_vae"] = "causal_vae"
    #: Colour channels of the video.
    in_channels: int = 3
    #: Channels of one latent cell.
    latent_channels: int = 16
    #: Pixels folded into channels before the first convolution, along (t, h, w).
    front: tuple[int, int, int] = (1, 2, 2)
    #: What the front does to a folded block: "patch" leaves it, "haar" rotates it by the orthonormal Haar transform.
    front_transform: Literal["patch", "haar"] = "patch"
    #: Width of each level.
    channels: tuple[int, ...] = (96, 192, 384)
    #: Reduction (t, h, w) between each level and the next; the front times all of them is the compression.
    factors: tuple[tuple[int, int, int], ...] = ((2, 2, 2), (2, 2, 2))
    #: Residual blocks of the encoder at each level.
    encoder_blocks: tuple[int, ...] = (1, 2, 2)
    #: Residual blocks of the decoder at each level.
    decoder_blocks: tuple[int, ...] = (2, 2, 2)
    #: Kernels (t, h, w), odd in h and w, of the two convolutions of a residual block.
    block_kernels: tuple[tuple[int, int, int], tuple[int, int, int]] = ((3, 3, 3), (3, 3, 3))
    #: Kernel of the first and last convolution of encoder and decoder.
    stem_kernel: tuple[int, int, int] = (3, 3, 3)
    #: Width between the two convolutions of a residual block, in units of the level's width.
    expansion: float = 1.0
    #: Whether resampling has the parameter-free path (average of groups down, repetition up).
    shortcuts: bool = True
    #: Whether there is a fixed linear path beside the convolutions; it needs initialize_from_data to have an effect.
    linear_path: bool = False
    #: Latents (t, h, w) that the linear path of the decoder sees for one block of pixels.
    linear_kernel: tuple[int, int, int] = (3, 3, 3)
    #: Factor on what the convolutional path adds to the linear one; under Adam it scales the last layers' steps.
    residual_scale: float = 1.0
    #: What convolutions see outside a frame.
    padding: Literal["zeros", "replicate"] = "replicate"
    bottleneck: BottleneckConfig = field(default_factory=KlConfig)
    #: Log-variance of the posterior at the start of training.
    initial_logvar: float = -6.0

    def __post_init__(self) -> None:
        _check_lengths(self)
        _check_sizes(self)

    @property
    def compression(self) -> Compression:
        """Pixels per latent cell along each axis."""
        total = [math.prod(axis) for axis in zip(self.front, *self.factors, strict=True)]
        return Compression(*total)


class CausalVae(Autoencoder):
    """Causal convolutional VAE; computes in its parameters' dtype and casts its input to it.

    Reference: Lin et al., Open-Sora Plan (2024), arXiv 2412.00131, Sec. 2.1 (causal video VAE, image as first frame).

    Args:
        config: Architecture.
    """

    def __init__(self, config: CausalVaeConfig) -> None:
        super().__init__(config)
        self.config: CausalVaeConfig = config
        self.encoder = nn.ModuleList(_encoder(config))
        self.decoder = nn.ModuleList(_decoder(config))
        block = config.in_channels * math.prod(self._block)
        self.linear_encoder = nn.ModuleList()
        self.linear_decoder = nn.ModuleList()
        if config.linear_path:
            fold, unfold = Fold(self._block), Unfold(self._block)
            project = FixedCausalConv3d(block, config.latent_channels, (1, 1, 1))
            rebuild = FixedCausalConv3d(config.latent_channels, block, config.linear_kernel)
            self.linear_encoder.extend([fold, project])
            self.linear_decoder.extend([rebuild, unfold])

    def spatial_halo(self, side: Side) -> tuple[int, int]:
        """Say how far a latent cell reaches; exact, not a bound. See ``Autoencoder.spatial_halo``."""
        return _reach(self.config, 1, side), _reach(self.config, 2, side)

    @property
    def _block(self) -> Factors:
        return (self.compression.t, self.compression.h, self.compression.w)

    def _moments(self, video: Tensor, state: State) -> tuple[Tensor, Tensor | None, State]:
        net_state, linear_state = _split(state)
        moments, net_state = run(self.encoder, video, net_state)
        mean, logvar = moments.chunk(2, dim=1) if self.quantizer is None else (moments, None)
        if self.linear_encoder:
            linear, linear_state = run(self.linear_encoder, video, linear_state)
            mean = linear + self.config.residual_scale * mean
        if logvar is not None:
            logvar = widen(logvar) + self.config.initial_logvar
        return mean, logvar, _join(state, net_state, linear_state)

    def decode_chunk(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode one chunk of a stream; see ``Autoencoder.decode_chunk``."""
        self._check_latents(latents)
        latents = self._enter(latents)
        net_state, linear_state = _split(state)
        video, net_state = run(self.decoder, latents, net_state)
        if self.linear_decoder:
            linear, linear_state = run(self.linear_decoder, latents, linear_state)
            video = linear + self.config.residual_scale * video
        return video, _join(state, net_state, linear_state)


def _encoder(config: CausalVaeConfig) -> list[nn.Module]:
    """List the encoder's modules, from pixels to posterior moments."""
    widths, padding = config.channels, config.padding
    folded = config.in_channels * math.prod(config.front)
    modules: list[nn.Module] = [Fold(config.front, _rotation(config))]
    modules.append(CausalConv3d(folded, widths[0], config.stem_kernel, padding=padding))
    for level, width in enumerate(widths):
        modules += _blocks(config, width, config.encoder_blocks[level])
        if level < len(config.factors):
            modules.append(Downsample(width, widths[level + 1], config.factors[level], shortcut=config.shortcuts))
    moments = num_moments(config.bottleneck, config.latent_channels)
    head = CausalConv3d(widths[-1], moments, config.stem_kernel, padding=padding)
    modules += [NormActivation(widths[-1]), head]
    with torch.no_grad():  # the posterior starts at the initial log-variance everywhere
        (head.weight if config.linear_path else head.weight[config.latent_channels :]).zero_()
        assert head.bias is not None
        head.bias.zero_()
    return modules


def _decoder(config: CausalVaeConfig) -> list[nn.Module]:
    """List the decoder's modules, from latents to pixels."""
    widths, padding = config.channels, config.padding
    folded = config.in_channels * math.prod(config.front)
    modules: list[nn.Module] = [CausalConv3d(config.latent_channels, widths[-1], config.stem_kernel, padding=padding)]
    for level in reversed(range(len(widths))):
        modules += _blocks(config, widths[level], config.decoder_blocks[level])
        if level:
            modules.append(
                Upsample(widths[level], widths[level - 1], config.factors[level - 1], shortcut=config.shortcuts)
            )
    head = CausalConv3d(widths[0], folded, config.stem_kernel, padding=padding)
    if config.linear_path:
        zero_init(head)
    return [*modules, NormActivation(widths[0]), head, Unfold(config.front, _rotation(config))]


def _blocks(config: CausalVaeConfig, width: int, count: int) -> list[nn.Module]:
    hidden = round(width * config.expansion)
    return [ResidualBlock(width, hidden, config.block_kernels, config.padding) for _ in range(count)]


def _rotation(config: CausalVaeConfig) -> Tensor | None:
    return haar_rotation(config.front) if config.front_transform == "haar" else None


def _split(state: State) -> tuple[State, State]:
    if is_first(state):
        return state, state
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError("expected the state that the previous chunk returned")
    return state[0], state[1]


def _join(before: State, *after: State) -> State:
    return None if before is None else after


def _check_lengths(config: CausalVaeConfig) -> None:
    levels = len(config.channels)
    if not levels:
        raise ConfigError("channels: width of each level, got none, needed at least one")
    for name, needed in (("factors", levels - 1), ("encoder_blocks", levels), ("decoder_blocks", levels)):
        got = len(getattr(config, name))
        if got != needed:
            raise ConfigError(f"{name}: one entry per level, got {got}, needed {needed} for {levels} channels")


def _check_sizes(config: CausalVaeConfig) -> None:
    for name in ("in_channels", "latent_channels", *("channels", "front", "factors", "stem_kernel", "linear_kernel")):
        value = getattr(config, name)
        if _smallest(value) < 1:
            raise ConfigError(f"{name}: got {value}, needed positive integers")
    for name in ("encoder_blocks", "decoder_blocks"):
        if _smallest(getattr(config, name)) < 0:
            raise ConfigError(f"{name}: got {getattr(config, name)}, needed 0 or more")
    for name, kernels in (("block_kernels", config.block_kernels), ("stem_kernel", (config.stem_kernel,))):
        if any(h % 2 == 0 or w % 2 == 0 for _, h, w in kernels) or _smallest(kernels) < 1:
            raise ConfigError(f"{name}: got {kernels}, needed kernels odd in h and w")
    if any(size % 2 == 0 for size in config.linear_kernel[1:]):
        raise ConfigError(f"linear_kernel: got {config.linear_kernel}, needed odd in h and w")
    if config.front_transform == "haar" and any(size & (size - 1) for size in config.front):
        raise ConfigError(f"front: got {config.front}, needed powers of two for front_transform haar")
    if config.expansion <= 0:
        raise ConfigError(f"expansion: got {config.expansion}, needed more than 0")
    if not LOGVAR_RANGE[0] <= config.initial_logvar <= LOGVAR_RANGE[1]:
        raise ConfigError(f"initial_logvar: got {config.initial_logvar}, needed within {LOGVAR_RANGE}")
    if config.residual_scale <= 0:
        raise ConfigError(f"residual_scale: got {config.residual_scale}, needed more than 0")
    if config.shortcuts:
        _check_shortcuts(config)


def _check_shortcuts(config: CausalVaeConfig) -> None:
    for level, factors in enumerate(config.factors):
        fine, coarse = config.channels[level], config.channels[level + 1]
        if fine * math.prod(factors) % coarse:
            raise ConfigError(
                f"channels[{level + 1}]: got {coarse}, needed a divisor of channels[{level}] * prod(factors[{level}]) "
                f"= {fine * math.prod(factors)}, or shortcuts: false"
            )


def _reach(config: CausalVaeConfig, axis: int, side: Side) -> int:
    stem, block = config.stem_kernel[axis] // 2, sum(kernel[axis] // 2 for kernel in config.block_kernels)
    counts = config.decoder_blocks if side == "decode" else config.encoder_blocks
    last = len(counts) - 1
    reach = stem
    if side == "decode":  # from pixels back to latents: what f pixels share is one cell of the next level
        for level, count in enumerate(counts):
            reach += count * block
            if level < last:
                reach = -(-reach // config.factors[level][axis])
        linear = config.linear_kernel[axis] // 2 if config.linear_path else 0
        return max(reach + stem, linear)
    for level in range(last, -1, -1):  # from a latent back to pixels, and then in units of cells
        reach += counts[level] * block
        if level:
            reach *= config.factors[level - 1][axis]
    pixels = (reach + stem) * config.front[axis]
    return -(-pixels // (config.compression.h, config.compression.w)[axis - 1])


def _smallest(value: int | tuple[object, ...]) -> int:
    return value if isinstance(value, int) else min((_smallest(v) for v in value), default=1)  # type: ignore[arg-type]
