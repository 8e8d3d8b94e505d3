"""Class-conditional image transformers to and from ``Dit``: diffusers' ``DiTTransformer2DModel``, and the original
layouts of DiT, SiT and LightningDiT, whose checkpoints hold no configuration: it is read off the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ltd.config import ConfigError
from ltd.denoisers import DitConfig
from ltd.diffusion import ParametrizationConfig
from ltd.diffusion.paths import VpPathConfig
from ltd.diffusion.prediction import NoisePredictionConfig
from ltd.interop.mapping import Pair, copies, heads_apart, negated, qkv_rotated, reshaped, same, stacked
from ltd.interop.reading import check_settings
from ltd.interop.wan_dit import check_same
from ltd.nn.embed import grid_sinusoid
from ltd.nn.patch import grid_positions

CLASS_NAME = "DiTTransformer2DModel"
#: Attention heads of the published widths.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
ORIGINALS = ("dit", "sit", "lightning_dit")
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
    "dropout": 0.0,
    "norm_num_groups": 32,  # of images in pixels, which a DiT never meets
}
#: Settings that an original layout has besides its tensors, as our exports write them.
_SETTINGS: dict[str, Any] = {"layout": "", "num_heads": 1, "use_rope": True}


def parametrization(layout: str) -> ParametrizationConfig:
    """Say what a layout's networks predict: noise of DDPM's linear schedule, or velocities of the linear path."""
    if layout in ("sit", "lightning_dit"):
        return ParametrizationConfig()
    return ParametrizationConfig(path=VpPathConfig(), prediction=NoisePredictionConfig())


def to_config(theirs: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DitConfig:
    """Read the configuration of diffusers.

    Args:
        theirs: Contents of ``config.json``.
        tensors: Their tensors: they tell whether all blocks embed time and label alike.

    Returns:
        Our configuration.

    Raises:
        ConfigError: If a setting has no counterpart; names it.
    """
    check_settings(theirs, _DEFAULTS, CLASS_NAME, ("out_channels", "num_embeds_ada_norm"))
    tree = _DEFAULTS | dict(theirs)
    for name, needed in (
        ("activation_fn", "gelu-approximate"),
        ("norm_type", "ada_norm_zero"),
        ("norm_elementwise_affine", False),
        ("upcast_attention", False),
        ("dropout", 0.0),
    ):
        if tree[name] != needed:
            raise ConfigError(f"{CLASS_NAME}.{name}: got {tree[name]}, only {needed} can be converted")
    channels = tree["in_channels"]
    out = tree["out_channels"] or channels
    if out not in (channels, 2 * channels):
        raise ConfigError(f"{CLASS_NAME}.out_channels: got {out}, needed in_channels = {channels}, or twice that")
    if not tree["num_embeds_ada_norm"]:
        raise ConfigError(f"{CLASS_NAME}.num_embeds_ada_norm: got {tree['num_embeds_ada_norm']}, needed 1 or more")
    return DitConfig(
        **_shared(tree["num_attention_heads"] * tree["attention_head_dim"], tree["num_attention_heads"]),
        latent_channels=channels,
        patch=(1, tree["patch_size"], tree["patch_size"]),
        depth=tree["num_layers"],
        qkv_bias=tree["attention_bias"],
        mlp_norm_eps=tree["norm_eps"],
        num_classes=tree["num_embeds_ada_norm"],
        position_base=tree["sample_size"] // tree["patch_size"],
        learn_sigma=out != channels,
        embed_per_block=not _blocks_embed_alike(tensors),
        time_feature_shift=1,
        rotary=False,
    )


def _shared(width: int, num_heads: int) -> dict[str, Any]:
    """List what DiT, SiT and diffusers' DiT have in common."""
    return {
        "width": width,
        "num_heads": num_heads,
        "norm": "layer",
        "mlp": "gelu",
        "mlp_width": 4 * width,
        "qk_norm": False,
        "position_embedding": "sincos_2d",
    }


def from_config(config: DitConfig) -> dict[str, Any]:
    """Write the configuration of diffusers.

    Args:
        config: Ours.

    Returns:
        Contents of ``config.json``.

    Raises:
        ConfigError: If the model is not of their architecture; names the field.
    """
    side = config.patch[1]
    tree = {
        "_class_name": CLASS_NAME,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.latent_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "attention_bias": config.qkv_bias,
        "sample_size": (config.position_base or 0) * side,
        "patch_size": side,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": config.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": config.norm_eps if config.mlp_norm_eps is None else config.mlp_norm_eps,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "upcast_attention": False,
    }
    if config.num_classes is None or config.position_base is None:
        raise ConfigError(f"num_classes, position_base: got null, {CLASS_NAME} needs classes and a size")
    alike = {} if not config.embed_per_block else {"transformer_blocks.0.norm1.emb.x": torch.zeros(1)}
    read_back = to_config(tree, alike | ({"transformer_blocks.1.norm1.emb.x": torch.ones(1)} if alike else {}))
    check_same(config, read_back, CLASS_NAME)
    return tree


def pairs(config: DitConfig) -> list[Pair]:
    """List the tensors of one configuration in the layout of diffusers."""
    found = [*_patch("pos_embed.proj", config)]
    blocks = [f"transformer_blocks.{index}" for index in range(config.depth)]
    embedders = (
        ("time_embedding.input", "timestep_embedder.linear_1", ("weight", "bias")),
        ("time_embedding.output", "timestep_embedder.linear_2", ("weight", "bias")),
        ("label_embedding.table", "class_embedder.embedding_table", ("weight",)),
    )
    for ours, theirs, kinds in embedders:
        for kind in kinds:
            names = [f"{block}.norm1.emb.{theirs}.{kind}" for block in blocks]
            if config.embed_per_block:
                found += [same(f"block_embeddings.{i}.{ours}.{kind}", name) for i, name in enumerate(names)]
            else:
                found.append(copies(f"{ours}.{kind}", names))
    for index, block in enumerate(blocks):
        own = f"blocks.{index}"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            names = [f"{block}.attn1.{name}.{kind}" for name in ("to_q", "to_k", "to_v")]
            found.append(stacked(f"{own}.attention.qkv.{kind}", names))
        parts = {"attention.out": "attn1.to_out.0", "mlp.input": "ff.net.0.proj", "mlp.out": "ff.net.2"}
        for ours, theirs in {**parts, "modulation.linear": "norm1.linear"}.items():
            found += [same(f"{own}.{ours}.{kind}", f"{block}.{theirs}.{kind}") for kind in ("weight", "bias")]
    for ours, theirs in (("final.modulation.linear", "proj_out_1"), ("final.linear", "proj_out_2")):
        found += [same(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]
    return found


def merge_settings(
    layout: str, written: Mapping[str, Any] | None, given: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Put together what is said of an original checkpoint and what its own ``config.json`` says.

    Args:
        layout: ``dit``, ``sit`` or ``lightning_dit``.
        written: Contents of a ``config.json`` that names its layout, as our exports have it; None where there is none.
        given: ``num_heads``, ``use_rope``.
        source: Where ``written`` is from, for the message.

    Returns:
        The settings.

    Raises:
        ConfigError: If a setting is unknown or of the wrong type, or the two contradict each other.
    """
    check_settings(given, {name: _SETTINGS[name] for name in ("num_heads", "use_rope")}, "settings")
    if written is None:
        return dict(given)
    check_settings(written, _SETTINGS, source)
    for name, value in {"layout": layout, **given}.items():
        if name in written and written[name] != value:
            raise ConfigError(f"{name}: got {value}, {source} says {written[name]}")
    return {**given, **{name: value for name, value in written.items() if name in ("num_heads", "use_rope")}}


def original_config(layout: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> DitConfig:
    """Read the configuration off the tensors of an original checkpoint.

    Args:
        layout: ``dit``, ``sit`` or ``lightning_dit``.
        tensors: Of the checkpoint.
        settings: ``num_heads``, where the width is not a published one.

    Returns:
        Our configuration.

    Raises:
        ConfigError: If tensors that tell it are missing, or the number of heads is unknown.
    """
    try:
        patch = tensors["x_embedder.proj.weight"]
        width, channels, side = patch.shape[0], patch.shape[1], patch.shape[2]
        out = tensors["final_layer.linear.bias"].shape[0] // side**2
        classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
        features = tensors["t_embedder.mlp.0.weight"].shape[1]
        swiglu = "blocks.0.mlp.w12.weight" in tensors
        hidden = tensors["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
        modulation = tensors["blocks.0.adaLN_modulation.1.weight"].shape[0]
        grid = math.isqrt(tensors["pos_embed"].shape[1])
    except (KeyError, IndexError) as error:
        raise ConfigError(f"tensors are not of a {layout} checkpoint: {error} is missing or misshapen") from None
    num_heads = settings.get("num_heads", _HEADS.get(width))
    if num_heads is None:
        raise ConfigError(
            f"num_heads: cannot be read off a width of {width}, which is no published one; say it with "
            "--num-heads (in code: settings)"
        )
    if modulation != 6 * width:
        raise ConfigError(
            f"blocks.0.adaLN_modulation.1.weight: got {modulation} rows, only shift, scale and gate of both branches "
            f"({6 * width}) can be converted"
        )
    options = _shared(width, num_heads) | {"mlp_width": hidden, "mlp": "swiglu" if swiglu else "gelu"}
    rotary = layout == "lightning_dit" and settings.get("use_rope", True)
    if rotary:
        half = width // num_heads // 2
        options |= {"rope_split": (0, half, half)}
    if "blocks.0.norm1.weight" in tensors:
        options |= {"norm": "rms", "norm_weight": True}
    return DitConfig(
        **options | {"qk_norm": "blocks.0.attn.q_norm.weight" in tensors},
        latent_channels=channels,
        patch=(1, side, side),
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        num_classes=classes,
        position_base=grid,
        learn_sigma=out == 2 * channels,
        time_features=features,
        time_scale=1000.0 if layout == "dit" else 1.0,
        time_direction="noise" if layout == "dit" else "data",
        rotary=rotary,
    )


def check_original(layout: str, config: DitConfig) -> None:
    """Refuse a configuration that an original layout cannot hold.

    Args:
        layout: ``dit``, ``sit`` or ``lightning_dit``.
        config: Ours.

    Raises:
        ConfigError: Names the field.
    """
    if config.num_classes is None or config.position_base is None:
        raise ConfigError(f"num_classes, position_base: got null, {layout} needs classes and a size")
    shapes = {name: torch.empty(shape) for name, shape in _told_by(config).items()}
    read_back = original_config(layout, shapes, {"num_heads": config.num_heads, "use_rope": config.rotary})
    check_same(config, read_back, layout)


def _told_by(config: DitConfig) -> dict[str, tuple[int, ...]]:
    """List the tensors that tell a configuration, with no numbers in them."""
    side, width = config.patch[1], config.width
    swiglu = config.mlp == "swiglu"
    last = "w3" if swiglu else "fc2"
    told: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, config.latent_channels, side, side),
        "final_layer.linear.bias": (config.out_channels * side**2,),
        "y_embedder.embedding_table.weight": ((config.num_classes or 0) + 1, 0),
        "t_embedder.mlp.0.weight": (0, config.time_features),
        f"blocks.0.mlp.{last}.weight": (0, config.mlp_hidden),
        "blocks.0.adaLN_modulation.1.weight": (6 * width, 0),
        f"blocks.{config.depth - 1}.x": (0,),
        "pos_embed": (1, (config.position_base or 0) ** 2, 0),
    }
    told |= {"blocks.0.mlp.w12.weight": (0,)} if swiglu else {}
    told |= {"blocks.0.norm1.weight": (0,)} if config.norm_weight else {}
    return told | ({"blocks.0.attn.q_norm.weight": (0,)} if config.qk_norm else {})


def original_pairs(layout: str, config: DitConfig) -> list[Pair]:
    """List the tensors of one configuration in an original layout."""
    found = [*_patch("x_embedder.proj", config)]
    outer = {"time_embedding.input": "t_embedder.mlp.0", "time_embedding.output": "t_embedder.mlp.2"}
    for ours, theirs in {**outer, "final.modulation.linear": "final_layer.adaLN_modulation.1"}.items():
        found += [same(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]
    found.append(same("label_embedding.table.weight", "y_embedder.embedding_table.weight"))
    turned = same if layout == "dit" else negated  # their velocity points from noise to data
    found += [turned(f"final.linear.{kind}", f"final_layer.linear.{kind}") for kind in ("weight", "bias")]
    swiglu = config.mlp == "swiglu"
    parts = {"attention.out": "attn.proj", "modulation.linear": "adaLN_modulation.1"}
    parts |= {"mlp.input": "mlp.w12", "mlp.out": "mlp.w3"} if swiglu else {"mlp.input": "mlp.fc1", "mlp.out": "mlp.fc2"}
    for index in range(config.depth):
        own = f"blocks.{index}"
        for kind in ("weight", "bias"):
            ours, theirs = f"{own}.attention.qkv.{kind}", f"{own}.attn.qkv.{kind}"
            found.append(qkv_rotated(ours, [theirs], config.num_heads) if config.rotary else same(ours, theirs))
            found += [same(f"{own}.{ours}.{kind}", f"{own}.{theirs}.{kind}") for ours, theirs in parts.items()]
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            ours, theirs = f"{own}.attention.{name}.weight", f"{own}.attn.{name}.weight"
            found.append(heads_apart(ours, theirs, 1) if config.rotary else same(ours, theirs))
        for ours, theirs in (("attention_norm", "norm1"), ("mlp_norm", "norm2")) if config.norm_weight else ():
            found.append(same(f"{own}.{ours}.weight", f"{own}.{theirs}.weight"))
    if config.norm_weight:
        found.append(same("final.norm.weight", "final_layer.norm_final.weight"))
    return found


def constants(config: DitConfig) -> dict[str, Tensor]:
    """Compute what an original checkpoint holds besides weights: the positions of its square grid."""
    side = config.position_base or 0
    positions = grid_positions((1, side, side))
    found = {"pos_embed": grid_sinusoid(positions, config.width)}
    if config.rotary:
        part = config.head_dim // 2
        steps = 1.0 / 10_000.0 ** (torch.arange(0, part, 2).float() / part)
        angles = torch.outer(torch.arange(side), steps).repeat_interleave(2, -1)
        rows = angles[:, None].expand(side, side, -1)
        joint = torch.cat((rows, rows.transpose(0, 1)), -1).flatten(0, 1)
        found |= {"feat_rope.freqs_cos": joint.cos(), "feat_rope.freqs_sin": joint.sin()}
    return found


def without_constants(config: DitConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take what is no weight out of an original checkpoint, once it is seen to be what it must be.

    Args:
        config: Ours.
        tensors: Of the checkpoint.

    Returns:
        The weights.

    Raises:
        ConfigError: If positions are missing or others; names the tensor.
    """
    expected = constants(config)
    for name, value in expected.items():
        got = tensors.get(name)
        tolerance = 1e-4 if got is not None and got.dtype in (torch.float32, torch.float64) else 1e-2
        if got is None or got.shape != value.shape or not torch.allclose(got.float(), value, atol=tolerance):
            raise ConfigError(f"{name}: is missing, or other than the fixed positions of a square grid")
    return {name: value for name, value in tensors.items() if name not in expected}


def _patch(theirs: str, config: DitConfig) -> Iterator[Pair]:
    side = config.patch[1]
    yield reshaped(
        "patch_embedding.weight",
        f"{theirs}.weight",
        lambda x: rearrange(x, "d c h w -> d (h w c)"),
        lambda x: rearrange(x, "d (h w c) -> d c h w", h=side, w=side),
    )
    yield same("patch_embedding.bias", f"{theirs}.bias")


def _blocks_embed_alike(tensors: Mapping[str, Tensor]) -> bool:
    """Say whether the embeddings of time and label are the same numbers in every block."""
    first = {name: value for name, value in tensors.items() if name.startswith("transformer_blocks.0.norm1.emb.")}
    for name, value in tensors.items():
        _, found, rest = name.partition(".norm1.emb.")
        if found and not torch.equal(value, first.get(f"transformer_blocks.0.norm1.emb.{rest}", value)):
            return False
    return True
