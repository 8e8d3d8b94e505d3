"""What each member of a sequence group encodes and trains on, in the denoiser's own step; part of ``worker.py``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ltd.config import load
from ltd.data import Batch
from ltd.denoisers import build_denoiser
from ltd.parallel import Layout, ParallelConfig, sequence
from ltd.training import step
from ltd.training.denoiser import DenoiserRun, DenoiserStage

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "debug" / "denoiser.yaml"
MICRO_BATCHES, ROWS = 2, 3


class Plain:
    """The part of an engine that a step's forward and backward passes use."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.latents: list[Tensor] = []

    def __call__(self, x_t: Tensor, *conditions: Any) -> Tensor:
        self.latents.append(x_t.detach())
        return self.module(x_t, *conditions)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def own_batch(rank: int, micro: int) -> Batch:
    """Frames that say whose they are: one value per sample."""
    draws = tuple(100 * rank + 10 * micro + row for row in range(ROWS))
    return Batch(
        keys=tuple(map(str, draws)),
        draws=draws,
        weight=torch.ones(ROWS),
        captions=tuple(f"sample {draw}" for draw in draws),
        fps=torch.zeros(ROWS),
        pixels=torch.tensor(draws, dtype=torch.uint8).view(ROWS, 1, 1, 1, 1).expand(ROWS, 9, 32, 32, 3),
        kinds=("video",) * ROWS,
    )


def check_encoded_once() -> dict[str, Any]:
    layout = Layout.from_environment(ParallelConfig(sequence=2, zero=0, precision="fp32"))
    run = load(DenoiserRun, CONFIG, ["data.shards=nowhere", "parallel.sequence=2"])
    torch.manual_seed(0)
    model = build_denoiser(run.model)
    sequence.shard(model, layout)
    engine = Plain(model)
    stage = DenoiserStage(run, engine, layout)
    frames: list[list[int]] = []
    captions: list[list[str]] = []
    encode, encode_text = stage.inputs.autoencoder.encode, stage.inputs.encoder.encode

    def counted(video: Tensor) -> Any:
        frames.append(((video[:, 0, 0, 0, 0] + 1) * 127.5).round().int().tolist())
        return encode(video)

    def counted_text(texts: list[str]) -> Any:
        captions.append(texts)
        return encode_text(texts)

    stage.inputs.autoencoder.encode, stage.inputs.encoder.encode = counted, counted_text
    batches = [own_batch(layout.sequence_rank, micro) for micro in range(MICRO_BATCHES)]
    session = SimpleNamespace(
        layout=layout, engine=engine, critic=None, beat=SimpleNamespace(enter=lambda phase, step: None)
    )
    sums = step._backward(session, stage, batches, 1.0, 1, None)
    return {
        "frames": layout.gather_objects(frames),
        "captions": layout.gather_objects(captions),
        "trained": layout.gather_objects([draws.tolist() for draws, _ in sums.losses]),
        "passes": layout.gather_objects(len(engine.latents)),
        "losses": layout.gather_objects([loss.tolist() for _, loss in sums.losses]),
    }
