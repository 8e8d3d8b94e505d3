"""Wan's transformer to and from ``Dit``: the layout of diffusers' ``WanTransformer3DModel``, and the original one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

from ltd.config import ConfigError
from ltd.denoisers import DitConfig
from ltd.interop.mapping import Pair, heads_apart, qkv_rotated, reshaped, same, stacked
from ltd.interop.reading import check_settings

CLASS_NAME = "WanTransformer3DModel"
ORIGINAL_CLASS_NAME = "WanModel"
_DEFAULTS: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
_MODEL_TYPES = ("t2v", "i2v", "flf2v", "ti2v")
_ORIGINAL_DEFAULTS: dict[str, Any] = {
    "model_type": "t2v",
    "patch_size": [1, 2, 2],
    "text_len": 512,
    "in_dim": 16,
    "dim": 2048,
    "ffn_dim": 8192,
    "freq_dim": 256,
    "text_dim": 4096,
    "out_dim": 16,
    "num_heads": 16,
    "num_layers": 32,
    "window_size": [-1, -1],
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
_IMAGE_DIM = 1280
_TEXT_LENGTH = 512


@dataclass(frozen=True)
class _Names:
    """What a layout calls the parts."""

    time: tuple[str, str, str]
    text: tuple[str, str]
    image: tuple[str, str, str, str]
    image_positions: str
    attention: str
    cross: str
    products: tuple[str, str, str, str]
    image_products: tuple[str, str]
    norms: tuple[str, str, str]
    cross_norm: str
    mlp: tuple[str, str]
    table: str
    final: tuple[str, str]


_DIFFUSERS = _Names(
    time=(
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_2",
        "condition_embedder.time_proj",
    ),
    text=("condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.linear_2"),
    image=(
        "condition_embedder.image_embedder.norm1",
        "condition_embedder.image_embedder.ff.net.0.proj",
        "condition_embedder.image_embedder.ff.net.2",
        "condition_embedder.image_embedder.norm2",
    ),
    image_positions="condition_embedder.image_embedder.pos_embed",
    attention="attn1",
    cross="attn2",
    products=("to_q", "to_k", "to_v", "to_out.0"),
    image_products=("add_k_proj", "add_v_proj"),
    norms=("norm_q", "norm_k", "norm_added_k"),
    cross_norm="norm2",
    mlp=("ffn.net.0.proj", "ffn.net.2"),
    table="scale_shift_table",
    final=("scale_shift_table", "proj_out"),
)
_ORIGINAL = _Names(
    time=("time_embedding.0", "time_embedding.2", "time_projection.1"),
    text=("text_embedding.0", "text_embedding.2"),
    image=("img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3", "img_emb.proj.4"),
    image_positions="img_emb.emb_pos",
    attention="self_attn",
    cross="cross_attn",
    products=("q", "k", "v", "o"),
    image_products=("k_img", "v_img"),
    norms=("norm_q", "norm_k", "norm_k_img"),
    cross_norm="norm3",
    mlp=("ffn.0", "ffn.2"),
    table="modulation",
    final=("head.modulation", "head.head"),
)


def to_config(theirs: Mapping[str, Any]) -> DitConfig:
    """Read the configuration of diffusers or the original one.

    Args:
        theirs: Contents of ``config.json``.

    Returns:
        Our configuration.

    Raises:
        ConfigError: If a setting has no counterpart; names it.
    """
    if theirs.get("_class_name") == ORIGINAL_CLASS_NAME:
        theirs = _from_original(theirs)
    check_settings(theirs, _DEFAULTS, CLASS_NAME, ("out_channels", "qk_norm"))
    tree = _DEFAULTS | dict(theirs)
    width = tree["num_attention_heads"] * tree["attention_head_dim"]
    out = tree["out_channels"] or tree["in_channels"]
    beside = tree["in_channels"] - out
    for name, needed in (
        ("qk_norm", ["rms_norm_across_heads"]),
        ("added_kv_proj_dim", [width] if tree["image_dim"] else [None]),
    ):
        if tree[name] not in needed:
            raise ConfigError(f"{CLASS_NAME}.{name}: got {tree[name]}, only {needed[0]} can be converted")
    if beside and beside <= out:
        raise ConfigError(
            f"{CLASS_NAME}.in_channels: got {tree['in_channels']} for out_channels = {out}, needed as many, or more "
            "than twice as many: those of known latents and of their mask"
        )
    return DitConfig(
        latent_channels=out,
        patch=tuple(tree["patch_size"]),
        width=width,
        depth=tree["num_layers"],
        num_heads=tree["num_attention_heads"],
        norm="layer",
        norm_eps=tree["eps"],
        mlp="gelu",
        mlp_width=tree["ffn_dim"],
        qk_norm_over="width",
        text_dim=tree["text_dim"],
        text_norm=False,
        text_length=_TEXT_LENGTH,
        cross_norm="layer" if tree["cross_attn_norm"] else "none",
        frames="channels" if beside else "none",
        frame_mask_channels=beside - out if beside else 1,
        image_dim=tree["image_dim"],
        image_positions=tree["pos_embed_seq_len"],
        position_embedding="none",
        modulation="shared",
        final_modulation="table",
        time_features=tree["freq_dim"],
    )


def from_config(config: DitConfig) -> dict[str, Any]:
    """Write the configuration of diffusers.

    Args:
        config: Ours.

    Returns:
        Contents of ``config.json``.

    Raises:
        ConfigError: If the model is not of their architecture; names the field.
    """
    tree = {
        "_class_name": CLASS_NAME,
        "patch_size": list(config.patch),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.latent_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.time_features,
        "ffn_dim": config.mlp_hidden,
        "num_layers": config.depth,
        "cross_attn_norm": config.cross_norm == "layer",
        "qk_norm": "rms_norm_across_heads",
        "eps": config.norm_eps,
        "image_dim": config.image_dim,
        "added_kv_proj_dim": config.width if config.image_dim else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": config.image_positions,
    }
    if config.text_dim is None:
        raise ConfigError(f"text_dim: got null, {CLASS_NAME} needs text")
    check_same(config, to_config(tree), CLASS_NAME)
    return tree


def original_config(config: DitConfig) -> dict[str, Any]:
    """Write the original configuration.

    Args:
        config: Ours.

    Returns:
        Contents of ``config.json``.

    Raises:
        ConfigError: If the model is not of their architecture; names the field.
    """
    from_config(config)
    if config.image_dim not in (None, _IMAGE_DIM):
        raise ConfigError(f"image_dim: got {config.image_dim}, {ORIGINAL_CLASS_NAME} needs {_IMAGE_DIM}")
    kind = "t2v" if config.image_dim is None else ("i2v" if config.image_positions is None else "flf2v")
    return {
        "_class_name": ORIGINAL_CLASS_NAME,
        "model_type": kind,
        "patch_size": list(config.patch),
        "text_len": config.text_length,
        "in_dim": config.in_channels,
        "dim": config.width,
        "ffn_dim": config.mlp_hidden,
        "freq_dim": config.time_features,
        "text_dim": config.text_dim,
        "out_dim": config.latent_channels,
        "num_heads": config.num_heads,
        "num_layers": config.depth,
        "window_size": [-1, -1],
        "qk_norm": True,
        "cross_attn_norm": config.cross_norm == "layer",
        "eps": config.norm_eps,
    }


def _from_original(theirs: Mapping[str, Any]) -> dict[str, Any]:
    check_settings(theirs, _ORIGINAL_DEFAULTS, ORIGINAL_CLASS_NAME)
    tree = _ORIGINAL_DEFAULTS | dict(theirs)
    if tree["model_type"] not in _MODEL_TYPES:
        raise ConfigError(
            f"{ORIGINAL_CLASS_NAME}.model_type: got {tree['model_type']}, needed one of {', '.join(_MODEL_TYPES)}"
        )
    for name, needed in (("qk_norm", True), ("text_len", _TEXT_LENGTH), ("window_size", [-1, -1])):
        got = list(tree[name]) if isinstance(needed, list) else tree[name]
        if got != needed:
            raise ConfigError(f"{ORIGINAL_CLASS_NAME}.{name}: got {got}, only {needed} can be converted")
    image = tree["model_type"] in ("i2v", "flf2v")
    return {
        "patch_size": tree["patch_size"],
        "num_attention_heads": tree["num_heads"],
        "attention_head_dim": tree["dim"] // tree["num_heads"],
        "in_channels": tree["in_dim"],
        "out_channels": tree["out_dim"],
        "text_dim": tree["text_dim"],
        "freq_dim": tree["freq_dim"],
        "ffn_dim": tree["ffn_dim"],
        "num_layers": tree["num_layers"],
        "cross_attn_norm": tree["cross_attn_norm"],
        "eps": tree["eps"],
        "image_dim": _IMAGE_DIM if image else None,
        "added_kv_proj_dim": tree["dim"] if image else None,
        "pos_embed_seq_len": 514 if tree["model_type"] == "flf2v" else None,
    }


def check_same(ours: DitConfig, read_back: DitConfig, name: str) -> None:
    """Refuse a configuration of ours that their configuration does not describe.

    Args:
        ours: To be exported.
        read_back: What import makes of the exported configuration.
        name: Of their class.

    Raises:
        ConfigError: Names the first field that differs.
    """
    for field, needed in vars(read_back).items():
        got = getattr(ours, field)
        if field in ("mlp_width", "mlp_ratio", "mlp_multiple"):
            got, needed = ours.mlp_hidden, read_back.mlp_hidden
        elif field == "rope_split" and ours.rotary:
            got, needed = ours.head_split, read_back.head_split
        if field == "frames" and {got, needed} == {"none", "times"}:
            continue  # what the weights were trained with; nothing of theirs says it
        if got != needed:
            raise ConfigError(f"{field}: got {got}, {name} needs {needed}")


def pairs(config: DitConfig, *, original: bool = False) -> list[Pair]:
    """List the tensors of one configuration on both sides, in the layout of diffusers or the original one."""
    names = _ORIGINAL if original else _DIFFUSERS
    found = [*_outer(config, names)]
    for index in range(config.depth):
        found += _block(config, f"blocks.{index}", names)
    return found


def _outer(config: DitConfig, names: _Names) -> Iterator[Pair]:
    yield reshaped(
        "patch_embedding.weight",
        "patch_embedding.weight",
        lambda x: rearrange(x, "d c t h w -> d (t h w c)"),
        lambda x: _unpatch(x, config.patch),
    )
    yield same("patch_embedding.bias", "patch_embedding.bias")
    ours = ("time_embedding.input", "time_embedding.output", "modulation")
    yield from _affines(zip(ours, names.time, strict=True))
    yield from _affines(zip(("text_embedding.input", "text_embedding.output"), names.text, strict=True))
    if config.image_dim is not None:
        parts = [f"image_embedding.{name}" for name in ("norm", "input", "output", "out_norm")]
        yield from _affines(zip(parts, names.image, strict=True))
    if config.image_positions is not None:
        yield reshaped("image_embedding.positions", names.image_positions, lambda x: x[0], lambda x: x[None])
    yield _table("final.modulation.table", names.final[0], 2)
    yield from _affines([("final.linear", names.final[1])])


def _block(config: DitConfig, block: str, names: _Names) -> Iterator[Pair]:
    theirs = f"{block}.{names.attention}"
    for kind in ("weight", "bias"):
        parts = [f"{theirs}.{name}.{kind}" for name in names.products[:3]]
        yield qkv_rotated(f"{block}.attention.qkv.{kind}", parts, config.num_heads)
    for ours, name in (("q_norm", names.norms[0]), ("k_norm", names.norms[1])):
        yield heads_apart(f"{block}.attention.{ours}.weight", f"{theirs}.{name}.weight", config.num_heads)
    yield from _affines([(f"{block}.attention.out", f"{theirs}.{names.products[3]}")])
    theirs, own = f"{block}.{names.cross}", f"{block}.cross_attention"
    yield from _affines(
        [(f"{own}.q", f"{theirs}.{names.products[0]}"), (f"{own}.out", f"{theirs}.{names.products[3]}")]
    )
    for kind in ("weight", "bias"):
        yield stacked(f"{own}.kv.{kind}", [f"{theirs}.{name}.{kind}" for name in names.products[1:3]])
    norms = [("q_norm", names.norms[0]), ("k_norm", names.norms[1])]
    if config.image_dim is not None:
        norms.append(("image_k_norm", names.norms[2]))
        for kind in ("weight", "bias"):
            yield stacked(f"{own}.image_kv.{kind}", [f"{theirs}.{name}.{kind}" for name in names.image_products])
    for ours, name in norms:
        yield same(f"{own}.{ours}.weight", f"{theirs}.{name}.weight")
    if config.cross_norm == "layer":
        yield from _affines([(f"{block}.cross_norm", f"{block}.{names.cross_norm}")])
    yield from _affines(
        zip((f"{block}.mlp.input", f"{block}.mlp.out"), (f"{block}.{n}" for n in names.mlp), strict=True)
    )
    yield _table(f"{block}.modulation.table", f"{block}.{names.table}", 6)


def _affines(parts: Any) -> Iterator[Pair]:
    for ours, theirs in parts:
        for kind in ("weight", "bias"):
            yield same(f"{ours}.{kind}", f"{theirs}.{kind}")


def _table(ours: str, theirs: str, rows: int) -> Pair:
    return reshaped(ours, theirs, lambda x: x.flatten(), lambda x: x.unflatten(0, (1, rows, -1)))


def _unpatch(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    return rearrange(x, "d (t h w c) -> d c t h w", t=patch[0], h=patch[1], w=patch[2])
