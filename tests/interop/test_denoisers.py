"""Public denoisers against ours: outputs, both directions, and what is refused. All weights are redrawn."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltd import denoisers
from ltd.config import ConfigError
from ltd.denoisers import Conditioning, Dit, DitConfig, Frames, Parametrized
from ltd.interop import export_denoiser, import_denoiser
from ltd.interop.mapping import to_theirs
from ltd.interop.wan_dit import pairs as wan_pairs
from tools.proofs._original_dit import original_output, original_state

WAN: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
WAN |= {"text_dim": 12, "freq_dim": 32, "ffn_dim": 40, "num_layers": 2}
IMAGE = {"image_dim": 20, "added_kv_proj_dim": 32}
CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "wan t2v": (WanTransformer3DModel, WAN),
    "wan t2v, three heads of 12, other patch": (
        WanTransformer3DModel,
        {**WAN, "num_attention_heads": 3, "attention_head_dim": 12, "patch_size": (2, 1, 3), "cross_attn_norm": False},
    ),
    "wan i2v": (WanTransformer3DModel, {**WAN, **IMAGE, "in_channels": 12}),
    "wan first and last frame": (WanTransformer3DModel, {**WAN, **IMAGE, "in_channels": 12, "pos_embed_seq_len": 6}),
    "wan 2.2 i2v": (WanTransformer3DModel, {**WAN, "in_channels": 12}),
    "dit": (
        DiTTransformer2DModel,
        {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "sample_size": 8}
        | {"num_embeds_ada_norm": 10, "out_channels": 8},
    ),
    "dit without bias or variance": (
        DiTTransformer2DModel,
        {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 6, "patch_size": 1}
        | {"num_embeds_ada_norm": 5, "attention_bias": False, "in_channels": 3, "norm_eps": 1e-3},
    ),
}


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            drawn = torch.randn(value.shape, generator=generator)
            fan_in = value[0].numel() if value.ndim > 1 else 1
            if "norm" in name and value.ndim == 1 and name.endswith("weight"):
                value.copy_(1 + 0.3 * drawn)
            elif "table" in name or ("modulation" in name and value.ndim == 3):
                value.copy_(0.5 * drawn)
            elif name.endswith("bias") or fan_in == 1:
                value.copy_(0.3 * drawn)
            else:
                value.copy_(drawn * 1.2 * fan_in**-0.5)
    return model.eval()


def build(name: str, seed: int = 0) -> nn.Module:
    kind, settings = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return redraw(kind(**settings), seed)


def saved(model: nn.Module, path: Path) -> Path:
    model.save_pretrained(path)  # type: ignore[operator]
    return path


def close(got: Tensor, expected: Tensor, limit: float = 1e-5) -> None:
    assert expected.std() >= 0.1
    assert (got - expected).abs().max() <= limit * expected.std(), float((got - expected).abs().max() / expected.std())


def conditions(model: nn.Module, rows: int, cells: tuple[int, int, int], seed: int = 3) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    text = torch.randn(rows, 7, config.text_dim, generator=generator)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])[:rows]
    frames = image = None
    if config.in_channels != config.out_channels:
        known = torch.randn(rows, config.out_channels, *cells, generator=generator)
        given = torch.rand(rows, config.in_channels - 2 * config.out_channels, *cells, generator=generator) < 0.5
        frames = Frames(known, given.float())
    if config.image_dim:
        image = torch.randn(rows, config.pos_embed_seq_len or 5, config.image_dim, generator=generator)
    return Conditioning(text=text, text_mask=mask, frames=frames, image=image)


def wan_output(model: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    assert cond.text is not None and cond.text_mask is not None
    text = torch.where(cond.text_mask[..., None], cond.text, 0)
    text = F.pad(text, (0, 0, 0, 512 - text.shape[1]))  # as WanPipeline pads
    if cond.frames is not None:
        x = torch.cat((x, cond.frames.mask, cond.frames.latents), 1)
    image = cond.image
    if image is not None and model.config.pos_embed_seq_len:  # type: ignore[union-attr]
        image = image.unflatten(1, (2, -1)).flatten(0, 1)  # first and last frame are rows of theirs
    return model(x, t * 1000, text, encoder_hidden_states_image=image, return_dict=False)[0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("wan")])
@torch.no_grad()
def test_wan_predicts_the_same_from_both_layouts_and_goes_back(name: str, seed: int, tmp_path: Path) -> None:
    model = build(name, seed)
    ours = import_denoiser(saved(model, tmp_path / "theirs"))
    assert isinstance(ours, Dit)
    for rows, cells in ((2, (2, 4, 6)), (1, (4, 6, 12))):
        x = torch.randn(rows, 4, *cells, generator=torch.Generator().manual_seed(seed))
        t, cond = torch.tensor([0.537, 0.25])[:rows], conditions(model, rows, cells)
        close(ours(x, t, cond), wan_output(model, x, t, cond))
    export_denoiser(ours, tmp_path / "back")
    again = type(model).from_pretrained(tmp_path / "back")  # type: ignore[attr-defined]
    assert_same_bits(again.state_dict(), model.state_dict())
    denoisers.save(ours, tmp_path / "ltd")
    close(denoisers.load(tmp_path / "ltd")(x, t, cond), wan_output(model, x, t, cond))
    if name != "wan first and last frame" and not CASES[name][1].get("image_dim"):
        export_denoiser(ours, tmp_path / "original", "wan")
        close(import_denoiser(tmp_path / "original", "wan")(x, t, cond), wan_output(model, x, t, cond))


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in expected.items())


@torch.no_grad()
def test_times_of_tokens_as_in_wan_2_2(tmp_path: Path) -> None:
    """Known frames at time 0 of their own are what diffusers calls expand_timesteps."""
    model = build("wan t2v")
    ours = import_denoiser(saved(model, tmp_path / "theirs"))
    network = Dit(DitConfig(**{**vars(ours.config), "frames": "times"}))
    network.load_state_dict(ours.state_dict())
    x, known = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 4, 3, 4, 6)
    mask = torch.zeros(1, 1, 3, 4, 6)
    mask[:, :, 0] = 1
    cond = conditions(model, 1, (3, 4, 6))
    got = network(x, torch.tensor([0.5]), Conditioning(cond.text, cond.text_mask, frames=Frames(known, mask)))
    t = torch.full((1, 3 * 2 * 3), 0.5)
    t[:, :6] = 0
    expected = wan_output(model, torch.where(mask > 0, known, x), t, cond)
    close(got, expected)
    per_frame = ours(torch.where(mask > 0, known, x), torch.tensor([[0.0, 0.5, 0.5]]), cond)
    close(per_frame, expected)


def vp_velocity(noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Velocity of DDPM's continuous linear schedule from the noise, in float64."""
    noise, x, t = noise.double(), x.double(), t.double().view(-1, 1, 1, 1)
    beta = 0.1 + 19.9 * t
    alpha = torch.exp(-0.25 * t**2 * 19.9 - 0.05 * t)
    sigma = (1 - alpha**2).sqrt()
    alpha_dot = -0.5 * beta * alpha
    data = (x - sigma * noise) / alpha
    return alpha_dot * data - alpha * alpha_dot / sigma * noise


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("dit")])
@torch.no_grad()
def test_dit_predicts_the_same_and_goes_back(name: str, alike: bool, tmp_path: Path) -> None:
    model = build(name)
    if alike:  # as in the published weights
        for block in model.transformer_blocks:  # type: ignore[union-attr]
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())  # type: ignore
    ours = import_denoiser(saved(model, tmp_path / "theirs"))
    assert isinstance(ours, Parametrized) and ours.config.embed_per_block != alike
    side, channels = CASES[name][1]["sample_size"], ours.config.latent_channels
    for size in (side, 2 * side):
        x, steps = torch.randn(2, channels, size, size), torch.tensor([537, 21])
        label = torch.tensor([3, CASES[name][1]["num_embeds_ada_norm"]])
        expected = model(x, steps, label, return_dict=False)[0][:, :channels]
        cond = Conditioning(label=torch.tensor([3, -1]))
        close(ours.network(x[:, :, None], steps / 1000, cond)[:, :, 0], expected)
        velocity = ours(x[:, :, None], steps / 1000, cond)[:, :, 0]
        close(velocity.double(), vp_velocity(expected, x, steps / 1000))
    export_denoiser(ours, tmp_path / "back")
    assert_same_bits(type(model).from_pretrained(tmp_path / "back").state_dict(), model.state_dict())  # type: ignore
    denoisers.save(ours, tmp_path / "ltd")
    assert torch.equal(denoisers.load(tmp_path / "ltd")(x[:, :, None], steps / 1000, cond)[:, :, 0], velocity)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("layout", ["dit", "sit", "lightning_dit"])
@torch.no_grad()
def test_original_checkpoints_predict_the_same_and_go_back(layout: str, qk_norm: bool, tmp_path: Path) -> None:
    qk_norm = qk_norm and layout == "lightning_dit"
    state = original_state(layout, seed=1, qk_norm=qk_norm)
    torch.save({"ema": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "original.pt")
    ours = import_denoiser(tmp_path / "original.pt", layout, settings={"num_heads": 2})
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([3, 5])
    cond = Conditioning(label=torch.tensor([3, -1]))
    t = torch.tensor([0.537, 0.021])
    if layout == "dit":
        assert isinstance(ours, Parametrized)
        close(
            ours.network(x[:, :, None], t, cond)[:, :, 0].double(), original_output(layout, state, x, 1000 * t, label)
        )
    else:  # data is at 1 there, and the velocity points to it
        close(ours(x[:, :, None], t, cond)[:, :, 0].double(), -original_output(layout, state, x, 1 - t, label))
    export_denoiser(ours, tmp_path / "back", layout)
    back = load_file(tmp_path / "back" / "model.safetensors")
    fixed = {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    assert_same_bits(
        {name: value for name, value in back.items() if name not in fixed},
        {name: value for name, value in state.items() if name not in fixed},
    )
    assert all(torch.allclose(back[name], state[name], atol=1e-6) for name in fixed & state.keys())
    assert fixed & back.keys() == fixed & state.keys()
    card = (tmp_path / "back" / "README.md").read_text()
    assert "noise-at-1" in card and "Data licences" in card


def test_original_wan_names_are_all_mapped(tmp_path: Path) -> None:
    """Names of the original layout, as its code has them, for a model with images."""
    model = build("wan i2v")
    ours = import_denoiser(saved(model, tmp_path / "theirs"))
    names = to_theirs(wan_pairs(ours.config, original=True), ours.state_dict()).keys()
    block = {"modulation", "norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias"}
    for attention in ("self_attn", "cross_attn"):
        block |= {f"{attention}.{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")}
        block |= {f"{attention}.norm_{part}.weight" for part in "qk"}
    block |= {f"cross_attn.{part}_img.{kind}" for part in "kv" for kind in ("weight", "bias")}
    block |= {"cross_attn.norm_k_img.weight"}
    outer = {"head.modulation"}
    for part in ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"):
        outer |= {f"{part}.weight", f"{part}.bias"}
    for part in ("time_projection.1", "head.head", *(f"img_emb.proj.{i}" for i in (0, 1, 3, 4))):
        outer |= {f"{part}.weight", f"{part}.bias"}
    assert names == outer | {f"blocks.{i}.{name}" for i in range(2) for name in block}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("proj_out.bias"), "missing .'proj_out.bias'"),
        (lambda state: state.update(extra=torch.zeros(2)), "unknown .'extra'"),
        (lambda state: state.update({"proj_out.bias": torch.zeros(3)}), "proj_out.bias: got"),
        (lambda state: state.update({"proj_out.bias": state["proj_out.bias"].half()}), "several"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = saved(build("wan t2v"), tmp_path / "theirs")
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        import_denoiser(folder)


@pytest.mark.parametrize(
    ("name", "setting", "value", "message"),
    [
        ("wan t2v", "qk_norm", "rms_norm", "qk_norm: got rms_norm"),
        ("wan t2v", "in_channels", 6, "in_channels: got 6"),
        ("wan t2v", "_class_name", "UNet", "holds a 'UNet'"),
        ("dit", "activation_fn", "geglu", "activation_fn: got geglu"),
        ("dit", "out_channels", 5, "out_channels: got 5"),
        ("wan t2v", "window_kind", "local", "WanTransformer3DModel.window_kind: got 'local', which no known setting"),
        ("wan t2v", "eps", "x", "WanTransformer3DModel.eps: got 'x', needed a number of 0 or more"),
        ("wan t2v", "cross_attn_norm", 1, "cross_attn_norm: got 1, needed true or false"),
        ("wan t2v", "patch_size", [1, 2], "patch_size: got [1, 2], needed a list of 3 integers"),
        ("wan t2v", "image_dim", "20", "image_dim: got '20', needed an integer of 1 or more or null"),
        ("dit", "patch_size", 0, "patch_size: got 0, needed an integer of 1 or more"),
        ("dit", "norm_eps", True, "norm_eps: got True, needed a number"),
        ("dit", "dropout", 0.1, "dropout: got 0.1, only 0.0"),
        ("dit", "caption_channels", 8, "DiTTransformer2DModel.caption_channels: got 8, which no known setting"),
    ],
)
def test_settings_without_counterpart_are_refused(
    name: str, setting: str, value: Any, message: str, tmp_path: Path
) -> None:
    folder = saved(build(name), tmp_path / "theirs")
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {setting: value}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        import_denoiser(folder)


def test_unknown_settings_that_are_off_and_notes_are_passed_over(tmp_path: Path) -> None:
    """A model saved after it was read from the older, wider class keeps that class's settings."""
    folder = saved(build("dit"), tmp_path / "theirs")
    config = import_denoiser(folder).config
    tree = json.loads((folder / "config.json").read_text())
    off = {"cross_attention_dim": None, "use_linear_projection": False, "_name_or_path": "x/y"}
    (folder / "config.json").write_text(json.dumps(tree | off))
    assert import_denoiser(folder).config == config


def test_settings_of_the_original_wan_are_checked_too(tmp_path: Path) -> None:
    export_denoiser(import_denoiser(saved(build("wan t2v"), tmp_path / "theirs")), tmp_path / "wan", "wan")
    config = tmp_path / "wan" / "config.json"
    tree = json.loads(config.read_text())
    for change, message in (
        ({"vace_layers": [0, 1]}, "WanModel.vace_layers: got [0, 1], which no known setting"),
        ({"num_layers": "2"}, "WanModel.num_layers: got '2', needed an integer"),
        ({"model_type": "vace"}, "WanModel.model_type: got vace, needed one of t2v"),
    ):
        config.write_text(json.dumps(tree | change))
        with pytest.raises(ConfigError, match=re.escape(message)):
            import_denoiser(tmp_path / "wan", "wan")
    config.write_text(json.dumps(tree | {"_diffusers_version": "0.33.0", "model_type": "ti2v"}))
    assert import_denoiser(tmp_path / "wan", "wan").config.depth == 2
    with pytest.raises(ConfigError, match="settings: got num_heads; layout wan says all in its config.json"):
        import_denoiser(tmp_path / "wan", "wan", settings={"num_heads": 2})


@pytest.mark.parametrize("where", [".", "model.safetensors"])
def test_an_original_checkpoint_of_ours_is_what_its_own_configuration_says(where: str, tmp_path: Path) -> None:
    save_file(original_state("dit"), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"num_heads: cannot be read off .* say it with --num-heads"):
        import_denoiser(tmp_path / "a.safetensors", "dit")
    ours = import_denoiser(tmp_path / "a.safetensors", "dit", settings={"num_heads": 2})
    export_denoiser(ours, tmp_path / "out", "dit")
    source = tmp_path / "out" / where
    assert import_denoiser(source, "dit").config == ours.config
    assert import_denoiser(source, "dit", settings={"num_heads": 2}).config == ours.config
    with pytest.raises(ConfigError, match=r"num_heads: got 4, .*config.json says 2"):
        import_denoiser(source, "dit", settings={"num_heads": 4})
    with pytest.raises(ConfigError, match=r"layout: got sit, .*config.json says dit"):
        import_denoiser(source, "sit")
    for settings, message in (({"heads": 2}, "settings.heads: got 2"), ({"num_heads": 0}, "needed an integer of 1")):
        with pytest.raises(ConfigError, match=message):
            import_denoiser(tmp_path / "a.safetensors", "dit", settings=settings)
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"window": 8}))
    with pytest.raises(ConfigError, match=r"config.json.window: got 8, which no known setting"):
        import_denoiser(source, "dit")
    config.write_text(json.dumps({"name": "of someone else"}))
    assert import_denoiser(source, "dit", settings={"num_heads": 4}).config.num_heads == 4


def test_what_original_checkpoints_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    state = original_state("sit")
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="num_heads: cannot be read off a width of 24"):
        import_denoiser(tmp_path / "a.safetensors", "sit")
    save_file(state | {"pos_embed": state["pos_embed"] + 0.1}, tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="pos_embed: is missing, or other"):
        import_denoiser(tmp_path / "b.safetensors", "sit", settings={"num_heads": 2})
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match="not of a sit checkpoint"):
        import_denoiser(tmp_path / "c.safetensors", "sit")
    with pytest.raises(ConfigError, match="layout: got 'flux'"):
        import_denoiser(tmp_path, "flux")


def test_models_without_counterpart_are_refused(tmp_path: Path) -> None:
    plain = Dit(DitConfig(width=24, num_heads=2, depth=1, text_dim=8))
    with pytest.raises(ConfigError, match="norm: got rms, WanTransformer3DModel needs layer"):
        export_denoiser(plain, tmp_path / "a")
    with pytest.raises(ConfigError, match="needs classes"):
        export_denoiser(Dit(DitConfig(width=24, num_heads=2, depth=1)), tmp_path / "b", "sit")
    model = build("dit")
    ours = import_denoiser(saved(model, tmp_path / "theirs"))
    assert isinstance(ours, Parametrized)
    with pytest.raises(ConfigError, match="objective: the network predicts velocity on path linear"):
        export_denoiser(ours.network, tmp_path / "c")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        export_denoiser(ours, tmp_path / "there")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"x": Path("x")}, tmp_path / "bad.pt")
    with pytest.raises(ConfigError, match="cannot be read as plain tensors"):
        import_denoiser(tmp_path / "bad.pt", "dit")
