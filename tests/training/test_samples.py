"""Sampling while training: what is written, that it is what sampling gives, and that training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from ltd import config as config_io
from ltd import storage
from ltd.config import ConfigError
from ltd.data.decode import decode_image
from ltd.denoisers import load
from ltd.diffusion import GuidanceConfig, SamplerConfig
from ltd.encoders.text import build_text_encoder
from ltd.inference.generate import Generator, Request
from ltd.shapes import VideoShape
from ltd.training.denoiser import DenoiserRun
from ltd.training.latent_inputs import open_autoencoder
from tests import launched

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "debug" / "denoiser.yaml"
SMALL = ("toy_data.num_samples=8", "toy_data.num_heldout=2", "data.global_batch=2", "evaluation.every=0")
SMALL += ("optim.lr=0.02", "optim.warmup_steps=0", "steps=4", "ema.decays=[0.5]")
PROMPTS = ("a red square moves right", "a blue disc", "nothing")


def sampled(folder: Path, every: int = 2, *more: str) -> tuple[str, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    chosen = ("samples.steps=2", "samples.batch_size=2", "samples.shapes=[[1,32,32],[5,32,32]]")
    return (f"samples.prompts={folder / 'prompts.txt'}", f"samples.every={every}", *chosen, *more)


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = storage.Reader(storage.checkpoint_path(run_dir, 4))
    return {f"{group}.{name}": x for group in reader.groups() for name, x in reader.read_full(group).items()}


def rows(run_dir: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss/denoise"], row["optim/grad_norm"], row["data/keys_hash"]) for row in lines]


def launch(run_dir: Path, zero: int, *overrides: str) -> None:
    launched.train(str(CONFIG), f"run_dir={run_dir}", f"parallel.zero={zero}", *SMALL, *overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("samples")
    for name, more in (("plain", ()), ("sampled", sampled(folder))):
        arguments = [str(CONFIG), f"run_dir={folder / name}", "parallel.engine=torch", *SMALL, *more]
        assert train.main(arguments) == 0
    return {name: folder / name for name in ("plain", "sampled")}


def test_training_goes_on_bit_for_bit(runs: dict[str, Path]) -> None:
    plain, with_samples = state(runs["plain"]), state(runs["sampled"])
    assert plain.keys() == with_samples.keys()
    assert all(torch.equal(value, with_samples[name]) for name, value in plain.items())
    assert rows(runs["plain"]) == [row for row in rows(runs["sampled"]) if row in rows(runs["plain"])]


def test_files_of_every_sampled_step_are_written_and_logged(runs: dict[str, Path]) -> None:
    folders = sorted(path.name for path in (runs["sampled"] / "samples").iterdir())
    assert folders == ["step-00000002", "step-00000004"]
    for name in folders:
        folder = runs["sampled"] / "samples" / name
        listed = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in listed] == [*PROMPTS, *PROMPTS] and (folder / "grid.png").is_file()
        made = {"step": int(name[-8:]), "seed": 0, "steps": 2, "solver": "euler", "guidance": 4.0, "weights": "ema_0.5"}
        assert all(made.items() <= row.items() for row in listed)
    media = [json.loads(line) for line in (runs["sampled"] / "media.jsonl").read_text().splitlines()]
    grids = [row for row in media if row["name"] == "eval/samples_grid"]
    assert len(media) == 12 + 2 and {row["step"] for row in media} == {row["step"] for row in grids} == {2, 4}
    assert [row["path"] for row in grids] == [f"samples/{name}/grid.png" for name in folders]
    assert all((runs["sampled"] / row["path"]).is_file() for row in media)


def test_samples_are_those_of_the_averaged_weights(runs: dict[str, Path]) -> None:
    run = config_io.load(DenoiserRun, runs["sampled"] / "config.yaml")
    sampler = SamplerConfig(steps=2, guidance=GuidanceConfig(scale=4.0))
    text = build_text_encoder(run.text)
    requests = [Request(prompt=p, repetition=0, shape=VideoShape(1, 32, 32), fps=24.0) for p in PROMPTS[:2]]
    frames = {}
    for weights in ("ema_0.5", "raw"):
        generator = Generator(load(runs["sampled"], weights=weights), open_autoencoder(run), text, sampler=sampler)
        frames[weights] = generator.generate(requests, seed=0).numpy()
    folder = runs["sampled"] / "samples" / "step-00000004"
    for row in range(2):
        written = decode_image((folder / f"{row:04d}.png").read_bytes())[0]
        assert np.array_equal(written, frames["ema_0.5"][row, 0])
        assert not np.array_equal(written, frames["raw"][row, 0])


@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_train_on_bit_for_bit_and_share_the_samples(
    zero: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    more = ("parallel.precision=fp32",)
    launch(tmp_path / "plain", zero, *more)
    launch(tmp_path / "sampled", zero, *more, *sampled(tmp_path))
    plain, with_samples = state(tmp_path / "plain"), state(tmp_path / "sampled")
    assert all(torch.equal(value, with_samples[name]) for name, value in plain.items())
    folder = tmp_path / "sampled" / "samples" / "step-00000002"
    assert len(list(folder.glob("*.png"))) == 4 and len(list(folder.glob("*.mp4"))) == 3
    for number in range(3):
        ours, one = (
            decode_image((path / f"{number:04d}.png").read_bytes())[0].astype(int)
            for path in (folder, runs["sampled"] / "samples" / "step-00000002")
        )
        assert np.abs(ours - one).max() <= 2  # one process, other sums


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("samples.prompts=/nowhere.txt",), "samples.prompts: /nowhere.txt does not exist"),
        (("samples.shapes=[[4,32,32]]",), "samples.shapes: 4x32x32"),
        (("samples.decay=0.9",), "samples.decay: got 0.9"),
        (
            ("samples.prompts=null", "text=null", "model.text_dim=null"),
            "samples.guidance: got 4, but the denoiser takes neither text nor classes; needed 1",
        ),
    ],
)
def test_mistakes_end_before_any_step(
    overrides: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(CONFIG), f"run_dir={tmp_path / 'run'}", "parallel.engine=torch", *SMALL, *sampled(tmp_path)]
    with pytest.raises(SystemExit):
        train.main([*arguments, *overrides])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "samples").exists()


def test_bad_numbers_name_the_field() -> None:
    with pytest.raises(ConfigError, match="samples.per_prompt: got 0"):
        config_io.load(DenoiserRun, CONFIG, ["samples.prompts=x", "samples.per_prompt=0"])
    with pytest.raises(ConfigError, match="samples.shapes: got"):
        config_io.load(DenoiserRun, CONFIG, ["samples.prompts=x", "samples.shapes=[[0,1,1]]"])
