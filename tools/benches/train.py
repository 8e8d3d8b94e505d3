"""Whole training steps through ``train.py`` against the plainest torch loop with the same model.

The plain loop has all latents and texts in memory, draws a batch of them, and does forward, loss, backward, clipping,
torch's AdamW and an average by hand: no files, no accounting, no guards, no checkpoints, no exact resumption. Ours is
the program as users start it, on a latent cache and on media that its frozen autoencoder encodes in the loop, alone and
on two processes under ZeRO. Its first steps, until the first row of the log, are left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltd import autoencoders
from ltd.autoencoders import AutoencoderConfig, build_autoencoder
from ltd.config import from_dict
from ltd.data import ViewConfig
from ltd.data.synthetic import make_toy_shards
from ltd.denoisers import Conditioning, DitConfig, DitInputs, build_denoiser, count_flops
from ltd.encoders.text import TextEncoderConfig
from ltd.inference.cache import CacheConfig, build_caches
from ltd.planning import measure_peak
from tools.benches.table import Row

KIND = "train"
NAME = "train"
ROOT = Path(__file__).resolve().parents[2]
LAYOUT = "stands in each row: processes, ZeRO stage; gloo between processes, one thread each"
_TIMEOUT_S = 1800.0
_TEXT = {"kind": "bytes", "dim": 32, "max_length": 48}
_AUTOENCODER = {
    "kind": "causal_vae",
    "latent_channels": 8,
    "front": [1, 2, 2],
    "channels": [16, 32],
    "factors": [[4, 4, 4]],
    "encoder_blocks": [1, 1],
    "decoder_blocks": [1, 1],
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large model, data and batches are, and how many steps are timed."""

    width: int = 384
    depth: int = 6
    #: Side in pixels of clips of 9 frames; a latent cell is 4 x 8 x 8.
    side: int = 128
    samples: int = 64
    batch: int = 4
    #: Steps that are timed; as many before them are not.
    steps: int = 12

    @property
    def model(self) -> dict[str, Any]:
        """Configuration of the denoiser."""
        sizes = {"width": self.width, "depth": self.depth, "num_heads": max(1, self.width // 64)}
        return {"latent_channels": 8, "patch": [1, 1, 1], "text_dim": _TEXT["dim"], **sizes}


FULL, TINY = Size(), Size(width=32, depth=1, side=32, samples=8, batch=2, steps=2)


def _shapes(size: Size) -> str:
    cells = size.side // 8
    return (
        f"width {size.width}, {size.depth} blocks; clips of 9 x {size.side} x {size.side} pixels, 8 x 3 x {cells} x "
        f"{cells} latents, patches of 1; a global batch of {size.batch}, fp32"
    )


SHAPES, TINY_SHAPES = _shapes(FULL), _shapes(TINY)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to start ``train.py``."""

    name: str
    processes: int = 1
    cached: bool = True
    overrides: tuple[str, ...] = ("parallel.engine=torch",)


CASES = (
    Case(name="latent cache, 1 process"),
    Case(name="media, 1 process", cached=False),
    *(
        Case(
            name=f"latent cache, 2 processes, ZeRO-{stage}",
            processes=2,
            overrides=("parallel.engine=deepspeed", f"parallel.zero={stage}"),
        )
        for stage in range(4)
    ),
)


def measure(repeats: int, *, tiny: bool = False) -> list[Row]:
    """Train in rounds.

    Args:
        repeats: Rounds; each runs every case and the plain loop.
        tiny: The smallest sizes and fewest cases, to see that it runs.

    Returns:
        Rows per 1,000 steps; rates and shares stand in columns of their own.
    """
    size = TINY if tiny else FULL
    cases = list(CASES[:2] if tiny else CASES)
    walls: dict[str, list[float]] = {}
    figures: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="ltd-bench-train-") as made:
        folder = Path(made)
        plain = _Plain(folder, size)
        for turn in range(repeats):
            order = cases[turn % len(cases) :] + cases[: turn % len(cases)]
            for case in order:
                wall, found = _run(folder, case, size, turn, plain.peak)
                walls.setdefault(case.name, []).append(wall)
                figures.setdefault(case.name, []).append(found)
            wall, found = plain.run()
            walls.setdefault("", []).append(wall)
            figures.setdefault("", []).append(found)
    rows = []
    for name, times in walls.items():
        columns = {key: [found.get(key) for found in figures[name]] for key in _COLUMNS}
        rows.append(
            Row(
                work=f"a step of training; MFU of {plain.peak / 1e9:.4g} x 10^9 operations/s",
                system=f"ltd train.py, {name}" if name else f"torch {torch.__version__}, plain loop, latents in memory",
                wall_s=times,
                ours=name == CASES[0].name,
                figures={key: [v for v in values if v is not None] for key, values in columns.items()},
            )
        )
    return sorted(rows, key=lambda row: not row.ours)


#: Columns of the table.
_COLUMNS = ("tokens/s", "MFU %", "MFU with encoders %", "data wait %")


def summary(rows: Sequence[Row]) -> list[str]:
    """Say what the loop costs over a plain one."""
    own, peer = next(row for row in rows if row.ours), next(row for row in rows if "plain loop" in row.system)
    ratio = statistics.median(b / a for a, b in zip(own.wall_s, peer.wall_s, strict=True))
    return [
        f"- On a latent cache, alone: the plain loop takes {ratio:.2f} times our wall time a step.",
        "- MFU is of one matrix product for all rows, timed before the first round; its rate stands with the work.",
    ]


def _run(folder: Path, case: Case, size: Size, turn: int, peak: float) -> tuple[float, dict[str, float]]:
    """Train once; return seconds per 1,000 steps, and the columns."""
    run_dir = folder / f"run-{CASES.index(case)}-{turn}"
    shards = folder / "cache" if case.cached else folder / "shards"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
    command = [sys.executable, *(launcher if case.processes > 1 else []), "train.py", str(folder / "run.yaml")]
    command += [f"run_dir={run_dir}", f"data.shards={shards}", *case.overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{case.name}: exit code {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["step"] == 2 * size.steps)
    return size.batch / row["perf/samples_per_s"] * 1000, columns_of(row, peak)


def columns_of(row: dict[str, float], peak: float) -> dict[str, float]:
    """Read a table's columns from a run's metrics.

    Args:
        row: Of ``metrics.jsonl``. Its own shares are of a peak that each run times anew, so they do not compare.
        peak: Operations per second of one process, the same for all rows of the table.

    Returns:
        The figures by column.
    """
    shares = {"MFU %": "model_tflops", "MFU with encoders %": "total_tflops"}
    return {
        "tokens/s": row["perf/tokens_per_s"],
        **{column: 100 * row[f"perf/{name}"] * 1e12 / peak for column, name in shares.items()},
        "data wait %": 100 * row["perf/data_wait_share"],
    }


class _Plain:
    """Data for all, and the plainest loop on them."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.size = size
        torch.manual_seed(0)
        autoencoder = build_autoencoder(from_dict(AutoencoderConfig, _AUTOENCODER))
        autoencoders.save(autoencoder, folder / "autoencoder")
        make_toy_shards(
            folder / "shards",
            num_videos=size.samples,
            num_images=0,
            num_frames=9,
            height=size.side,
            width=size.side,
            seed=0,
        )
        view = ViewConfig(num_frames=9, height=size.side, width=size.side)
        text = from_dict(TextEncoderConfig, _TEXT)
        given = {"shards": str(folder / "shards"), "out": str(folder / "cache")}
        build_caches(
            CacheConfig(**given, autoencoder=str(folder / "autoencoder"), text=text, views=(view,), num_workers=1)
        )
        (folder / "run.yaml").write_text(json.dumps(_yaml(folder, size)))  # JSON is YAML
        self.config: DitConfig = from_dict(DitConfig, size.model)
        self.model = build_denoiser(self.config)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        cells = (3, size.side // 8, size.side // 8)
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(size.samples, 8, *cells, generator=generator)
        self.text = torch.randn(size.samples, int(_TEXT["max_length"]), int(_TEXT["dim"]), generator=generator)
        self.peak = measure_peak(torch.device("cpu"), torch.float32)

    def run(self) -> tuple[float, dict[str, float]]:
        """Train; return seconds per 1,000 steps, and the columns."""
        for _ in range(2):
            self._step()
        start = time.perf_counter()
        for _ in range(self.size.steps):
            inputs = self._step()
        seconds = (time.perf_counter() - start) / self.size.steps
        work = count_flops(self.config, inputs)
        share = 100 * float(work.all.training) / seconds / self.peak
        rates = {"tokens/s": work.patches / seconds, "MFU %": share, "MFU with encoders %": share, "data wait %": 0.0}
        return seconds * 1000, rates

    def _step(self) -> DitInputs:
        rows = torch.randint(self.size.samples, (self.size.batch,))
        x0, text = self.latents[rows], self.text[rows]
        eps, t = torch.randn_like(x0), torch.rand(len(x0))
        x_t = torch.lerp(x0, eps, t.view(-1, 1, 1, 1, 1))
        cond = Conditioning(text=text, text_mask=torch.ones(text.shape[:2], dtype=torch.bool))
        out: Any = self.model(x_t, t, cond)
        loss: Tensor = F.mse_loss(out, eps - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(self.average, self.model.parameters(), strict=True):
                average.lerp_(parameter, 0.001)
        return DitInputs.of(x_t, cond)


def _yaml(folder: Path, size: Size) -> dict[str, Any]:
    view = {"num_frames": 9, "height": size.side, "width": size.side}
    return {
        "kind": "denoiser",
        "run_dir": str(folder / "run"),
        "steps": 2 * size.steps,
        "log_every": size.steps,
        "num_threads": 1,
        "autoencoder": str(folder / "autoencoder"),
        "text": _TEXT,
        "model": {"kind": "dit", **size.model},
        "data": {"global_batch": size.batch, "views": [view]},
        "optim": {"lr": 1.0e-3, "warmup_steps": 2},
        "ema": {"decays": [0.999]},
        "parallel": {"precision": "fp32"},
        "checkpoint": {"every": 2 * size.steps},
        "evaluation": {"every": 0},
        "accounting": {"communication_every": 0, "ledger_every": 0},
    }
