"""diffusers' ``AutoencoderKLWan`` (Wan 2.1 and 2.2) to and from ``ConvVae``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from ltd.autoencoders import ConvVaeConfig
from ltd.config import ConfigError
from ltd.interop.mapping import Pair, reshaped, same
from ltd.interop.reading import check_settings

CLASS_NAME = "AutoencoderKLWan"
_DEFAULTS: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
}
#: Checked where they are used, or told by the other settings.
_ELSEWHERE = dict.fromkeys(
    ("dim_mult", "attn_scales", "temperal_downsample", "latents_mean", "latents_std")
    + ("scale_factor_temporal", "scale_factor_spatial"),
    ...,
)


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
    patch = tree["patch_size"] or 1
    folded = tree["in_channels"]
    for name, needed in (("attn_scales", []), ("dropout", 0), ("out_channels", folded)):
        if tree[name] != needed:
            raise ConfigError(f"{CLASS_NAME}.{name}: got {tree[name]}, only {needed} can be converted")
    for name, kind, words in (("dim_mult", int, "whole numbers"), ("temperal_downsample", bool, "true and false")):
        if not isinstance(tree[name], list | tuple) or any(type(each) is not kind for each in tree[name]):
            raise ConfigError(f"{CLASS_NAME}.{name}: got {tree[name]!r}, needed a list of {words}")
    if folded % patch**2:
        raise ConfigError(f"{CLASS_NAME}.in_channels: got {folded}, needed a multiple of patch_size^2 = {patch**2}")
    return ConvVaeConfig(
        in_channels=folded // patch**2,
        latent_channels=tree["z_dim"],
        patch=patch,
        encoder_width=tree["base_dim"],
        decoder_width=tree["decoder_base_dim"] or tree["base_dim"],
        multipliers=tuple(tree["dim_mult"]),
        blocks=tree["num_res_blocks"],
        halve_time=tuple(tree["temperal_downsample"][: len(tree["dim_mult"]) - 1]),
        shortcuts=tree["is_residual"],
        odd_sizes="refuse" if tree["is_residual"] or patch > 1 else "crop",
        clamp=True,
    )


def from_config(config: ConvVaeConfig, mean: list[float], std: list[float]) -> dict[str, Any]:
    """Write their configuration.

    Args:
        config: Ours.
        mean: Mean of each latent channel.
        std: Standard deviation of each latent channel.

    Returns:
        Contents of ``config.json``.

    Raises:
        ConfigError: If the model is not of their architecture; names the field.
    """
    needed = {
        "attention": True,
        "norm": "rms",
        "temporal_kernel": 3,
        "front": "zeros",
        "narrow_before": True,
        "quant_conv": True,
        "post_quant_conv": True,
        "conditional_norm": False,
    }
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ConfigError(f"{name}: got {getattr(config, name)}, {CLASS_NAME} needs {value}")
    folded = config.in_channels * config.patch**2
    return {
        "_class_name": CLASS_NAME,
        "base_dim": config.encoder_width,
        "decoder_base_dim": config.decoder_width,
        "z_dim": config.latent_channels,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.halve_time),
        "dropout": 0.0,
        "latents_mean": mean,
        "latents_std": std,
        "is_residual": config.shortcuts,
        "in_channels": folded,
        "out_channels": folded,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_temporal": config.compression.t,
        "scale_factor_spatial": config.compression.h,
    }


def pairs(config: ConvVaeConfig) -> list[Pair]:
    """List the tensors of one configuration on both sides."""
    return [*_encoder(config), *_decoder(config)]


def _encoder(config: ConvVaeConfig) -> Iterator[Pair]:
    p, levels = config.patch, len(config.multipliers)
    yield reshaped(
        "encoder.conv_in.weight",
        "encoder.conv_in.weight",
        lambda x: _swap(x.movedim(1, 0), p).movedim(0, 1),
        lambda x: _swap(x.movedim(1, 0), p).movedim(0, 1),
    )
    yield same("encoder.conv_in.bias", "encoder.conv_in.bias")
    flat = 0
    for level in range(levels):
        ours = f"encoder.levels.{level}"
        for block in range(config.blocks):
            theirs = f"down_blocks.{level}.resnets.{block}" if config.shortcuts else f"down_blocks.{flat}"
            flat += 1
            fits = config.encoder_width * config.multipliers[max(level - 1, 0) if block == 0 else level]
            yield from _block(
                f"{ours}.blocks.{block}", f"encoder.{theirs}", shortcut=fits != config.widths("encoder")[level]
            )
        if level < levels - 1:
            theirs = f"down_blocks.{level}.downsampler" if config.shortcuts else f"down_blocks.{flat}"
            flat += 1
            yield from _resample(ours, f"encoder.{theirs}", time=config.halve_time[level])
    yield from _middle("encoder")
    yield from _end("encoder", "encoder.quant_conv", "quant_conv", patch=1)


def _decoder(config: ConvVaeConfig) -> Iterator[Pair]:
    levels = len(config.multipliers)
    yield from _affine("decoder.post_quant_conv", "post_quant_conv")
    yield from _affine("decoder.conv_in", "decoder.conv_in")
    yield from _middle("decoder")
    width = config.widths("decoder")[-1]
    for index, level in enumerate(reversed(range(levels))):
        out = config.widths("decoder")[level]
        ours, theirs = f"decoder.levels.{index}", f"decoder.up_blocks.{index}"
        for block in range(config.blocks + 1):
            yield from _block(
                f"{ours}.blocks.{block}", f"{theirs}.resnets.{block}", shortcut=block == 0 and width != out
            )
        width = out if config.shortcuts or not level else out // 2
        if level:
            sampler = f"{theirs}.upsampler" if config.shortcuts else f"{theirs}.upsamplers.0"
            yield from _resample(ours, sampler, time=config.halve_time[level - 1])
    yield from _end("decoder", None, None, patch=config.patch)


def _block(ours: str, theirs: str, *, shortcut: bool) -> Iterator[Pair]:
    for part, number in (("first", 1), ("second", 2)):
        yield _gamma(f"{ours}.{part}.norm.weight", f"{theirs}.norm{number}.gamma")
        yield from _affine(f"{ours}.{part}.conv", f"{theirs}.conv{number}")
    if shortcut:
        yield from _affine(f"{ours}.shortcut", f"{theirs}.conv_shortcut")


def _middle(side: str) -> Iterator[Pair]:
    for block in range(2):
        yield from _block(f"{side}.middle.blocks.{block}", f"{side}.mid_block.resnets.{block}", shortcut=False)
    ours, theirs = f"{side}.middle.attention", f"{side}.mid_block.attentions.0"
    yield reshaped(f"{ours}.norm.weight", f"{theirs}.norm.gamma", lambda x: x[:, 0, 0], lambda x: x[:, None, None])
    for name, other in (("qkv", "to_qkv"), ("out", "proj")):
        yield reshaped(
            f"{ours}.{name}.weight", f"{theirs}.{other}.weight", lambda x: x[:, :, 0, 0], lambda x: x[:, :, None, None]
        )
        yield same(f"{ours}.{name}.bias", f"{theirs}.{other}.bias")


def _resample(ours: str, theirs: str, *, time: bool) -> Iterator[Pair]:
    yield from _affine(f"{ours}.space.conv", f"{theirs}.resample.1")
    if time:
        yield from _affine(f"{ours}.time.conv", f"{theirs}.time_conv")


def _end(side: str, ours_quant: str | None, theirs_quant: str | None, *, patch: int) -> Iterator[Pair]:
    yield _gamma(f"{side}.out.norm.weight", f"{side}.norm_out.gamma")
    for name in ("weight", "bias"):
        yield reshaped(
            f"{side}.out.conv.{name}", f"{side}.conv_out.{name}", lambda x: _swap(x, patch), lambda x: _swap(x, patch)
        )
    if ours_quant is not None and theirs_quant is not None:
        yield from _affine(ours_quant, theirs_quant)


def _affine(ours: str, theirs: str) -> Iterator[Pair]:
    for name in ("weight", "bias"):
        yield same(f"{ours}.{name}", f"{theirs}.{name}")


def _gamma(ours: str, theirs: str) -> Pair:
    return reshaped(ours, theirs, lambda x: x[:, 0, 0, 0], lambda x: x[:, None, None, None])


def _swap(x: Tensor, patch: int) -> Tensor:
    """Exchange the two axes of folded pixels: theirs run (c, w, h), ours (c, h, w)."""
    return x if patch == 1 else rearrange(x, "(c p q) ... -> (c q p) ...", p=patch, q=patch)
