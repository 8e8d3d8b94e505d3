"""Sampling by class, with the numbers of a sample: what the denoiser is told, and what guidance makes of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sample
import train
from ltd.config import ConfigError
from ltd.data.decode import decode_image
from ltd.data.synthetic import make_toy_shards
from ltd.denoisers import Conditioning
from ltd.diffusion import GuidanceConfig, SamplerConfig
from ltd.encoders.text import BytesTextConfig, build_text_encoder
from ltd.inference.conditions import find_class, label_prompts, parse_pair
from ltd.inference.generate import Generator, Request, load_generator
from ltd.rng import DrawRandom, derive_seed
from ltd.shapes import VideoShape

ROOT = Path(__file__).resolve().parents[2]
DEBUG = ROOT / "configs" / "debug"
SHAPE = VideoShape(1, 24, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser with classes, samples of it while it was trained, and one with text and classes."""
    out = tmp_path_factory.mktemp("classes")
    make_toy_shards(out / "shards", num_videos=8, num_images=8, num_frames=9, height=32, width=32, seed=0)
    common = [f"data.shards={out}/shards", "steps=2", "evaluation.every=0", "parallel.engine=torch"]
    assert train.main([str(DEBUG / "autoencoder.yaml"), f"run_dir={out}/autoencoder", *common]) == 0
    common += [f"autoencoder={out}/autoencoder", "untrained_autoencoder=null", "optim.lr=0.02", "optim.warmup_steps=0"]
    chosen = ["samples.labels=[disc left, 0]", "samples.every=2", "samples.steps=2", "samples.shapes=[[1,24,32]]"]
    assert train.main([str(DEBUG / "denoiser_labels.yaml"), f"run_dir={out}/run", *common, *chosen]) == 0
    both = ["model.num_classes=8", "data.classes=[a,b,c,d,e,f,g,h]"]
    assert train.main([str(DEBUG / "denoiser.yaml"), f"run_dir={out}/both", *common, *both]) == 0
    (out / "prompts.txt").write_text("a red disc\na blue square\n")
    return out


def generator(folder: Path, scale: float = 3.0, run: str = "run") -> Generator:
    made = load_generator(folder / run, sampler=SamplerConfig(steps=2, guidance=GuidanceConfig(scale=scale)))
    random = torch.Generator().manual_seed(1)
    for parameter in made.denoiser.parameters():
        parameter.data.normal_(std=0.1, generator=random)
    return made


def request(label: int | None, **fields: Any) -> Request:
    return Request(**{"prompt": "", "repetition": 0, "shape": SHAPE, "fps": 8.0, "label": label, **fields})


def test_guidance_leads_away_from_the_null_class(folder: Path) -> None:
    made, requests = generator(folder), [request(3), request(5)]
    got = made.autoencoder.normalize(made.draw_latents(requests, made.condition(requests), seed=4))
    draws = [derive_seed(0, "", 0, str(SHAPE), f"class {label}") for label in (3, 5)]
    x = DrawRandom(4, draws).normal((8, 1, 3, 4), "sample")
    scalars = torch.tensor([[torch.nan, 24.0, 32.0, 0.0, 0.0]] * 2)
    with torch.no_grad():
        for t in (1.0, 0.5):
            times = torch.full((2,), t)
            cond = made.denoiser(x, times, Conditioning(label=torch.tensor([3, 5]), scalars=scalars))
            null = made.denoiser(x, times, Conditioning(label=torch.tensor([-1, -1]), scalars=scalars))
            x = x - 0.5 * (null + 3.0 * (cond - null))
    shifted = made.sampler.shift.factor
    assert shifted == 1.0 and torch.allclose(got, x, rtol=0, atol=1e-4 * float(x.std()))
    free = made.draw_latents([request(None)], made.condition([request(None)]), seed=4)
    assert not torch.equal(free[0], got[0])


def test_numbers_that_are_told(folder: Path) -> None:
    made = generator(folder)
    video = VideoShape(9, 24, 32)
    cond, null = made.condition(
        [request(0), request(0, shape=video), request(0, shape=video, fps=12.0, original=(480, 640), crop=(3, 4))]
    )
    assert cond.scalars is not None and torch.equal(cond.scalars.nan_to_num(-1), null.scalars.nan_to_num(-1))  # type: ignore[union-attr]
    assert cond.scalars.nan_to_num(-1).tolist() == [
        [-1.0, 24.0, 32.0, 0.0, 0.0],
        [8.0, 24.0, 32.0, 0.0, 0.0],
        [12.0, 480.0, 640.0, 3.0, 4.0],
    ]
    assert null.label.tolist() == [-1] * 3 and cond.text is None  # type: ignore[union-attr]


def command(folder: Path, out: Path, *more: str, run: str = "run") -> list[dict[str, Any]]:
    arguments = [str(folder / run), "--out", str(out), "--steps", "2", "--shapes", "1x24x32", "--device", "cpu", *more]
    assert sample.main(arguments) == 0
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_labels_by_name_number_and_file_are_the_same(folder: Path, tmp_path: Path) -> None:
    named = command(folder, tmp_path / "named", "--labels", "disc left", "square right", "7")
    assert [(row["label"], row["class"]) for row in named] == [(5, "disc left"), (0, "square right"), (7, "disc up")]
    (tmp_path / "labels.txt").write_text("5\n\nsquare right\n7\n")
    command(folder, tmp_path / "file", "--labels", str(tmp_path / "labels.txt"))
    pictures = [[(tmp_path / d / f"000{n}.png").read_bytes() for n in range(3)] for d in ("named", "file")]
    assert pictures[0] == pictures[1] and len(set(pictures[0])) == 3
    command(folder, tmp_path / "sized", "--labels", "5", "--original-size", "512x512", "--crop", "64,0")
    assert (tmp_path / "sized" / "0000.png").read_bytes() != pictures[0][0]


def test_samples_while_training_are_those_of_the_command(folder: Path, tmp_path: Path) -> None:
    made = folder / "run" / "samples" / "step-00000002"
    rows = [json.loads(line) for line in (made / "samples.jsonl").read_text().splitlines()]
    assert [(row["label"], row["class"]) for row in rows] == [(5, "disc left"), (0, "square right")]
    command(folder, tmp_path / "x", "--labels", "5", "0", "--guidance", "4")
    for name in ("0000.png", "0001.png"):
        ours, theirs = (decode_image((path / name).read_bytes())[0].astype(int) for path in (made, tmp_path / "x"))
        assert abs(ours - theirs).max() <= 1
    media = [json.loads(line) for line in (folder / "run" / "media.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in media] == ["disc left", "square right", "grid"]


def test_prompts_and_labels_together(folder: Path, tmp_path: Path) -> None:
    prompts = ("--prompts", str(folder / "prompts.txt"))
    rows = command(folder, tmp_path / "each", *prompts, "--labels", "b", "3", run="both")
    assert [(row["prompt"], row["label"], row["class"]) for row in rows] == [
        ("a red disc", 1, "b"),
        ("a blue square", 3, "d"),
    ]
    rows = command(folder, tmp_path / "one", *prompts, "--labels", "7", run="both")
    assert [row["label"] for row in rows] == [7, 7]
    plain = command(folder, tmp_path / "none", *prompts, run="both")
    assert all("label" not in row and "class" not in row for row in plain)


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("run", (), "--prompts: missing, needed a file with one prompt per line, or --labels"),
        ("run", ("--labels", "8"), "--labels: got 8, needed 0 to 7 (model.num_classes is 8)"),
        (
            "run",
            ("--labels", "disk left"),
            "--labels: got the class 'disk left', which is none of the 8 known; the nearest",
        ),
        ("run", ("--labels", "1", "--crop", "3"), "--crop: got '3', needed two numbers"),
        ("run", ("--labels", "1", "--original-size", "axb"), "--original-size: got 'axb'"),
        ("both", ("--labels", "1"), "--prompts: missing, but the denoiser takes text"),
        ("both", ("--prompts", "{prompts}", "--labels", "1", "2", "3"), "--labels: got 3 for 2 prompts"),
    ],
)
def test_mistakes_are_said_before_any_work(
    run: str,
    arguments: tuple[str, ...],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [word.replace("{prompts}", str(folder / "prompts.txt")) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        sample.main([str(folder / run), "--out", str(tmp_path / "out"), *given])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_classes_are_found_by_name_first_then_by_number() -> None:
    names = ("cat", "3", "tree frog", "")
    assert find_class("3", 4, names, "--labels") == (1, "3") and find_class(3, 4, (), "--labels") == (3, "")
    assert find_class(" tree frog", 4, names, "--labels") == (2, "tree frog")
    with pytest.raises(ConfigError, match="the nearest: 'tree frog'"):
        find_class("frog tree", 4, names, "--labels")
    with pytest.raises(ConfigError, match="knows no names"):
        find_class("cat", 4, (), "--labels")
    with pytest.raises(ConfigError, match="built without classes"):
        find_class(0, None, (), "--labels")
    assert label_prompts(["a", "b"], [], 4, names, "x") == [(None, ""), (None, "")]
    assert parse_pair("512x384", "x", "--original-size") == (512, 384)


def test_a_denoiser_that_is_told_nothing_cannot_be_guided(folder: Path) -> None:
    made = generator(folder)
    made.denoiser.config = dataclasses.replace(made.denoiser.config, num_classes=None)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="guidance: got 3, but the denoiser takes neither text nor classes"):
        Generator(made.denoiser, made.autoencoder, None, sampler=made.sampler)


def test_that_no_image_encoder_is_asked_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = generator(folder, scale=1.0)
    assert not any("model.image_dim" in message for message in caplog.messages)
    made.denoiser.config = dataclasses.replace(made.denoiser.config, image_dim=6, text_dim=4)  # type: ignore[assignment]
    text = build_text_encoder(BytesTextConfig(dim=4))
    Generator(made.denoiser, made.autoencoder, text, sampler=made.sampler)
    assert [message for message in caplog.messages if message.startswith("model.image_dim: samples are made without")]
