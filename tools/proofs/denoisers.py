"""Public denoisers against ours on random weights: what they predict, the way back, and numbers of parameters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltd import config
from ltd.denoisers import Conditioning, Dit, Frames, Parametrized, count_parameters
from ltd.interop import export_denoiser, import_denoiser
from ltd.training.denoiser import DenoiserRun
from tools.proofs._original_dit import original_output, original_state
from tools.proofs._redrawn import redrawn
from tools.proofs.table import Proof

NAME = "denoisers"
#: Largest difference over the output's standard deviation, fp32.
LIMIT = 1e-5
#: Least standard deviation of an output, so that a difference is not lost in nothing.
LEAST_STD = 0.1
SEEDS = 3
_WAN: dict[str, Any] = {"num_attention_heads": 3, "attention_head_dim": 24, "in_channels": 8, "out_channels": 8}
_WAN |= {"text_dim": 32, "freq_dim": 64, "ffn_dim": 160, "num_layers": 3}
_IMAGE = {"in_channels": 20, "image_dim": 40, "added_kv_proj_dim": 72}
_DIT: dict[str, Any] = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 3, "num_embeds_ada_norm": 20}
#: Class, settings, and sizes of latents (t, h, w).
CASES: dict[str, tuple[str, dict[str, Any], list[tuple[int, int, int]]]] = {
    "Wan text-to-video": ("WanTransformer3DModel", _WAN, [(3, 8, 12), (1, 16, 16)]),
    "Wan, other patch, no cross norm": (
        "WanTransformer3DModel",
        {**_WAN, "patch_size": (2, 1, 3), "cross_attn_norm": False},
        [(4, 5, 12)],
    ),
    "Wan image-to-video": ("WanTransformer3DModel", {**_WAN, **_IMAGE}, [(3, 8, 12), (1, 8, 8)]),
    "Wan first and last frame": ("WanTransformer3DModel", {**_WAN, **_IMAGE, "pos_embed_seq_len": 10}, [(3, 8, 12)]),
    "Wan 2.2 image-to-video": ("WanTransformer3DModel", {**_WAN, "in_channels": 20}, [(3, 8, 12)]),
    "DiT": ("DiTTransformer2DModel", {**_DIT, "sample_size": 16, "out_channels": 8}, [(1, 16, 16), (1, 8, 8)]),
    "DiT, no bias, no variance": (
        "DiTTransformer2DModel",
        {**_DIT, "sample_size": 8, "patch_size": 1, "attention_bias": False},
        [(1, 8, 8)],
    ),
}
#: Shipped sizes and the published numbers of parameters: exact where diffusers has the class, else in millions.
PUBLISHED: dict[str, float] = {
    "dit_s_2": 33e6,
    "dit_b_2": 130e6,
    "dit_l_2": 458e6,
    "dit_xl_2": 675e6,
    "sit_xl_2": 675e6,
    "lightning_dit_xl_1": 675e6,
    "dit_dh_xl": 839e6,
    "wan_1.3b": 1_418_996_800,
    "wan_14b": 14_288_491_584,
    "wan_14b_i2v": 16_394_878_784,
}


def build(name: str, seed: int) -> nn.Module:
    """Build one of ``CASES`` with every weight redrawn from a seed."""
    kind, settings, _ = CASES[name]
    return redrawn(kind, settings, seed, _scale)


def _scale(name: str, value: Tensor) -> tuple[float, float]:
    if "norm" in name and value.ndim == 1 and name.endswith("weight"):
        return 1.0, 0.3
    fan_in = value[0].numel() if value.ndim == 2 or value.ndim > 3 else 1
    return 0.0, (1.2 * fan_in**-0.5 if fan_in > 1 else 0.3)


def inputs(model: nn.Module, cells: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor, Conditioning]:
    """Draw noisy latents, times and all conditions that a model takes.

    Args:
        model: Theirs.
        cells: Latent cells (t, h, w).
        seed: Of the draws.

    Returns:
        Latents ``(2, c, t, h, w)``, times ``(2,)`` and conditions.
    """
    generator = torch.Generator().manual_seed(100 + seed)
    tree: Any = model.config
    t = torch.tensor([0.537, 0.981])
    if type(model).__name__ == "DiTTransformer2DModel":
        x = torch.randn(2, tree.in_channels, *cells, generator=generator)
        return x, t, Conditioning(label=torch.tensor([seed, -1]))
    x = torch.randn(2, tree.out_channels, *cells, generator=generator)
    text = torch.randn(2, 11, tree.text_dim, generator=generator)
    mask = torch.arange(11) < torch.tensor([[11], [4]])
    frames = image = None
    beside = tree.in_channels - 2 * tree.out_channels
    if beside > 0:
        known = torch.randn(2, tree.out_channels, *cells, generator=generator)
        frames = Frames(known, (torch.rand(2, beside, *cells, generator=generator) < 0.5).float())
    if tree.image_dim:
        image = torch.randn(2, tree.pos_embed_seq_len or 7, tree.image_dim, generator=generator)
    return x, t, Conditioning(text=text, text_mask=mask, frames=frames, image=image)


def theirs_predicts(model: Any, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Run a model of theirs as its pipeline does: the velocity of Wan, the noise of DiT without its variance."""
    if cond.label is not None:
        label = torch.where(cond.label < 0, model.config.num_embeds_ada_norm, cond.label)
        steps = torch.round(1000 * t)
        return model(x[:, :, 0], steps, label, return_dict=False)[0][:, : x.shape[1], None]
    assert cond.text is not None and cond.text_mask is not None
    text = F.pad(torch.where(cond.text_mask[..., None], cond.text, 0), (0, 0, 0, 512 - cond.text.shape[1]))
    if cond.frames is not None:
        x = torch.cat((x, cond.frames.mask, cond.frames.latents), 1)
    image = cond.image
    if image is not None and model.config.pos_embed_seq_len:
        image = image.unflatten(1, (2, -1)).flatten(0, 1)  # first and last frame are rows of theirs
    dtype = next(model.parameters()).dtype
    image = None if image is None else image.to(dtype)
    return model(x.to(dtype), 1000 * t, text.to(dtype), encoder_hidden_states_image=image, return_dict=False)[0]


def ours_predicts(model: Dit | Parametrized, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Run ours: the network itself, whose output is what theirs predicts."""
    network = model.network if isinstance(model, Parametrized) else model
    out = network(x, t, cond)
    assert isinstance(out, Tensor)
    return out


@torch.no_grad()
def measure() -> Proof:
    """Measure every case with several seeds, and count the parameters of the shipped sizes."""
    rows: list[list[Any]] = []
    misses: list[str] = []
    for name, (kind, _, sizes) in CASES.items():
        worst, least, same = 0.0, float("inf"), True
        for seed in range(SEEDS):
            model = build(name, seed)
            with tempfile.TemporaryDirectory(prefix="ltd-denoisers-") as folder:
                model.save_pretrained(Path(folder) / "theirs")  # type: ignore[operator]
                ours = import_denoiser(Path(folder) / "theirs")
                export_denoiser(ours, Path(folder) / "back")
                same &= _same_files(Path(folder) / "theirs", Path(folder) / "back")
            for cells in sizes:
                x, t, cond = inputs(model, cells, seed)
                expected = theirs_predicts(model, x, t, cond)
                worst = max(worst, float((ours_predicts(ours, x, t, cond) - expected).abs().max() / expected.std()))
                least = min(least, float(expected.std()))
        shown = ", ".join("x".join(map(str, cells)) for cells in sizes)
        _add(rows, misses, [name, kind, shown, worst, least, same, None, None])
    for layout in ("dit", "sit", "lightning_dit"):
        worst, least, same = _original(layout)
        _add(rows, misses, [f"{layout}, original names", "from the formulas", "8x8", worst, least, same, None, None])
    folder = Path(__file__).resolve().parents[2] / "configs" / "denoiser"
    for name, published in PUBLISHED.items():
        count = count_parameters(config.load(DenoiserRun, folder / f"{name}.yaml").model)
        rows.append([f"configs/denoiser/{name}.yaml", "Dit", None, None, None, None, f"{count:,}", f"{published:,.0f}"])
        if abs(count / published - 1) > (0 if published > 1e9 else 0.01):
            misses.append(f"{name}: {count:,} parameters, published are {published:,.0f}")
    columns = ["model", "reference", "latents", "difference", "least std", "same file", "parameters", "published"]
    notes = (
        f"{SEEDS} draws of all weights each, zero-initialised ones too, fp32. Difference: largest, over the output's "
        f"standard deviation, limit {LIMIT:g}. Same file: the exported one holds the same bits under the same names. "
        "Wan runs as in its pipeline, with texts padded by zeros to 512 tokens. DiT, SiT and LightningDiT cannot be "
        "installed here: the reference is written from the papers' formulas in float64 under the names of their "
        "checkpoints. Published numbers of parameters: exact for Wan (diffusers' class), in millions for the rest "
        "(within 1 %). That an exported pipeline makes the same frames is held by tests/interop/test_pipeline.py."
    )
    return Proof("Public denoisers, loaded and written back", columns, rows, misses, notes)


def _add(rows: list[list[Any]], misses: list[str], row: list[Any]) -> None:
    rows.append(row)
    if row[3] > LIMIT or row[4] < LEAST_STD or not row[5]:
        misses.append(f"{row[0]}: difference {row[3]:.2e}, std {row[4]:.2g}, same file {row[5]}")


def _same_files(one: Path, other: Path) -> bool:
    before, after = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (one, other))
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def _original(layout: str) -> tuple[float, float, bool]:
    worst, least, same = 0.0, float("inf"), True
    for seed in range(SEEDS):
        state = original_state(layout, seed, qk_norm=layout == "lightning_dit" and seed == 1)
        with tempfile.TemporaryDirectory(prefix="ltd-denoisers-") as folder:
            save_file(state, Path(folder) / "original.safetensors")
            ours = import_denoiser(Path(folder) / "original.safetensors", layout, settings={"num_heads": 2})
            export_denoiser(ours, Path(folder) / "back", layout)
            back = load_file(Path(folder) / "back" / "model.safetensors")
        same &= back.keys() == state.keys() and all(
            torch.allclose(back[key], value, atol=1e-6)
            if key.startswith(("pos_embed", "feat_rope"))
            else torch.equal(back[key], value)
            for key, value in state.items()
        )
        generator = torch.Generator().manual_seed(seed)
        x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([0.537, 0.981])
        label = torch.tensor([seed, -1])
        theirs = original_output(layout, state, x, 1000 * t if layout == "dit" else 1 - t, label.where(label >= 0, 5))
        expected = theirs if layout == "dit" else -theirs  # their data is at 1
        found = ours_predicts(ours, x[:, :, None], t, Conditioning(label=label))[:, :, 0]
        worst = max(worst, float((found.double() - expected).abs().max() / expected.std()))
        least = min(least, float(expected.std()))
    return worst, least, same
