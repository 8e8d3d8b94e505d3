"""diffusers' autoencoders against ours: outputs, both directions, and what is refused. All weights are redrawn."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltd import autoencoders
from ltd.autoencoders import CausalVae, CausalVaeConfig, inflate
from ltd.config import ConfigError
from ltd.interop import export_autoencoder, import_autoencoder
from tools import convert_checkpoint

WAN = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0] * 4}
KL = {"layers_per_block": 1, "norm_num_groups": 4}
TWO = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SIZES = {"wan 2.1": [(9, 16, 24), (1, 16, 16), (5, 21, 19)], "image": [(1, 16, 24), (1, 21, 19)]}
CASES: dict[str, tuple[type[nn.Module], dict[str, Any], list[tuple[int, int, int]]]] = {
    "wan 2.1": (AutoencoderKLWan, WAN, SIZES["wan 2.1"]),
    "wan 2.1, two blocks, three levels": (
        AutoencoderKLWan,
        {**WAN, "num_res_blocks": 2, "dim_mult": [1, 3, 2], "temperal_downsample": [True, False]},
        [(9, 8, 12), (1, 12, 8)],
    ),
    "wan 2.2": (
        AutoencoderKLWan,
        {**WAN, "is_residual": True, "decoder_base_dim": 12, "in_channels": 12, "out_channels": 12, "patch_size": 2},
        [(9, 32, 48), (1, 32, 32)],
    ),
    "wan, patches and no shortcuts": (
        AutoencoderKLWan,
        {**WAN, "in_channels": 12, "out_channels": 12, "patch_size": 2},
        [(5, 32, 48), (1, 32, 32)],
    ),
    "stable diffusion": (AutoencoderKL, {**KL, **TWO, "block_out_channels": (8, 16)}, SIZES["image"]),
    "sdxl, latents of their own mean": (
        AutoencoderKL,
        {**KL, **TWO, "block_out_channels": (8, 16), "layers_per_block": 2, "latents_mean": [0.5, 0.1, 0.2, 0.3]}
        | {"latents_std": [1.0, 2.0, 3.0, 4.0]},
        SIZES["image"],
    ),
    "flux": (
        AutoencoderKL,
        {**KL, **TWO, "block_out_channels": (8, 8), "latent_channels": 16, "use_quant_conv": False}
        | {"use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        SIZES["image"],
    ),
    "without attention": (
        AutoencoderKL,
        {**KL, **TWO, "block_out_channels": (8, 16), "mid_block_add_attention": False},
        SIZES["image"],
    ),
}


def build(name: str, seed: int = 0) -> nn.Module:
    kind, settings, _ = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(**settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            drawn = torch.randn(value.shape, generator=generator)
            if parameter.endswith("bias"):
                value.copy_(0.2 * drawn)
            else:
                fan_in = value[0].numel()
                value.copy_(drawn * 1.3 * fan_in**-0.5 if fan_in > 1 else 1 + 0.3 * drawn)
    return model.eval()


def folder(model: nn.Module, path: Path) -> Path:
    model.save_pretrained(path)  # type: ignore[operator]
    return path


def reference(model: nn.Module, video: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give mean, log-variance, some latents, and their decoding, as videos."""
    image = isinstance(model, AutoencoderKL)
    posterior = model.encode(video[:, :, 0] if image else video).latent_dist  # type: ignore[operator]
    latents = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed)).to(video.dtype)
    decoded = model.decode(latents).sample  # type: ignore[operator]
    values = (posterior.mean, posterior.logvar, latents, decoded)
    return tuple(x.unsqueeze(2) if image else x for x in values)  # type: ignore[return-value]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_equal_and_the_way_back_gives_the_same_file(name: str, tmp_path: Path) -> None:
    for seed in range(2):
        theirs = build(name, seed)
        source = folder(theirs, tmp_path / f"theirs{seed}")
        ours = import_autoencoder(source)
        for t, h, w in CASES[name][2]:
            video = torch.rand((2, 3, t, h, w), generator=torch.Generator().manual_seed(seed)) * 2 - 1
            mean, logvar, latents, decoded = reference(theirs, video, seed)
            assert min(mean.std(), decoded.std()) > 0.1
            posterior = ours.encode(video)
            exact = reference(copy.deepcopy(theirs).double(), video.double(), seed)
            for got, wanted, true in (
                (posterior.mean, mean, exact[0]),
                (posterior.logvar, logvar, exact[1]),
                (ours.decode(latents), decoded, exact[3]),
            ):
                # Its own rounding, about as large on some processors, is no difference of ours.
                rounding = float((wanted - true).abs().max())
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.std()) + rounding)
        export_autoencoder(ours, tmp_path / f"back{seed}")
        before, after = (
            load_file(tmp_path / f"{way}{seed}/diffusion_pytorch_model.safetensors") for way in ("theirs", "back")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again, report = type(theirs).from_pretrained(tmp_path / f"back{seed}", output_loading_info=True)  # type: ignore[attr-defined]
        assert not any(report.values())
        assert torch.equal(reference(again.eval(), video, seed)[3], decoded)
        _check_config(theirs, again)


def _check_config(before: Any, after: Any) -> None:
    settings = dict(after.config)
    for key, value in before.config.items():
        if key.startswith("_") or key in ("sample_size", "force_upcast"):
            continue
        if key == "decoder_base_dim":
            value = value or before.config.base_dim
        if key in ("scale_factor_spatial", "scale_factor_temporal"):  # what the sizes amount to
            continue
        if key in ("scaling_factor", "shift_factor") and before.config.get("latents_mean"):
            continue
        if key == "latents_std" and value and "scaling_factor" in before.config:  # what pipelines multiply by
            deviations = [[x / c["scaling_factor"] for x in c["latents_std"]] for c in (before.config, settings)]
            assert deviations[1] == pytest.approx(deviations[0])
            continue
        if key in ("scaling_factor", "shift_factor"):
            assert settings[key] == pytest.approx(value or 0.0, rel=1e-6), key
        else:
            assert settings[key] == (list(value) if isinstance(value, tuple) else value) or tuple(
                settings[key]
            ) == pytest.approx(value), key


def test_latent_statistics_are_theirs(tmp_path: Path) -> None:
    wan = import_autoencoder(folder(build("wan 2.1"), tmp_path / "wan"))
    assert wan.latent_norm.mean.tolist() == pytest.approx(WAN["latents_mean"])
    assert wan.latent_norm.std.tolist() == [2.0] * 4
    flux = import_autoencoder(folder(build("flux"), tmp_path / "flux"))
    z = torch.randn(1, 16, 1, 2, 2)
    torch.testing.assert_close(flux.normalize(z), (z - 0.1159) * 0.3611)


def test_statistics_of_channels_and_a_scale_are_what_pipelines_make_of_them(tmp_path: Path) -> None:
    statistics = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0] * 4, "scaling_factor": 0.5}
    source = folder(build("sdxl, latents of their own mean"), tmp_path / "sdxl")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | statistics))
    ours = import_autoencoder(source)
    # Stable Diffusion XL's pipeline: z * latents_std / scaling_factor + latents_mean.
    assert ours.denormalize(torch.ones(1, 4, 1, 1, 1)).flatten().tolist() == pytest.approx([5.0, 6.0, 7.0, 8.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": None}, r"latents_mean, latents_std: missing in config\.json, needed 4 numbers each"),
        ({"latents_std": [0.0] * 4}, r"latents_std: got .*, needed numbers above 0"),
        ({"base_dim": "x"}, r"base_dim: got .*, needed an integer of 1 or more"),
        ({"dim_mult": None}, "dim_mult: got None, needed a list of whole numbers"),
        ({"latents_mean": [None] * 4}, r"latents_mean: got \[None, .*needed a list of numbers"),
        ({"latents_std": [float("nan")] * 4}, r"latents_std: got \[nan, .*needed a list of numbers"),
        ({"latents_std": 2.0}, r"latents_std: got 2\.0, needed a list of numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = folder(build("wan 2.1"), tmp_path / "wan")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        import_autoencoder(source)


def test_a_shift_that_is_no_number_is_refused(tmp_path: Path) -> None:
    source = folder(build("flux"), tmp_path / "flux")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift_factor": "0.1"}))
    with pytest.raises(ConfigError, match=r"shift_factor: got '0\.1', needed a number or null"):
        import_autoencoder(source)


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("norm_out.gamma", lambda x: x.repeat(1, 2, 1, 1)),
        ("norm_out.gamma", lambda x: x.flatten()),
        ("to_qkv.weight", lambda x: x.repeat(1, 1, 3, 3)),
    ],
)
def test_nothing_of_a_tensor_is_dropped(suffix: str, change: Any, tmp_path: Path) -> None:
    source = folder(build("wan 2.1"), tmp_path / "wan")
    path = source / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in sorted(tensors) if key.endswith(suffix))
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path)
    with pytest.raises(ConfigError, match=r"other axes|" + name.replace(".", r"\.")):
        import_autoencoder(source)


def test_parts_of_unequal_size_are_refused(tmp_path: Path) -> None:
    source = folder(build("stable diffusion"), tmp_path / "sd")
    path = source / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    q, k = (next(key for key in sorted(tensors) if key.endswith(f"{part}.weight")) for part in ("to_q", "to_k"))
    both = torch.cat([tensors[q], tensors[k]])
    save_file(tensors | {q: both[: len(both) // 2 + 2].contiguous(), k: both[len(both) // 2 + 2 :].contiguous()}, path)
    with pytest.raises(ConfigError, match=r"to_q\.weight: got"):
        import_autoencoder(source)


def test_dtype_is_kept(tmp_path: Path) -> None:
    theirs = build("wan 2.1").to(torch.bfloat16)
    ours = import_autoencoder(folder(theirs, tmp_path / "a"))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert ours.latent_norm.std.dtype == torch.float32
    export_autoencoder(ours, tmp_path / "b")
    written = load_file(tmp_path / "b/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}


def test_old_names_of_attention(tmp_path: Path) -> None:
    theirs = build("stable diffusion")
    source = folder(theirs, tmp_path / "a")
    file = source / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(file).items():
        for new, before in old.items():
            if f".{new}." in name:
                name = name.replace(new, before)
                value = value[:, :, None, None].contiguous() if value.ndim == 2 else value
        tensors[name] = value
    assert any("query" in name for name in tensors)
    save_file(tensors, file)
    ours = import_autoencoder(source)
    video = torch.rand(1, 3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(video).mean, reference(theirs, video, 0)[0], rtol=0, atol=1e-5)


def test_an_image_vae_grows_into_a_video_vae(tmp_path: Path) -> None:
    theirs = build("stable diffusion")
    ours = inflate(import_autoencoder(folder(theirs, tmp_path / "a")), halve_time=(True,))
    video = torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad():
        mean = theirs.encode(video[:, :, ::2].transpose(1, 2).flatten(0, 1)).latent_dist.mean  # type: ignore[operator]
        got = ours.encode(video).mean.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(got, mean, rtol=0, atol=1e-5 * float(mean.std()))


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = build("wan 2.2")
    source = folder(theirs, tmp_path / "theirs")
    assert convert_checkpoint.main(["--from", "diffusers", str(source), "--to", "ltd", str(tmp_path / "ours")]) == 0
    model = autoencoders.load(tmp_path / "ours")
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, _, latents, decoded = reference(theirs, video, 0)
        torch.testing.assert_close(model.encode(video).mean, mean, rtol=0, atol=1e-5 * float(mean.std()))
        torch.testing.assert_close(model.decode(latents), decoded, rtol=0, atol=1e-5 * float(decoded.std()))
    assert (
        convert_checkpoint.main(["--from", "ltd", str(tmp_path / "ours"), "--to", "diffusers", str(tmp_path / "b")])
        == 0
    )
    assert "AutoencoderKLWan for diffusers" in capsys.readouterr().out
    for arguments in (["--from", "diffusers", "--to", "safetensors"], ["--from", "diffusers", "--to", "diffusers"]):
        with pytest.raises(SystemExit):
            convert_checkpoint.main([*arguments, "a", "b"])


def _edit(source: Path, **changes: Any) -> None:
    tree = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(tree | changes))


def _tensors(source: Path, change: Any) -> None:
    file = source / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: _edit(s, attn_scales=[0.5]), r"attn_scales: got \[0.5\], only \[\]"),
        (lambda s: _edit(s, dropout=0.1), "dropout: got 0.1"),
        (lambda s: _edit(s, out_channels=4), "out_channels: got 4"),
        (lambda s: _edit(s, window=4), "AutoencoderKLWan.window: got 4, which no known setting"),
        (lambda s: _edit(s, base_dim="8"), "AutoencoderKLWan.base_dim: got '8', needed an integer of 1 or more"),
        (lambda s: _edit(s, is_residual="false"), "is_residual: got 'false', needed true or false"),
        (lambda s: _edit(s, dim_mult="12"), "dim_mult: got '12', needed a list of whole numbers"),
        (
            lambda s: _edit(s, temperal_downsample=[0, 1, 1]),
            r"temperal_downsample: got \[0, 1, 1\], needed a list of true",
        ),
        (lambda s: _edit(s, _class_name="AutoencoderKL"), r"AutoencoderKL\.\w+: got .*, which no known setting"),
        (lambda s: _edit(s, z_dim=5), "decoder.conv_in.weight|conv_out|latents_mean"),
        (lambda s: _edit(s, num_res_blocks=2), "missing .*unknown"),
        (lambda s: _edit(s, latents_mean=[0.0]), "latents_mean: got 1 numbers"),
        (lambda s: _edit(s, _class_name="AutoencoderDC"), "holds a 'AutoencoderDC', needed AutoencoderKLWan or"),
        (lambda s: (s / "config.json").write_text("{"), "is not JSON"),
        (lambda s: (s / "config.json").unlink(), "holds no config.json"),
        (lambda s: _tensors(s, lambda t: t.pop("quant_conv.bias")), r"missing \['quant_conv.bias'\]"),
        (lambda s: _tensors(s, lambda t: t.update(extra=torch.zeros(1))), r"unknown \['extra'\]"),
        (
            lambda s: _tensors(s, lambda t: t.update({"quant_conv.bias": torch.zeros(9)})),
            r"quant_conv.bias: got \(9,\).*needed \(8,\)",
        ),
        (
            lambda s: _tensors(s, lambda t: t.update({"quant_conv.bias": t["quant_conv.bias"].half()})),
            "several or no floating types",
        ),
        (lambda s: (s / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 40), "cannot be read"),
        (
            lambda s: (s / "diffusion_pytorch_model.safetensors").rename(s / "diffusion_pytorch_model.bin"),
            "is a pickle, which is never read",
        ),
    ],
)
def test_refuses(damage: Any, message: str, tmp_path: Path) -> None:
    source = folder(build("wan 2.1"), tmp_path / "a")
    damage(source)
    with pytest.raises(ConfigError, match=message):
        import_autoencoder(source)


def test_refuses_what_diffusers_does_not_have(tmp_path: Path) -> None:
    model = CausalVae(CausalVaeConfig(channels=(8,), factors=(), encoder_blocks=(1,), decoder_blocks=(1,)))
    with pytest.raises(ConfigError, match="no architecture for kind 'causal_vae'"):
        export_autoencoder(model, tmp_path / "a")
    wan = import_autoencoder(folder(build("stable diffusion"), tmp_path / "b"))
    grown = inflate(wan, halve_time=(True,))
    with pytest.raises(ConfigError, match="AutoencoderKLWan needs"):
        export_autoencoder(grown, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    (tmp_path / "full").mkdir()
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        export_autoencoder(wan, tmp_path / "full")


def test_a_pipeline_folder_and_sharded_weights(tmp_path: Path) -> None:
    theirs = build("wan 2.1")
    theirs.save_pretrained(tmp_path / "pipeline/vae", max_shard_size="200KB")  # type: ignore[operator]
    assert len(list((tmp_path / "pipeline/vae").glob("*.safetensors"))) > 1
    ours = import_autoencoder(tmp_path / "pipeline")
    assert torch.equal(ours.encoder.conv_in.weight, theirs.encoder.conv_in.weight)  # type: ignore[union-attr]
