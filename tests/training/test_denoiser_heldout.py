"""The held-out loss by time quantile, size and kind: each figure is the mean that its name says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train
from ltd import config as config_io
from ltd.data import evaluation_batches
from ltd.denoisers import load
from ltd.diffusion import FlowMatching
from ltd.parallel.config import ParallelConfig
from ltd.parallel.layout import Layout
from ltd.rng import DrawRandom, derive_seed
from ltd.training.denoiser import DenoiserRun
from ltd.training.latent_inputs import LatentInputs

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "debug" / "denoiser.yaml"
SMALL = ("parallel.engine=torch", "toy_data.num_samples=8", "toy_data.num_heldout=3", "data.global_batch=2", "steps=2")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("heldout") / "run"
    views = "data.views=[{num_frames: 9, height: 32, width: 32}, {num_frames: 5, height: 32, width: 32}"
    words = [f"run_dir={run_dir}", "optim.lr=0.02", "evaluation.every=2", "evaluation.batch_size=2"]
    assert train.main([str(CONFIG), *words, *SMALL, f"{views}, {{num_frames: 1, height: 32, width: 32}}]"]) == 0
    return run_dir


@pytest.fixture(scope="module")
def row(run_dir: Path) -> dict[str, float]:
    last: dict[str, float] = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return last


def test_means_are_made_of_their_parts(row: dict[str, float]) -> None:
    names = ["eval/denoise", *(f"eval/bucket/{size}/denoise" for size in ("9x32x32", "5x32x32", "1x32x32"))]
    for name in names:
        parts = [row[f"{name}_q{number}"] for number in range(1, 5)]
        assert row[name] == pytest.approx(sum(parts) / 4, rel=1e-12) and len(set(parts)) == 4
    whole, *sizes = (row[name] for name in names)
    assert whole == pytest.approx(sum(sizes) / 3, rel=1e-12), "3 samples of each size"
    assert row["eval/denoise_video"] == pytest.approx(sum(sizes[:2]) / 2, rel=1e-12)
    assert row["eval/denoise_image"] == pytest.approx(sizes[2], rel=1e-12)


def test_a_quantile_is_the_loss_at_the_middle_of_its_part(run_dir: Path, row: dict[str, float]) -> None:
    run = config_io.load(DenoiserRun, run_dir / "config.yaml", [f"data.shards={run_dir / 'toy_data' / 'heldout'}"])
    layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)
    inputs, objective, denoiser = LatentInputs(run, layout), FlowMatching(run.objective), load(run_dir, weights="raw")
    seed, losses = derive_seed(run.seed, "heldout"), []
    with torch.no_grad():
        for batch in evaluation_batches(run.data, batch_size=3):
            if batch.shape.num_frames == 5:
                random = DrawRandom(seed, batch.draws)
                prepared = inputs.prepare(batch, random)
                x0, cond = prepared["latents"], inputs.conditioning(prepared)
                time = float(objective.evaluation_times(4, x0[0, 0].numel(), x0.shape[1])[0])
                losses += objective.loss_at(denoiser, x0, cond, random, time).tolist()
    assert row["eval/bucket/5x32x32/denoise_q1"] == pytest.approx(sum(losses) / 3, rel=1e-5)
