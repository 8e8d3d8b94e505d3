"""Samples around known frames: from media to latents, that they come back, and videos that go on."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sample
from ltd import autoencoders
from ltd.config import ConfigError
from ltd.data.decode import decode_clip, decode_image
from ltd.data.transforms import cover
from ltd.data.write import write_image, write_video
from ltd.denoisers import Task
from ltd.diffusion import GuidanceConfig, SamplerConfig
from ltd.inference.generate import Generator, Request, load_generator
from ltd.inference.known import Given, Tail, arrange, known_latents, read_clips, tail_frames
from ltd.inference.media import pixels_to_video
from ltd.inference.segments import make_segments, segment_length
from ltd.shapes import VideoShape
from tests import launched
from tests.inference.jobs_worker import make_run

SHAPE = VideoShape(9, 32, 32)
GENERATOR = np.random.default_rng(0)
CLIP = GENERATOR.integers(0, 255, (9, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module", params=["times", "channels"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    channels = 2 if request.param == "channels" else 1
    make_run(folder, f"model.frames={request.param}", f"model.frame_mask_channels={channels}")
    write_image(folder / "first.png", CLIP[0])
    write_image(folder / "last.png", CLIP[-1])
    write_video(folder / "clip.mp4", CLIP, 8.0)
    return folder


def generator(run: Path, scale: float = 3.0) -> Generator:
    sampler = SamplerConfig(steps=3, guidance=GuidanceConfig(scale=scale))
    return load_generator(run / "run", sampler=sampler)


def draw(made: Generator, given: Given | None, prompts: tuple[str, ...] = ("a disc", "a square")) -> torch.Tensor:
    requests = [Request(prompt=p, repetition=0, shape=SHAPE, fps=8.0, given=given) for p in prompts]
    return made.autoencoder.normalize(made.draw_latents(requests, made.condition(requests), seed=1))


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
    mixed = made.draw_latents(requests, made.condition(requests), seed=1)
    free = made.draw_latents(requests[1:], made.condition(requests[1:]), seed=1)
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
    listed = [json.loads((tmp_path / name / "samples.jsonl").read_text()) for name in ("one", "three")]
    assert [(row["num_frames"], row.get("segments")) for row in listed] == [(9, None), (17, 3)]
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
        (
            ("--condition", "{run}/first.png", "--task", "interpolation", "--known", "2"),
            "a\n",
            "has 1 frames, task inter",
        ),
        (("--condition", "{run}/clip.mp4", "--task", "interpolation"), "a\n", "known: got 1 for task interpolation"),
        (
            ("--condition", "{run}/clip.mp4", "--task", "extension", "--known", "3"),
            "a\n",
            "known = 3, needed at least 4",
        ),
        (("--condition", "{run}/clip.mp4", "--task", "inpainting", "--box", "0,0,8,40"), "a\n", "lies outside 4x4"),
        (("--condition", "{run}/first.png", "--task", "first_last"), "a\n", "got one image"),
        (("--condition", "{run}/first.png", "{run}/last.png"), "a\n", "needed the names of 1 files"),
        (("--condition", "{run}/prompts.txt"), "a\n", "prompts.txt cannot be read"),
        ((), '{"prompt": "a", "condition": 5}', "got condition 5"),
        ((), '{"prompt": "a", "condition": "{run}/first.png", "known": "2"}', "known: got '2'"),
        (("--segments", "2", "--overlap", "3"), "a\n", "--overlap: got 3, needed fewer than"),
        (("--segments", "2", "--shapes", "1x32x32"), "a\n", "--overlap: got 1, needed fewer than"),
        (
            ("--segments", "2", "--condition", "{run}/clip.mp4", "--task", "retrodiction"),
            "a\n",
            "--segments: got 2 with task retrodiction",
        ),
        (("--condition", "{run}/clip.mp4", "--box", "1,2,3"), "a\n", "--box: got '1,2,3'"),
        (("--segments", "0"), "a\n", "--segments: must be at least 1"),
    ],
)
def test_mistakes_end_before_any_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], prompts: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(
            run,
            tmp_path / "out",
            *(word.format(run=run) for word in more),
            prompts=prompts.replace("{run}", str(run)),
        )
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out" / "0000.mp4").exists()


def test_a_denoiser_without_known_frames_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    write_image(tmp_path / "first.png", CLIP[0])
    for more in (("--condition", str(tmp_path / "first.png")), ("--segments", "2")):
        with pytest.raises(SystemExit):
            command(tmp_path, tmp_path / "out", *more)
        assert "trained without known frames" in capsys.readouterr().err
    assert autoencoders.load(tmp_path / "autoencoder").compression.t == 4


def test_a_guide_that_takes_frames_otherwise_is_refused(run: Path, tmp_path: Path) -> None:
    made = generator(run)
    make_run(tmp_path)
    made.guide = generator(tmp_path).denoiser
    given = Given(task="image_to_video", media=(str(run / "first.png"),))
    made.check(SHAPE)
    with pytest.raises(ConfigError, match="trained without known frames"):
        made.check(SHAPE, given)
    other = {"times": "channels", "channels": "times"}[made.denoiser.config.frames]
    (tmp_path / "other").mkdir()
    make_run(tmp_path / "other", f"model.frames={other}")
    made.guide = generator(tmp_path / "other").denoiser
    with pytest.raises(ConfigError, match="guide: takes known frames as"):
        made.check(SHAPE, given)


def test_only_the_frames_that_are_needed_are_read(run: Path) -> None:
    """The last five of nine, scaled to the sample's size."""
    shape = VideoShape(9, 16, 16)
    given = Given(task="extension", media=(str(run / "clip.mp4"),), known=2)
    (clip,) = read_clips(given, shape, 4)
    expected = cover(_read(run / "clip.mp4")[-5:], 16, 16)
    assert clip.shape == expected.shape == (5, 16, 16, 3)
    assert np.abs(clip.astype(int) - expected.astype(int)).mean() < 4
    ends = read_clips(Given(task="first_last", media=(str(run / "clip.mp4"),)), SHAPE, 4)
    assert np.array_equal(np.concatenate(ends), _read(run / "clip.mp4")[[0, -1]])


def test_segments_begin_with_the_end_of_the_one_before_and_leave_nothing_behind() -> None:
    seen: list[Tail | None] = []
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def draw(tail: Tail | None) -> torch.Tensor:
        nonlocal most
        seen.append(tail)
        most = max(most, len(alive))
        frames = torch.full((2, 3, 9, 2, 2), len(seen) / 255) * torch.arange(1, 10).view(-1, 1, 1) - 1
        if len(seen) == 3:
            frames[1, 0, 0, 0, 0] = torch.nan
        alive.add(frames)
        return frames

    pixels, finite = [], []
    for new, right in make_segments(draw, 6, 2, 5):
        pixels.append(new[0, :, 0, 0, 0].clone())
        finite.append(right.tolist())
        alive.add(new)
        del new
    assert most <= 1, "what is alive when a segment begins: the frames that the loop still holds"
    assert [tail if tail is None else tail.segment for tail in seen] == [None, 1, 2, 3, 4, 5]
    whole = torch.cat(pixels)
    assert len(whole) == 9 + 5 * 4
    for number, tail in enumerate(seen[1:], start=1):
        assert tail is not None and tail.known == 2
        assert torch.equal(tail.pixels[0, :, 0, 0, 0], whole[: 9 + 4 * (number - 1)][-5:])
        assert tail.pixels.untyped_storage().nbytes() == 2 * 5 * 2 * 2 * 3, "no view of more"
    assert finite == [[True, True]] * 2 + [[True, False]] + [[True, True]] * 3


def test_a_sample_that_is_not_finite_in_a_later_segment_fails_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Generator.draw_latents

    def draw_latents(self: Generator, requests: list[Request], *rest: Any, **options: Any) -> torch.Tensor:
        latents = right(self, requests, *rest, **options)
        tail = options["tail"]
        if tail is not None and tail.segment == 2:
            latents[0] = torch.nan
        return latents

    monkeypatch.setattr(Generator, "draw_latents", draw_latents)
    assert command(run, tmp_path, "--segments", "3", prompts="a\nb\n") == 1
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["0001.mp4"]
    (failed,) = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert failed["number"] == 0 and "not finite" in failed["error"]


def test_the_overlap_of_a_segment_comes_back(run: Path) -> None:
    """What a segment knows are the last frames of the one before, encoded as the start of a clip: bit for bit."""
    made = generator(run)
    requests = [Request(prompt="a", repetition=0, shape=SHAPE, fps=8.0)]
    conditions = made.condition(requests)
    kept: list[torch.Tensor] = []

    def draw_one(tail: Tail | None) -> torch.Tensor:
        kept.append(made.draw_latents(requests, conditions, seed=1, tail=tail))
        return made.decode(kept[-1])

    parts = [pixels for pixels, _ in make_segments(draw_one, 2, 2, segment_length(made, 2))]
    assert [len(part[0]) for part in parts] == [9, 4]
    start = made.autoencoder.encode(pixels_to_video(parts[0][:, -5:])).mean
    again = made.autoencoder.denormalize(made.autoencoder.normalize(start))
    assert torch.allclose(kept[1][:, :, :2], again, atol=1e-5)
    tail = Tail(pixels=parts[0][:, -5:], known=2, segment=1)
    frames = tail_frames(tail, SHAPE, made.autoencoder, (1, 1, 1))
    assert torch.equal(kept[1][:, :, :2], made.autoencoder.denormalize(frames.latents)[:, :, :2])
    assert (kept[1] - kept[0]).abs().max() > 1e-2


def test_samples_do_not_depend_on_what_the_denoiser_says_of_known_cells(run: Path) -> None:
    made = generator(run)
    made.sampler = SamplerConfig(steps=3, guidance=GuidanceConfig(scale=3.0, rescale=0.7))
    given = Given(task="extension", media=(str(run / "clip.mp4"),), known=2)
    expected = draw(made, given)
    made.denoiser.register_forward_hook(  # the second row of each pair of text and no text is off too
        lambda module, inputs, v: torch.cat(
            (v[:, :, :2] + 9 * torch.arange(len(v)).view(-1, 1, 1, 1, 1), v[:, :, 2:]), 2
        )
    )
    assert torch.equal(draw(made, given), expected)
    assert not torch.equal(draw(made, None), expected)


@pytest.mark.dist
def test_known_frames_and_segments_are_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    launched.fork("tests.inference.known_worker", str(tmp_path))
    codes = json.loads((tmp_path / "codes.json").read_text())
    said = {name: [path.read_text()[-2000:] for path in (tmp_path / "logs" / name).glob("log?")] for name in codes}
    assert all(set(found) == {0} for found in codes.values()), (codes, said)
    names = ["0000.mp4", "0001.mp4", "grid.png", "samples.jsonl"]
    for one, other in (("one", "two"), ("long", "long-two")):
        assert [n for n in names if (tmp_path / one / n).read_bytes() != (tmp_path / other / n).read_bytes()] == []
    clips = [
        decode_clip((tmp_path / name / "0001.mp4").read_bytes(), start=0, num_frames=9) for name in ("one", "pair")
    ]
    assert np.abs(clips[0].astype(int) - clips[1].astype(int)).mean() < 1 and clips[0].std() > 10
    assert len(decode_clip((tmp_path / "long" / "0001.mp4").read_bytes(), start=0, num_frames=17)) == 17
