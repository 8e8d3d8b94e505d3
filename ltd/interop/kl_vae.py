"""diffusers' ``AutoencoderKL`` (Stable Diffusion, SDXL, Flux) to and from ``ConvVae``, as an image VAE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ltd.autoencoders import ConvVaeConfig
from ltd.config import ConfigError
from ltd.interop.mapping import Pair, reshaped, same, stacked
from ltd.interop.reading import check_settings

CLASS_NAME = "AutoencoderKL"
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
#: Checked where they are used, or of no effect on encoding and decoding.
_ELSEWHERE = dict.fromkeys(
    ("down_block_types", "up_block_types", "block_out_channels", "scaling_factor", "shift_factor")
    + ("latents_mean", "latents_std", "sample_size", "force_upcast"),
    ...,
)
#: Names that attention had in older files.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def to_config(theirs: Mapping[str, Any]) -> ConvVaeConfig:
    """Read their configuration.

    Args:
        theirs: Contents of ``config.json``.

    Returns:
        Our configuration.

    Raises:
        ConfigError: If a setting has no counterpart; names it.
    """
    check_settings(theirs, _DEFAULTS | _ELSEWHERE, CLASS_NAME)
    tree = _DEFAULTS | dict(theirs)
    widths = tree["block_out_channels"]
    for name, needed in (
        ("act_fn", "silu"),
        ("out_channels", tree["in_channels"]),
        ("down_block_types", ["DownEncoderBlock2D"] * len(widths)),
        ("up_block_types", ["UpDecoderBlock2D"] * len(widths)),
    ):
        got = list(tree[name]) if isinstance(needed, list) else tree[name]
        if got != needed:
            raise ConfigError(f"{CLASS_NAME}.{name}: got {got}, only {needed} can be converted")
    if any(width % widths[0] for width in widths):
        raise ConfigError(f"{CLASS_NAME}.block_out_channels: got {widths}, needed multiples of the first")
    return ConvVaeConfig(
        in_channels=tree["in_channels"],
        latent_channels=tree["latent_channels"],
        encoder_width=widths[0],
        decoder_width=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=tree["layers_per_block"],
        halve_time=(False,) * (len(widths) - 1),
        attention=tree["mid_block_add_attention"],
        norm="group",
        num_groups=tree["norm_num_groups"],
        temporal_kernel=1,
        narrow_before=False,
        quant_conv=tree["use_quant_conv"],
        post_quant_conv=tree["use_post_quant_conv"],
        odd_sizes="crop",
    )


def from_config(config: ConvVaeConfig, mean: list[float], std: list[float]) -> dict[str, Any]:
    """Write their configuration.

    Args:
        config: Ours.
        mean: Mean of each latent channel.
        std: Standard deviation of each latent channel.

    Returns:
        Contents of ``config.json``; one scale and shift where all channels share them.

    Raises:
        ConfigError: If the model is not of their architecture; names the field.
    """
    needed = {
        "norm": "group",
        "temporal_kernel": 1,
        "patch": 1,
        "shortcuts": False,
        "narrow_before": False,
        "conditional_norm": False,
        "decoder_width": config.encoder_width,
    }
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ConfigError(f"{name}: got {getattr(config, name)}, {CLASS_NAME} needs {value}")
    levels = len(config.multipliers)
    shared = len(set(mean)) == 1 and len(set(std)) == 1
    return {
        "_class_name": CLASS_NAME,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.widths("encoder")),
        "layers_per_block": config.blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.num_groups,
        "scaling_factor": 1.0 / std[0] if shared else 1.0,
        "shift_factor": mean[0] if shared else None,
        "latents_mean": None if shared else mean,
        "latents_std": None if shared else std,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.post_quant_conv,
        "mid_block_add_attention": config.attention,
    }


def renamed(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of older files their present names and shapes."""
    result = {}
    for name, value in theirs.items():
        parts = name.split(".")
        if "attentions" in parts and parts[-2] in _OLD_NAMES:
            parts[-2] = _OLD_NAMES[parts[-2]]
            value = value.flatten(1) if value.ndim > 2 else value
        result[".".join(parts)] = value
    return result


def pairs(config: ConvVaeConfig) -> list[Pair]:
    """List the tensors of one configuration on both sides."""
    return [*_encoder(config), *_decoder(config)]


def _encoder(config: ConvVaeConfig) -> Iterator[Pair]:
    widths = config.widths("encoder")
    yield from _conv("encoder.conv_in", "encoder.conv_in")
    for level, width in enumerate(widths):
        ours, theirs = f"encoder.levels.{level}", f"encoder.down_blocks.{level}"
        for block in range(config.blocks):
            grown = block == 0 and widths[max(level - 1, 0)] != width
            yield from _block(f"{ours}.blocks.{block}", f"{theirs}.resnets.{block}", shortcut=grown)
        if level < len(widths) - 1:
            yield from _affine(f"{ours}.space.conv", f"{theirs}.downsamplers.0.conv")
    yield from _middle(config, "encoder")
    yield from _end("encoder")
    if config.quant_conv:
        yield from _conv("encoder.quant_conv", "quant_conv")


def _decoder(config: ConvVaeConfig) -> Iterator[Pair]:
    widths = config.widths("decoder")
    if config.post_quant_conv:
        yield from _conv("decoder.post_quant_conv", "post_quant_conv")
    yield from _conv("decoder.conv_in", "decoder.conv_in")
    yield from _middle(config, "decoder")
    for index, level in enumerate(reversed(range(len(widths)))):
        ours, theirs = f"decoder.levels.{index}", f"decoder.up_blocks.{index}"
        for block in range(config.blocks + 1):
            shrunk = block == 0 and widths[min(level + 1, len(widths) - 1)] != widths[level]
            yield from _block(f"{ours}.blocks.{block}", f"{theirs}.resnets.{block}", shortcut=shrunk)
        if level:
            yield from _affine(f"{ours}.space.conv", f"{theirs}.upsamplers.0.conv")
    yield from _end("decoder")


def _block(ours: str, theirs: str, *, shortcut: bool) -> Iterator[Pair]:
    for part, number in (("first", 1), ("second", 2)):
        yield from _affine(f"{ours}.{part}.norm", f"{theirs}.norm{number}")
        yield from _conv(f"{ours}.{part}.conv", f"{theirs}.conv{number}")
    if shortcut:
        yield from _conv(f"{ours}.shortcut", f"{theirs}.conv_shortcut")


def _middle(config: ConvVaeConfig, side: str) -> Iterator[Pair]:
    for block in range(2):
        yield from _block(f"{side}.middle.blocks.{block}", f"{side}.mid_block.resnets.{block}", shortcut=False)
    if config.attention:
        ours, theirs = f"{side}.middle.attention", f"{side}.mid_block.attentions.0"
        yield from _affine(f"{ours}.norm", f"{theirs}.group_norm")
        yield from _affine(f"{ours}.out", f"{theirs}.to_out.0")
        for name in ("weight", "bias"):
            yield stacked(f"{ours}.qkv.{name}", [f"{theirs}.to_{part}.{name}" for part in "qkv"])


def _end(side: str) -> Iterator[Pair]:
    yield from _affine(f"{side}.out.norm", f"{side}.conv_norm_out")
    yield from _conv(f"{side}.out.conv", f"{side}.conv_out")


def _affine(ours: str, theirs: str) -> Iterator[Pair]:
    for name in ("weight", "bias"):
        yield same(f"{ours}.{name}", f"{theirs}.{name}")


def _conv(ours: str, theirs: str) -> Iterator[Pair]:
    """Pair a convolution of one frame with one of images."""
    yield reshaped(f"{ours}.weight", f"{theirs}.weight", lambda x: x.unsqueeze(2), lambda x: x.squeeze(2))
    yield same(f"{ours}.bias", f"{theirs}.bias")
