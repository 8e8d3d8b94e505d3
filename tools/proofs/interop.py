"""diffusers' autoencoders against ours on random weights: how far encoding and decoding differ, and the way back."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ltd.autoencoders import inflate
from ltd.interop import export_autoencoder, import_autoencoder
from tools.proofs._redrawn import redrawn
from tools.proofs.table import Proof

NAME = "interop"
#: Largest difference over the output's standard deviation, fp32.
LIMIT = 1e-5
#: Least standard deviation of an output, so that a difference is not lost in nothing.
LEAST_STD = 0.1
_WAN: dict[str, Any] = {"base_dim": 16, "z_dim": 8, "latents_mean": [0.1] * 8, "latents_std": [2.0] * 8}
_WAN22: dict[str, Any] = {**_WAN, "is_residual": True, "decoder_base_dim": 24, "in_channels": 12, "out_channels": 12}
_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
_KL: dict[str, Any] = {**_BLOCKS, "block_out_channels": (16, 32, 32), "norm_num_groups": 8, "layers_per_block": 2}
_FLUX = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159}
#: Class, settings, and sizes (frames, height, width), some that the compression does not divide where theirs allows it.
CASES: dict[str, tuple[str, dict[str, Any], list[tuple[int, int, int]]]] = {
    "Wan 2.1": ("AutoencoderKLWan", _WAN, [(9, 32, 40), (1, 32, 32), (5, 37, 29)]),
    "Wan 2.1, one block, three levels": (
        "AutoencoderKLWan",
        {**_WAN, "num_res_blocks": 1, "dim_mult": [1, 2, 2], "temperal_downsample": [True, False]},
        [(9, 32, 24), (1, 16, 16)],
    ),
    "Wan 2.2": ("AutoencoderKLWan", {**_WAN22, "patch_size": 2}, [(9, 32, 48), (1, 48, 32)]),
    "Wan 2.2, one block": (
        "AutoencoderKLWan",
        {**_WAN22, "patch_size": 2, "num_res_blocks": 1, "dim_mult": [1, 2, 4, 4]},
        [(5, 48, 32)],
    ),
    "Stable Diffusion": ("AutoencoderKL", _KL, [(1, 32, 48), (1, 37, 29)]),
    "SDXL (no attention, means of its own)": (
        "AutoencoderKL",
        {**_KL, "mid_block_add_attention": False, "latents_mean": [0.1] * 4, "latents_std": [1.0, 2.0, 3.0, 4.0]},
        [(1, 32, 32)],
    ),
    "Flux": ("AutoencoderKL", {**_KL, **_FLUX, "scaling_factor": 0.3611}, [(1, 32, 32), (1, 41, 33)]),
}
SEEDS = 3


def build(name: str, seed: int) -> nn.Module:
    """Build one of ``CASES`` with every weight redrawn from a seed."""
    kind, settings, _ = CASES[name]
    return redrawn(kind, settings, seed, _scale)


def _scale(name: str, value: Tensor) -> tuple[float, float]:
    fan_in = value[0].numel()
    if name.endswith("bias"):
        return 0.0, 0.2
    return (0.0, 1.3 * fan_in**-0.5) if fan_in > 1 else (1.0, 0.3)


def outputs(model: Any, video: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run a model of theirs.

    Args:
        model: Theirs.
        video: ``(b, 3, t, h, w)``.
        seed: Of the latents that are decoded.

    Returns:
        Mean of the posterior, some latents, and what they decode to, as videos.
    """
    image = type(model).__name__ == "AutoencoderKL"
    mean = model.encode(video[:, :, 0] if image else video).latent_dist.mean
    latents = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(mean)
    decoded = model.decode(latents).sample
    values = (mean, latents, decoded)
    return tuple(x.unsqueeze(2) if image else x for x in values)  # type: ignore[return-value]


@torch.no_grad()
def measure() -> Proof:
    """Measure every case with several seeds."""
    rows: list[list[Any]] = []
    misses = []
    for name, (kind, settings, sizes) in CASES.items():
        encode = decode = rounding = 0.0
        least = float("inf")
        same = loads = True
        for seed in range(SEEDS):
            theirs = build(name, seed)
            with tempfile.TemporaryDirectory(prefix="ltd-interop-") as folder:
                theirs.save_pretrained(Path(folder) / "theirs")  # type: ignore[operator]
                ours = import_autoencoder(Path(folder) / "theirs")
                export_autoencoder(ours, Path(folder) / "back")
                before, after = (
                    load_file(Path(folder) / way / "diffusion_pytorch_model.safetensors") for way in ("theirs", "back")
                )
                same &= before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    again = type(theirs).from_pretrained(Path(folder) / "back").eval()  # type: ignore[attr-defined]
            for size in sizes:
                video = torch.rand((2, 3, *size), generator=torch.Generator().manual_seed(seed)) * 2 - 1
                mean, latents, decoded = outputs(theirs, video, seed)
                encode = max(encode, float((ours.encode(video).mean - mean).abs().max() / mean.std()))
                decode = max(decode, float((ours.decode(latents) - decoded).abs().max() / decoded.std()))
                least = min(least, float(mean.std()), float(decoded.std()))
                loads &= torch.equal(outputs(again, video, seed)[2], decoded)
                exact = outputs(again.double(), video.double(), seed)[2]
                rounding = max(rounding, float((decoded - exact).abs().max() / exact.std()))
                again.float()
        shown = ", ".join(f"{t}x{h}x{w}" for t, h, w in sizes)
        rows.append([name, kind, _short(settings), shown, encode, decode, rounding, least, same, loads])
        if max(encode, decode) > LIMIT or least < LEAST_STD or not (same and loads):
            misses.append(
                f"{name}: encode {encode:.2e}, decode {decode:.2e}, std {least:.2g}, same {same}, loads {loads}"
            )
    rows.append(
        ["Stable Diffusion, inflated", "ConvVae", "4x4x4", "17x32x32", _inflated(), None, None, None, None, None]
    )
    if rows[-1][4] > LIMIT:
        misses.append(f"inflated: latents differ from the image VAE's by {rows[-1][4]:.2e}")
    columns = ["model", "class", "settings", "sizes", "encode", "decode", "rounding", "least std"]
    columns += ["same file", "same frames"]
    notes = (
        f"{SEEDS} draws of all weights each, fp32. Encode and decode: largest difference to diffusers over the output's"
        f" standard deviation, limit {LIMIT:g}; rounding: how far diffusers itself is from its own decoding in fp64. "
        "Same file, same frames: the exported file holds the same bits under the same names, and diffusers loads it "
        "and decodes the same bits. Inflated: latents of a clip against the image VAE's of each fourth frame."
    )
    return Proof("diffusers' autoencoders, loaded and written back", columns, rows, misses, notes)


def _inflated() -> float:
    theirs = build("Stable Diffusion", 0)
    with tempfile.TemporaryDirectory(prefix="ltd-interop-") as folder:
        theirs.save_pretrained(folder)  # type: ignore[operator]
        ours = inflate(import_autoencoder(folder), halve_time=(True, True))
    video = torch.rand((1, 3, 17, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = video[0, :, ::4].transpose(0, 1)
    mean = theirs.encode(frames).latent_dist.mean.transpose(0, 1)[None]  # type: ignore[operator]
    return float((ours.encode(video).mean - mean).abs().max() / mean.std())


def _short(settings: dict[str, Any]) -> str:
    kept = ("base_dim", "decoder_base_dim", "dim_mult", "num_res_blocks", "patch_size", "block_out_channels")
    return ", ".join(f"{name} {settings[name]}" for name in (*kept, "layers_per_block") if name in settings)
