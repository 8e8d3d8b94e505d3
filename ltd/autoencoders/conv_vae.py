"""The convolutional VAE family of released models: levels of residual blocks, per-frame attention in the middle.

One architecture with few switches is the video VAE of Wan 2.1 and 2.2, the image VAE of Stable Diffusion, SDXL and Flux
(``temporal_kernel: 1``), and an image VAE inflated to video (``ltd.autoencoders.inflate``). ``ltd.interop`` maps the
weights to and from diffusers. Knows nothing of losses, data sets or devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from ltd.autoencoders.autoencoder import Autoencoder, Side
from ltd.autoencoders.blocks import Fold, Unfold
from ltd.autoencoders.bottleneck import BottleneckConfig, KlConfig, num_moments
from ltd.autoencoders.conv_parts import (
    AverageDown,
    ConvBlock,
    FrameAttention,
    NormConv,
    PartSettings,
    RepeatUp,
    SpatialDown,
    SpatialUp,
    TemporalDown,
    TemporalUp,
)
from ltd.autoencoders.descent import Stage, Step, descend, join_states, split_state
from ltd.config import ConfigError
from ltd.nn.causal_conv import Factors, State, is_first
from ltd.shapes import Compression


@dataclass(frozen=True, kw_only=True)
class ConvVaeConfig:
    """Architecture of a ``ConvVae``; levels are listed from the pixels' side to the latents' side."""

    kind: Literal["conv_vae"] = "conv_vae"
    #: Colour channels of the video.
    in_channels: int = 3
    #: Channels of one latent cell.
    latent_channels: int = 16
    #: Pixels along height and width folded into channels before the first convolution.
    patch: int = 1
    #: Width of the encoder's and the decoder's first level.
    encoder_width: int = 96
    decoder_width: int = 96
    #: Width of each level in units of the first; height and width are halved between levels.
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    #: Residual blocks of each level of the encoder; the decoder has one more.
    blocks: int = 2
    #: Between which levels the number of frames is halved too.
    halve_time: tuple[bool, ...] = (False, True, True)
    #: Whether the middle has attention among the pixels of a frame.
    attention: bool = True
    #: "rms" over the channels of a pixel, or "group" over a frame.
    norm: Literal["rms", "group"] = "rms"
    #: Groups of "group".
    num_groups: int = 32
    #: Frames that a convolution of 3x3 pixels sees; 1 makes an image VAE, which takes a clip frame by frame.
    temporal_kernel: Literal[1, 3] = 3
    #: What a convolution sees before the clip.
    front: Literal["repeat", "zeros"] = "zeros"
    #: Whether each level has a parameter-free path around it (average of groups down, repetition up).
    shortcuts: bool = False
    #: Whether enlarging halves the channels already, or leaves that to the next level's first block.
    narrow_before: bool = True
    #: Whether a pointwise convolution follows the encoder, and one goes before the decoder.
    quant_conv: bool = True
    post_quant_conv: bool = True
    #: Whether the decoder's norms are scaled and shifted by the latent, pixel by pixel.
    conditional_norm: bool = False
    #: "refuse" sizes that the compression does not divide, or "crop": the last rows and columns get no latent cell.
    odd_sizes: Literal["refuse", "crop"] = "refuse"
    bottleneck: BottleneckConfig = field(default_factory=KlConfig)
    #: Whether decoding clamps to [-1, 1] in evaluation mode.
    clamp: bool = False

    def __post_init__(self) -> None:
        for name in ("in_channels", "latent_channels", "patch", "encoder_width", "decoder_width", "num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 1 or more")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ConfigError(f"multipliers: got {self.multipliers}, needed one positive number per level")
        if len(self.halve_time) != len(self.multipliers) - 1:
            raise ConfigError(
                f"halve_time: got {len(self.halve_time)} entries, needed {len(self.multipliers) - 1}: one between each "
                f"two of the {len(self.multipliers)} levels (multipliers)"
            )
        if self.blocks < 1:
            raise ConfigError(f"blocks: got {self.blocks}, needed 1 or more")
        if self.temporal_kernel == 1 and any(self.halve_time):
            raise ConfigError(
                "halve_time: an image VAE (temporal_kernel: 1) keeps all frames; set all entries to false"
            )
        if self.odd_sizes == "crop" and self.patch > 1:
            raise ConfigError(f"odd_sizes: crop needs patch 1, got {self.patch}; set odd_sizes to refuse")
        if self.odd_sizes == "crop" and self.shortcuts:
            raise ConfigError("odd_sizes: crop does not go with shortcuts, which fold whole blocks; set it to refuse")
        self._check_widths()

    def _check_widths(self) -> None:
        for side in ("encoder", "decoder"):
            widths = self.widths(side)
            if self.norm == "group" and any(width % self.num_groups for width in widths):
                raise ConfigError(
                    f"num_groups: got {self.num_groups}, needed a divisor of the {side}'s widths {widths}"
                )
            if self.shortcuts:
                self._check_shortcuts(side, widths)
        if self.narrow_before and not self.shortcuts:
            wide = self.widths("decoder")[1:]
            odd = [width for width in wide if width % 2]
            if odd:
                raise ConfigError(f"narrow_before: halves the decoder's widths, got odd ones {odd}; set it to false")
            if self.norm == "group" and any(width // 2 % self.num_groups for width in wide):
                raise ConfigError(
                    f"num_groups: got {self.num_groups}, needed a divisor of the decoder's halved widths "
                    f"{tuple(width // 2 for width in wide)}; or set narrow_before to false"
                )

    def _check_shortcuts(self, side: str, widths: tuple[int, ...]) -> None:
        before = (widths[0], *widths[:-1])  # of the encoder's levels, on their way down
        for level, (fine, width) in enumerate(zip(before, widths, strict=True)):
            cells = self.cells(level) if level < len(self.halve_time) else 1
            if side == "encoder" and fine * cells % width:
                raise ConfigError(f"multipliers[{level}]: {width} channels do not divide {fine} x {cells} (shortcuts)")
            # The decoder's level starts from the width of the level below it.
            below = widths[min(level + 1, len(widths) - 1)]
            if side == "decoder" and level and width * self.cells(level - 1) % below:
                raise ConfigError(
                    f"multipliers[{level}]: {below} channels do not divide {width} x {self.cells(level - 1)} "
                    "(shortcuts)"
                )

    def widths(self, side: str) -> tuple[int, ...]:
        """List the width of each level of one side, ``encoder`` or ``decoder``."""
        width = self.encoder_width if side == "encoder" else self.decoder_width
        return tuple(width * multiplier for multiplier in self.multipliers)

    def factors(self, level: int) -> Factors:
        """Give the reduction (t, h, w) between a level and the next."""
        return (2 if self.halve_time[level] else 1, 2, 2)

    def cells(self, level: int) -> int:
        """Count the pixels of a level that one of the next stands for."""
        return 8 if self.halve_time[level] else 4

    @property
    def compression(self) -> Compression:
        """Pixels per latent cell along each axis."""
        space = self.patch * 2 ** len(self.halve_time)
        return Compression(2 ** sum(self.halve_time), space, space)


class ConvVae(Autoencoder):
    """Convolutional VAE of clips and images; computes in its parameters' dtype and casts its input to it.

    Reference: Wan Team (2025), arXiv 2503.20314, Sec. 4.1; Rombach et al. (2021), arXiv 2112.10752, App. E.1.

    Args:
        config: Architecture.
    """

    def __init__(self, config: ConvVaeConfig) -> None:
        super().__init__(config)
        self.config: ConvVaeConfig = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)

    def spatial_halo(self, side: Side) -> tuple[int, int] | None:
        """Bound how far a latent cell reaches; None with attention or group norms. See ``Autoencoder.spatial_halo``."""
        if self.config.attention or self.config.norm == "group":
            return None
        reach = _decoder_reach(self.config) if side == "decode" else _encoder_reach(self.config)
        return reach, reach

    def _moments(self, video: Tensor, state: State) -> tuple[Tensor, Tensor | None, State]:
        states = split_state(state, self.encoder.num_stages)
        del state  # whoever streams holds none of the old state while the new one is made
        moments = self.encoder(video, states)
        if self.quantizer is not None:
            return moments, None, join_states(states)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar, join_states(states)

    def decode_chunk(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode one chunk of a stream; see ``Autoencoder.decode_chunk``."""
        self._check_latents(latents)
        states = split_state(state, self.decoder.num_stages)
        del state
        video = self.decoder(self._enter(latents), states)
        video = video.clamp(-1, 1) if self.config.clamp and not self.training else video
        return video, join_states(states)


class _Encoder(nn.Module):
    """From pixels to posterior moments."""

    def __init__(self, config: ConvVaeConfig) -> None:
        super().__init__()
        settings = _settings(config)
        widths = config.widths("encoder")
        moments = num_moments(config.bottleneck, config.latent_channels)
        self.fold = Fold((1, config.patch, config.patch))
        self.conv_in = settings.conv(config.in_channels * config.patch**2, widths[0])
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            before = widths[max(level - 1, 0)]
            self.levels.append(_DownLevel(config, before, width, None if last else config.factors(level)))
        self.middle = _Middle(config, widths[-1])
        self.out = NormConv(settings.norm(widths[-1]), settings.conv(widths[-1], moments))
        self.quant_conv = settings.pointwise(moments, moments) if config.quant_conv else None
        # Frames that belong together because the levels from here on halve their number.
        self._units = [2 ** sum(config.halve_time[level:]) for level in range(len(widths))]
        self.num_stages = len(self._steps())
        self.piece_pixels: int | None = None

    def forward(self, x: Tensor, states: list[State]) -> Tensor:
        return descend(self._steps(), x, states, piece_pixels=self.piece_pixels)

    def _steps(self) -> list[Step]:
        steps = [Step(self._begin, unit=self._units[0])]
        for index, (level, unit) in enumerate(zip(self.levels, self._units, strict=True)):
            assert isinstance(level, _DownLevel)
            first, *others = level.stages()
            steps += [Step(first, unit=unit, gathers=index > 0), *(Step(stage, unit=unit) for stage in others)]
        return [*steps, Step(self.middle), Step(self._finish)]

    def _begin(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        return self.conv_in(self.fold(x, state)[0], state)

    def _finish(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        x, state = self.out(x, state, None)
        return (x if self.quant_conv is None else self.quant_conv(x)[0]), state


class _Decoder(nn.Module):
    """From latents to pixels."""

    def __init__(self, config: ConvVaeConfig) -> None:
        super().__init__()
        settings = _settings(config)
        widths = config.widths("decoder")
        self.guided = config.conditional_norm
        guide = config.latent_channels if self.guided else 0
        latent = config.latent_channels
        self.post_quant_conv = settings.pointwise(latent, latent) if config.post_quant_conv else None
        self.conv_in = settings.conv(latent, widths[-1])
        self.middle = _Middle(config, widths[-1], guide)
        self.levels = nn.ModuleList()
        width = widths[-1]
        for level in reversed(range(len(widths))):
            made = _UpLevel(config, width, widths[level], config.factors(level - 1) if level else None, guide)
            self.levels.append(made)
            width = made.out_channels
        self.out = NormConv(settings.norm(width, guide), settings.conv(width, config.in_channels * config.patch**2))
        self.unfold = Unfold((1, config.patch, config.patch))
        self.num_stages = len(self._steps())
        self.piece_pixels: int | None = None

    def forward(self, latents: Tensor, states: list[State]) -> Tensor:
        guide = latents if self.guided else None
        return descend(self._steps(), latents, states, guide, piece_pixels=self.piece_pixels)

    def _steps(self) -> list[Step]:
        steps = [Step(self._begin), Step(self.middle)]
        for level in self.levels:
            assert isinstance(level, _UpLevel)
            steps += level.steps()
        return [*steps, Step(self._finish)]

    def _begin(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        return self.conv_in(x if self.post_quant_conv is None else self.post_quant_conv(x)[0], state)

    def _finish(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        x, after = self.out(x, state, guide)
        return self.unfold(x, state)[0], after


class _Middle(nn.Module):
    """A residual block, and a second one behind per-frame attention."""

    def __init__(self, config: ConvVaeConfig, width: int, guide: int = 0) -> None:
        super().__init__()
        settings = _settings(config)
        self.blocks = nn.ModuleList([ConvBlock(width, width, settings, guide) for _ in range(2)])
        self.attention = FrameAttention(width, settings.norm(width)) if config.attention else None

    def forward(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        first, second = split_state(state, 2)
        x, first = self.blocks[0](x, first, guide)
        if self.attention is not None:
            x, _ = self.attention(x, None, guide)
        x, second = self.blocks[1](x, second, guide)
        return x, _join(state, [first, second])


class _DownLevel(nn.Module):
    """Residual blocks and a reduction, with a path around both."""

    def __init__(self, config: ConvVaeConfig, channels: int, out_channels: int, factors: Factors | None) -> None:
        super().__init__()
        settings = _settings(config)
        widths = [channels, *[out_channels] * config.blocks]
        self.blocks = nn.ModuleList(ConvBlock(a, b, settings) for a, b in pairwise(widths))
        self.space = None if factors is None else SpatialDown(out_channels)
        self.time = TemporalDown(out_channels) if factors is not None and factors[0] == 2 else None
        self.around = AverageDown(channels, out_channels, factors or (1, 1, 1)) if config.shortcuts else None

    def stages(self) -> list[Stage]:
        """List what can be run piece by piece: each part, or all with the path around them."""
        return [self] if self.around is not None else [*self.blocks, self.resample]

    def forward(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        entered, states = x, split_state(state, len(self.blocks) + 1)
        for index, part in enumerate((*self.blocks, self.resample)):
            x, states[index] = part(x, states[index], guide)
        if self.around is not None:
            x = x + self.around(entered, first=is_first(state))
        return x, _join(state, states)

    def resample(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        """Reduce space, then time."""
        x = x if self.space is None else self.space(x)
        return self.time(x, state) if self.time is not None else (x, _started(state))


class _UpLevel(nn.Module):
    """Residual blocks and an enlargement, with a path around both."""

    def __init__(
        self, config: ConvVaeConfig, channels: int, out_channels: int, factors: Factors | None, guide: int
    ) -> None:
        super().__init__()
        settings = _settings(config)
        self.factors = factors or (1, 1, 1)
        widths = [channels, *[out_channels] * (config.blocks + 1)]
        self.blocks = nn.ModuleList(ConvBlock(a, b, settings, guide) for a, b in pairwise(widths))
        narrow = factors is not None and config.narrow_before and not config.shortcuts
        self.out_channels = out_channels // 2 if narrow else out_channels
        self.time = TemporalUp(out_channels) if self.factors[0] == 2 else None
        self.space = None if factors is None else SpatialUp(out_channels, self.out_channels)
        self.around = RepeatUp(channels, out_channels, factors) if config.shortcuts and factors is not None else None

    def steps(self) -> list[Step]:
        """List what can be run piece by piece: each part, or all with the path around them."""
        if self.around is not None:
            return [Step(self)]
        blocks: list[Stage] = [*self.blocks, self.enlarge_time]
        return [*(Step(stage) for stage in blocks), Step(self.enlarge_space, spread=self.factors[1] * self.factors[2])]

    def forward(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        entered, states = x, split_state(state, len(self.blocks) + 2)
        for index, part in enumerate((*self.blocks, self.enlarge_time, self.enlarge_space)):
            x, states[index] = part(x, states[index], guide)
        if self.around is not None:
            x = x + self.around(entered, first=is_first(state))
        return x, _join(state, states)

    def enlarge_time(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        """Double the frames behind the first."""
        return self.time(x, state) if self.time is not None else (x, _started(state))

    def enlarge_space(self, x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        """Double height and width."""
        return (x if self.space is None else self.space(x)), _started(state)


def _decoder_reach(config: ConvVaeConfig) -> int:
    """Follow the pixels of one latent cell back to the cells that they see."""
    level, reach = 2 * (config.blocks + 1), 1  # pixels on either side: a level's convolutions, and the last one
    for _ in config.halve_time:
        reach += level
        # The 3x3 convolution sees enlarged cells: one pixel more on the fine grid, whole cells on the coarse one.
        reach = -(-(reach + 1) // 2)
    return reach + level + 4 + 1  # the coarsest level, the middle's two blocks, the first convolution


def _encoder_reach(config: ConvVaeConfig) -> int:
    """Follow one latent cell back to the cells whose pixels it sees."""
    reach = 1 + 4
    for _ in config.halve_time:
        reach = 2 * (reach + 2 * config.blocks) + 1  # of the two pixels behind a cell, one more on the far side
    reach += 2 * config.blocks + 1
    return -(-reach // (config.compression.h // config.patch))


def _settings(config: ConvVaeConfig) -> PartSettings:
    return PartSettings(config.norm, config.num_groups, config.temporal_kernel, config.front)


def _join(before: State, after: list[State]) -> State:
    return None if before is None else tuple(after)


def _started(state: State) -> State:
    """Give the state of a part that keeps no frames: all it has to know is that the clip has begun."""
    return None if state is None else (None,)
