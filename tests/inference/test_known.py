"""Samples around known frames: from media to latents, that they come back, and videos that go on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from ltd import autoencoders
from ltd.data.decode import decode_clip, decode_image
from ltd.data.write import write_image, write_video
from ltd.denoisers import Task
from ltd.diffusion import GuidanceConfig, SamplerConfig
from ltd.inference.generate import Generator, Request, load_generator
from ltd.inference.known import Given, arrange, known_latents
from ltd.inference.media import pixels_to_video
from ltd.shapes import VideoShape
from tests.inference.jobs_worker import make_run

SHAPE = VideoShape(9, 32, 32)
GENERATOR = np.random.default_rng(0)
CLIP = GENERATOR.integers(0, 255, (9, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module", params=["times", "channels"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_run(folder, f"model.frames={request.param}", "model.frame_mask_channels=2")
    write_image(folder / "first.png", CLIP[0])
    write_image(folder / "last.png", CLIP[-1])
    write_video(folder / "clip.mp4", CLIP, 8.0)
    return folder


def generator(run: Path, scale: float = 3.0) -> Generator:
    sampler = SamplerConfig(steps=3, guidance=GuidanceConfig(scale=scale))
    return load_generator(run / "run", sampler=sampler)


def draw(made: Generator, given: Given | None, prompts: tuple[str, ...] = ("a disc", "a square")) -> torch.Tensor:
    requests = [Request(prompt=p, repetition=0, shape=SHAPE, fps=8.0, given=given) for p in prompts]
    return made.autoencoder.normalize(made.draw_latents(requests, made.condition(list(prompts)), seed=1))


@pytest.mark.parametrize(
    ("task", "media", "options", "frames"),
    [
        ("image_to_video", ["first.png"], {}, [0]),
        ("first_last", ["first.png", "last.png"], {}, [0, 2]),
        ("extension", ["clip.mp4"], {"known": 2}, [0, 1]),
        ("retrodiction", ["clip.mp4"], {"known": 1}, [2]),
        ("interpolation", ["clip.mp4"], {"known": 2}, [0, 2]),
    ],
)
def test_known_latents_come_back_and_the_rest_does_not_stay(
    run: Path, task: Task, media: list[str], options: dict[str, int], frames: list[int]
) -> None:
    made = generator(run)
    given = Given(task=task, media=tuple(str(run / name) for name in media), **options)  # type: ignore[arg-type]
    latents, free = draw(made, given), draw(made, None)
    clip = arrange(given, [_read(Path(path)) for path in given.media], SHAPE, 4)
    known, mask = known_latents(given, clip, made.autoencoder, (1, 1, 1))
    assert [t for t in range(3) if mask[0, 0, t].all()] == frames and mask.sum() == len(frames) * 16
    back = made.autoencoder.normalize(made.autoencoder.denormalize(known))  # the way the latents took
    for row in latents:
        assert torch.equal(row[:, frames], back[0][:, frames])
    others = [t for t in range(3) if t not in frames]
    assert (latents[:, :, others] - free[:, :, others]).abs().max() > 1e-3  # the rest answers to it
    assert not torch.equal(latents[0][:, others], latents[1][:, others])


def _read(path: Path) -> np.ndarray:
    data = path.read_bytes()
    return decode_image(data) if path.suffix == ".png" else decode_clip(data, start=0, num_frames=9)


def test_latents_of_known_frames_are_those_of_the_frames_alone(run: Path) -> None:
    made = generator(run)
    given = Given(task="extension", media=(str(run / "clip.mp4"),), known=2)
    whole = _read(run / "clip.mp4")
    latents, _ = known_latents(given, arrange(given, [whole], SHAPE, 4), made.autoencoder, (1, 1, 1))
    tail = pixels_to_video(torch.from_numpy(whole[-5:])[None])
    alone = made.autoencoder.normalize(made.autoencoder.encode(tail).mean)
    assert torch.allclose(latents[:, :, :2], alone, atol=1e-5)  # what lies behind them changes nothing


def test_the_hole_of_inpainting_is_drawn_and_nothing_else(run: Path) -> None:
    made = generator(run)
    given = Given(task="inpainting", media=(str(run / "clip.mp4"),), box=(8, 8, 16, 8))
    latents = draw(made, given)
    known, mask = known_latents(given, _read(run / "clip.mp4"), made.autoencoder, (1, 1, 1))
    hole = (~mask[0, 0, 0]).nonzero()
    assert hole.min(0).values.tolist() == [1, 1] and hole.max(0).values.tolist() == [2, 1]
    back = made.autoencoder.normalize(made.autoencoder.denormalize(known))
    assert torch.equal(latents[0][:, mask[0, 0]], back[0][:, mask[0, 0]])
    with pytest.raises(ValueError, match="needed multiples of"):
        known_latents(Given(task="inpainting", media=given.media, box=(3, 4, 8, 8)), CLIP, made.autoencoder, (1, 1, 1))


def test_a_batch_may_mix_given_and_free_samples(run: Path) -> None:
    made = generator(run)
    given = Given(task="image_to_video", media=(str(run / "first.png"),))
    requests = [Request(prompt=p, repetition=0, shape=SHAPE, fps=8.0, given=g) for p, g in (("x", given), ("y", None))]
    mixed = made.draw_latents(requests, made.condition(["x", "y"]), seed=1)
    free = made.draw_latents(requests[1:], made.condition(["y"]), seed=1)
    assert torch.allclose(mixed[1:], free, atol=1e-4)


def command(run: Path, out: Path, *more: str, prompts: str = "a disc\n") -> int:
    (run / "prompts.txt").write_text(prompts)
    arguments = [str(run / "run"), "--prompts", str(run / "prompts.txt"), "--out", str(out), "--shapes", "9x32x32"]
    return sample.main([*arguments, "--steps", "2", "--guidance", "2", *more])


def test_a_video_goes_on_segment_by_segment(run: Path, tmp_path: Path) -> None:
    assert command(run, tmp_path / "one") == 0
    assert command(run, tmp_path / "three", "--segments", "3", "--overlap", "2") == 0
    one, three = (
        decode_clip((tmp_path / name / "0000.mp4").read_bytes(), start=0, num_frames=n)
        for name, n in (
            ("one", 9),
            ("three", 9 + 2 * 4),
        )
    )
    difference = np.abs(three[:9].astype(int) - one.astype(int))
    assert difference.mean() < 3  # the same frames, compressed with others behind them
    assert np.abs(three[9:13].astype(int) - three[13:].astype(int)).mean() > 1


def test_prompts_may_say_what_is_given(run: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "condition": str(run / "first.png")},
        {"prompt": "b", "condition": [str(run / "first.png"), str(run / "last.png")], "task": "first_last"},
        {"prompt": "c"},
    ]
    assert command(run, tmp_path / "out", prompts="\n".join(map(json.dumps, rows))) == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [row.get("task") for row in listed] == ["image_to_video", "first_last", None]


@pytest.mark.parametrize(
    ("more", "prompts", "message"),
    [
        (("--task", "extension"), "a\n", "--task: extension needs --condition FILE"),
        (("--condition", "/nowhere.png"), "a\n", "condition: /nowhere.png does not exist"),
        ((), '{"prompt": "a", "conditon": "x"}', "got ['conditon']"),
        ((), "{not json", "a line is not JSON"),
        (("--condition", "{run}/first.png", "--task", "interpolation"), "a\n", "has 1 frames, task interpolation"),
        (("--condition", "{run}/clip.mp4", "--box", "1,2,3"), "a\n", "--box: got '1,2,3'"),
        (("--segments", "0"), "a\n", "--segments: must be at least 1"),
    ],
)
def test_mistakes_end_before_any_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], prompts: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(run, tmp_path / "out", *(word.format(run=run) for word in more), prompts=prompts)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out" / "0000.mp4").exists()


def test_a_denoiser_without_known_frames_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    write_image(tmp_path / "first.png", CLIP[0])
    with pytest.raises(SystemExit):
        command(tmp_path, tmp_path / "out", "--condition", str(tmp_path / "first.png"))
    assert "trained without known frames" in capsys.readouterr().err
    assert autoencoders.load(tmp_path / "autoencoder").compression.t == 4
