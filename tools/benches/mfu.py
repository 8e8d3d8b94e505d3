"""Share of a GPU's dense peak that stacks of 1.3B- and 14B-shaped blocks reach in training, by attention kernel.

Forward and backward in bf16 of a few blocks of ``configs/denoiser/wan_*.yaml`` on one long sequence, with text, without
recomputation; the operations are counted from shapes (``ltd.denoisers.count_flops``) over all blocks that are there,
embeddings and last layer included. A stack fits one GPU where the whole model does not; its share is that of a layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ltd.config import from_dict
from ltd.denoisers import Conditioning, Dit, DitConfig, DitInputs, build_denoiser, count_flops
from ltd.nn import attention
from ltd.planning import find_peak, measure_peak
from tools.benches.table import Row, System, interleave

KIND = "mfu"
NAME = "mfu"
LAYOUT = "one GPU, no sharding, no recomputation"
#: Preset, and how many of its blocks are stacked.
STACKS = {"wan_1.3b": 8, "wan_14b": 2}
#: Latents (t, h, w) whose patches of 1 x 2 x 2 are 8,192 and 32,768 tokens.
LATENTS = {"8k": (8, 64, 64), "32k": (32, 64, 64)}
SHAPES = f"blocks {STACKS}; latents 16 x {LATENTS}: 8,192 and 32,768 tokens, one sample; prompts of 120 tokens; bf16"
TINY_SHAPES = "one block of width 32; latents 16 x (1, 8, 8): 16 tokens, one sample; prompts of 120 tokens; fp32, CPU"
#: Share of the peak that is asked for.
TARGET = 0.5
_PRESETS = Path(__file__).resolve().parents[2] / "configs" / "denoiser"
_PROMPT, _STEPS = 120, 3


def missing() -> str:
    """Say why this cannot be measured here; "" where it can."""
    return (
        ""
        if torch.cuda.is_available()
        else "mfu needs a CUDA GPU, and torch sees none; --tiny checks the code on a CPU"
    )


def measure(repeats: int, *, tiny: bool = False) -> list[Row]:
    """Time training passes of all stacks and lengths with every attention kernel that is installed.

    Args:
        repeats: Rounds of each.
        tiny: One small block on the CPU, to see that it runs.

    Returns:
        Rows per 1,000 passes, with tokens/s and the share of the peak.
    """
    device = torch.device("cpu" if tiny else "cuda")
    dtype = torch.float32 if tiny else torch.bfloat16
    peak = peak_of(device, dtype)
    stacks = {"tiny": _tiny()} if tiny else {name: stack(name, blocks) for name, blocks in STACKS.items()}
    lengths = {"16": (1, 8, 8)} if tiny else LATENTS
    rows: list[Row] = []
    for name, chosen in stacks.items():
        torch.manual_seed(0)
        model = build_denoiser(chosen).to(device, dtype).requires_grad_(True).train()
        for length, cells in lengths.items():
            x, t, cond = inputs(chosen, cells, device, dtype)
            work = count_flops(chosen, DitInputs.of(x, cond))
            systems = _systems(model, (x, t, cond), device)
            found = interleave(f"{name}, {len(model.blocks)} blocks, {length} tokens", systems, repeats=repeats)
            rows += [
                row if row.missing else with_share(row, float(work.all.training), work.patches, peak) for row in found
            ]
        del model
    return rows


def summary(rows: Sequence[Row]) -> list[str]:
    """Compare the best kernel's share with what is asked for."""
    lines = []
    for work in dict.fromkeys(row.work for row in rows):
        same = [row for row in rows if row.work == work and not row.missing]
        best = max(same, key=lambda row: max(row.figures["MFU %"]))
        share = sorted(best.figures["MFU %"])[len(best.figures["MFU %"]) // 2]
        verdict = "reached" if share >= 100 * TARGET else "MISSED"
        lines.append(f"- {work}: {share:.1f} % of the dense peak with {best.system}; asked for {TARGET:.0%}: {verdict}")
    return lines


def stack(preset: str, blocks: int) -> DitConfig:
    """Read a preset and keep some of its blocks."""
    section = yaml.safe_load((_PRESETS / f"{preset}.yaml").read_text(encoding="utf-8"))["model"]
    found: DitConfig = from_dict(DitConfig, section | {"depth": blocks})
    return found


def with_share(row: Row, flops: float, tokens: int, peak: float) -> Row:
    """Add rates to a row.

    Args:
        row: Seconds per 1,000 passes.
        flops: Of a pass, forward and backward.
        tokens: Of a pass.
        peak: Dense operations per second.

    Returns:
        The row with ``tokens/s`` and ``MFU %``.
    """
    seconds = [wall_s / 1000 for wall_s in row.wall_s]
    rates = {"tokens/s": [tokens / one for one in seconds], "MFU %": [100 * flops / one / peak for one in seconds]}
    return dataclasses.replace(row, figures=rates)


def peak_of(device: torch.device, dtype: torch.dtype) -> float:
    """Look up the maker's dense peak of a device, or measure a product where the table lacks it."""
    known = find_peak(torch.cuda.get_device_name()) if device.type == "cuda" else None
    flops = None if known is None else known.flops("bf16" if dtype == torch.bfloat16 else "fp32")
    return measure_peak(device, dtype) if flops is None else flops


def inputs(
    config: DitConfig, cells: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Conditioning]:
    """Draw one sample of a size, its time and its text."""
    x = torch.randn(1, config.latent_channels, *cells, device=device, dtype=dtype)
    assert config.text_dim is not None
    text = torch.randn(1, _PROMPT, config.text_dim, device=device, dtype=dtype)
    mask = torch.ones(1, _PROMPT, dtype=torch.bool, device=device)
    return x, torch.full((1,), 0.5, device=device), Conditioning(text=text, text_mask=mask)


def _systems(model: Dit, given: tuple[Tensor, Tensor, Conditioning], device: torch.device) -> list[System]:
    kernels = attention.available_backends()
    flash = next((name for name in ("flash_attn_4", "flash_attn_2") if kernels[name]), None)
    on_gpu = device.type == "cuda"
    usable = flash is not None and on_gpu
    own = System(
        name=f"ltd, {flash or 'flash-attn'}",
        run=functools.partial(_passes, model, given) if usable else None,
        missing="" if usable else ("flash-attn is not installed" if on_gpu else "flash-attn needs a GPU"),
        ours=usable,
    )
    plain: Callable[[], int] = functools.partial(_passes, model, given, without_flash=True)
    return [own, System(name="ltd, torch's SDPA", run=plain, ours=not usable)]


def _passes(model: Dit, given: tuple[Any, ...], *, without_flash: bool = False) -> int:
    with _sdpa_only(without_flash):
        for _ in range(_STEPS):
            out: Any = model(*given)
            out.float().square().mean().backward()
            model.zero_grad(set_to_none=True)
        if given[0].is_cuda:
            torch.cuda.synchronize()
    return _STEPS


@contextmanager
def _sdpa_only(wanted: bool) -> Iterator[None]:
    """Take torch's kernel although another is installed."""
    chosen = attention.select_backend
    if wanted:
        attention.select_backend = lambda *_, **__: "sdpa"  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.select_backend = chosen


def _tiny() -> DitConfig:
    return dataclasses.replace(stack("wan_1.3b", 1), width=32, num_heads=2, mlp_width=64, rope_split=None)
