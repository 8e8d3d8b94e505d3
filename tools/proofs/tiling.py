"""Decoding in tiles, and in strips over a sequence group, against decoding whole."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltd import config
from ltd.autoencoders import Autoencoder, AutoencoderConfig, ConvVaeConfig
from ltd.inference.tiling import TilingConfig, tiled_decode, tiled_encode
from ltd.rng import generator
from ltd.training.autoencoder import AutoencoderRun
from tools.proofs.streaming import redrawn
from tools.proofs.table import Proof

NAME = "tiling"
ROOT = Path(__file__).resolve().parents[2]
#: Largest difference over the output's standard deviation.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
STRIP_DTYPES = tuple(LIMITS)
#: Rows of latents; neither 2 nor 3 processes get equal strips.
LATENT_ROWS = 11
GROUPS = (2, 3)
_SMALL: dict[str, Any] = {"encoder_width": 8, "decoder_width": 8, "multipliers": (1, 2, 2), "blocks": 1}
_NOTES = """Every weight is redrawn; 5 frames. All figures are largest differences over the output's standard deviation.
*exact*: `overlap: exact`, more than one tile along both axes, whole frame against tiles; a dash where a pixel may
depend on the whole frame, which is refused. *blended*: a fixed overlap that is less than that, with the ratio of the
step across seams to that elsewhere (1: no seam to see; random weights, so a trained model's is another). *strips*: one
clip of 11 latent rows decoded by a group of processes in uneven strips, against one process, streamed in chunks of 4
frames."""


def architectures() -> dict[str, AutoencoderConfig]:
    """List what is measured."""
    run = config.load(AutoencoderRun, ROOT / "configs" / "autoencoder" / "quickstart.yaml")
    conv = ConvVaeConfig(**_SMALL, halve_time=(False, True))
    return {
        "quickstart": run.model,
        "convolutional, no attention": dataclasses.replace(conv, attention=False),
        "Wan 2.1 design (attention)": conv,
        "Wan 2.2 design (patch, shortcuts, attention)": dataclasses.replace(conv, patch=2, shortcuts=True),
        "group norms and attention": dataclasses.replace(conv, norm="group", num_groups=4, front="repeat"),
        "norms guided by the latent": dataclasses.replace(conv, conditional_norm=True, attention=False),
    }


def model_of(architecture: AutoencoderConfig, dtype: torch.dtype) -> Autoencoder:
    """Build a model with redrawn weights."""
    return redrawn(architecture, dtype)


def latents_of(model: Autoencoder, dtype: torch.dtype, rows: int, columns: int = 4) -> Tensor:
    """Draw latents of a short clip, ``(1, c, t, rows, columns)``."""
    frames = 1 + 4 // model.compression.t
    shape = (1, model.latent_channels, frames, rows, columns)
    return torch.randn(shape, generator=generator(0, "latents"), dtype=torch.float64).to(dtype)


def _strips(members: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(members)]
    command += ["-m", "tools.proofs._strips_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{members} processes: {(done.stdout + done.stderr)[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _tiles(model: Autoencoder, dtype: torch.dtype) -> tuple[float | None, float | None, float, float]:
    """Measure exact decoding and encoding, then the blended difference and the ratio of its seams."""
    exact: list[float | None] = []
    unit = model.compression.h
    for side in ("decode", "encode"):
        halo = model.spatial_halo(side)  # type: ignore[arg-type]
        if halo is None:
            exact.append(None)
            continue
        tile = tuple((2 * reach + 2) * unit for reach in halo)
        latents = latents_of(model, dtype, 2 * halo[0] + 5, 2 * halo[1] + 4)
        tiling = TilingConfig(tile=(tile[0], tile[1]), overlap="exact")
        if side == "decode":
            found, whole = tiled_decode(model, latents, tiling).output, model.decode(latents)
        else:
            video = model.decode(latents).clamp(-1, 1)
            found, whole = tiled_encode(model, video, tiling).output.mean, model.encode(video).mean
        exact.append(float((found - whole).abs().max() / whole.std()))
    latents = latents_of(model, dtype, 12, 12)
    whole = model.decode(latents)
    tiled = tiled_decode(model, latents, TilingConfig(tile=(6 * unit, 6 * unit), overlap=2 * unit), whole=whole)
    assert tiled.seams.max_difference is not None
    return exact[0], exact[1], tiled.seams.max_difference / float(whole.std()), tiled.seams.ratio


@torch.no_grad()
def measure() -> Proof:
    """Measure every model in fp32 and fp64."""
    groups = {members: _strips(members) for members in GROUPS}
    rows, misses = [], []
    for name, architecture in architectures().items():
        for dtype, limit in LIMITS.items():
            label = str(dtype).removeprefix("torch.")
            strips = [groups[members]["differences"][f"{name} {label}"] for members in GROUPS]
            decode, encode, blended, ratio = _tiles(model_of(architecture, dtype), dtype)
            rows.append([name, label, decode, encode, blended, ratio, *strips, limit])
            for what, found in (("exact decode", decode), ("exact encode", encode), *zip(GROUPS, strips, strict=True)):
                if found is not None and found > limit:
                    misses.append(f"{name}, {label}, {what}: {found:.2e}, limit {limit:.0e}")
    for members, found in groups.items():
        if len(set(found["collectives"])) != 1:
            misses.append(f"{members} processes made {found['collectives']} collectives")
    columns = ["model", "dtype", "exact decode", "exact encode", "blended", "seam ratio"]
    columns += [*(f"strips, {members} processes" for members in GROUPS), "limit"]
    return Proof("Tiles and strips against the whole frame", columns, rows, misses, _NOTES)
