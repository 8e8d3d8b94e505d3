"""Shards -> autoencoder -> latent cache -> denoiser -> samples, at toy size and through the commands users type."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import sample
import train
from ltd import autoencoders, denoisers
from ltd.config import ConfigError
from ltd.data.decode import decode_clip, decode_image
from ltd.data.index import open_index
from ltd.data.latents import LatentCache
from ltd.data.synthetic import make_toy_shards
from ltd.data.windows import enumerate_windows, load_window
from ltd.denoisers import Conditioning
from ltd.diffusion import GuidanceConfig, SamplerConfig, ShiftConfig
from ltd.diffusion import sample as integrate
from ltd.diffusion.paths import GvpPathConfig
from ltd.diffusion.prediction import ParametrizationConfig
from ltd.inference.generate import Generator, Request, batches, load_generator
from ltd.inference.media import pixels_to_video, tile, video_to_pixels
from ltd.rng import DrawRandom, derive_seed
from ltd.shapes import VideoShape
from ltd.training.denoiser import DenoiserRun
from ltd.training.latent_inputs import LatentInputs
from tools import cache_latents

ROOT = Path(__file__).resolve().parents[2]
TEXT = "{kind: bytes, dim: 32, max_length: 48}"
CACHE = """
shards: {folder}/shards
out: {folder}/latents
autoencoder: {folder}/autoencoder
text: {text}
views: [{{num_frames: 9, height: 32, width: 32}}, {{num_frames: 1, height: 32, width: 32}}]
dtype: fp32
batch_size: 3
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything up to a trained denoiser."""
    folder = tmp_path_factory.mktemp("pipeline")
    for split, count, seed in (("train", 8, 0), ("heldout", 4, 1)):
        make_toy_shards(
            folder / "shards" / split, num_videos=count, num_images=count, num_frames=9, height=32, width=32, seed=seed
        )
    common = ["steps=3", "evaluation.every=2", "parallel.engine=torch"]
    debug = ROOT / "configs" / "debug"
    media = [f"data.shards={folder}/shards/train", f"evaluation.shards={folder}/shards/heldout"]
    assert train.main([str(debug / "autoencoder.yaml"), f"run_dir={folder}/autoencoder", *media, *common]) == 0
    (folder / "latents.yaml").write_text(CACHE.format(folder=folder, text=TEXT))
    assert cache_latents.main([str(folder / "latents.yaml")]) == 0
    cached = [f"data.shards={folder}/latents/train", f"evaluation.shards={folder}/latents/heldout"]
    model = [f"autoencoder={folder}/autoencoder", "untrained_autoencoder=null"]
    assert train.main([str(debug / "denoiser.yaml"), f"run_dir={folder}/denoiser", *cached, *model, *common]) == 0
    (folder / "prompts.txt").write_text("a red disc moves left\n\na blue square moves up\n")
    return folder


def run_sample(pipeline: Path, out: Path, *arguments: str) -> list[dict[str, object]]:
    prompts = ["--prompts", str(pipeline / "prompts.txt")]
    assert sample.main([str(pipeline / "denoiser"), *prompts, "--out", str(out), "--steps", "3", *arguments]) == 0
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_cache_holds_what_the_autoencoder_gives(pipeline: Path) -> None:
    cache = LatentCache(pipeline / "latents" / "train")
    index = open_index(str(pipeline / "shards" / "train"))
    model = autoencoders.load(pipeline / "autoencoder")
    views = [entry for entry in cache.entries if entry.kind == "video"]
    assert (len(views), len(cache.entries)) == (8, 16)
    assert cache.manifest["autoencoder_hash"] == autoencoders.weights_hash(model)
    window = enumerate_windows(index, [_view(9)])[3]
    row = next(number for number, entry in enumerate(cache.entries) if entry.key == window.key)
    pixels = torch.from_numpy(load_window(index, window)[0])[None]
    posterior = model.encode(pixels_to_video(pixels))
    stored = cache.load(np.array([row]))
    assert stored.captions == (index.caption(window.entry),)
    torch.testing.assert_close(stored.mean, posterior.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stored.logvar, posterior.logvar, rtol=1e-4, atol=1e-4)


def test_cached_and_encoded_latents_train_alike(pipeline: Path) -> None:
    """The same posterior, noise and norm, whether the latents come from the cache or from media."""
    from ltd.data import build_loader
    from ltd.parallel.layout import Layout

    inputs = {}
    for name, shards in (("cache", pipeline / "latents" / "train"), ("media", pipeline / "shards" / "train")):
        run = _denoiser_run(pipeline, shards)
        layout = Layout.from_environment(run.parallel)
        made = LatentInputs(run, layout)
        loader = build_loader(run.data, seed=0, global_rank=0, world_size=1)
        batch = next(iter(loader))[0][0]
        loader.close()
        keys = [key.split("@")[0] for key in batch.keys]
        inputs[name] = keys, made.prepare(batch, DrawRandom(0, batch.draws))["latents"]
    assert inputs["cache"][0] == inputs["media"][0], "one order, whatever the samples are stored as"
    torch.testing.assert_close(inputs["cache"][1], inputs["media"][1], rtol=1e-4, atol=1e-4)
    assert 0.5 < float(inputs["cache"][1].std()) < 2.0, "unit scale"


def test_same_seed_gives_the_same_files_and_another_seed_others(pipeline: Path, tmp_path: Path) -> None:
    rows = run_sample(pipeline, tmp_path / "a", "--per-prompt", "2", "--batch-size", "3")
    assert [row["num_frames"] for row in rows] == [9] * 4 + [1] * 4
    run_sample(pipeline, tmp_path / "b", "--per-prompt", "2", "--batch-size", "3")
    run_sample(pipeline, tmp_path / "c", "--per-prompt", "2", "--batch-size", "3", "--seed", "1")
    names = [str(row["file"]) for row in rows] + ["grid.png"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert all((tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes() for name in names)
    frames = decode_clip((tmp_path / "a" / names[0]).read_bytes(), start=0, num_frames=9)
    assert frames.shape == (9, 32, 32, 3)


def test_restarted_job_makes_only_what_is_missing(pipeline: Path, tmp_path: Path) -> None:
    rows = run_sample(pipeline, tmp_path, "--batch-size", "2")
    kept, lost = tmp_path / str(rows[0]["file"]), tmp_path / str(rows[2]["file"])
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert run_sample(pipeline, tmp_path, "--batch-size", "2") == rows
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content
    run_sample(pipeline, tmp_path, "--batch-size", "2", "--guidance", "2")
    assert kept.stat().st_mtime_ns != before, "other arguments: made anew"


def test_sample_is_what_the_parts_give_by_hand(pipeline: Path) -> None:
    sampler = SamplerConfig(steps=3, guidance=GuidanceConfig(scale=2.0))
    generator = load_generator(pipeline / "denoiser", sampler=sampler)
    request = Request(prompt="a red disc", repetition=1, shape=VideoShape(9, 32, 32), fps=8.0)
    found = generator.generate([request], seed=5)
    model = denoisers.load(pipeline / "denoiser", weights="ema")
    decoder = autoencoders.load(pipeline / "autoencoder")
    noise = DrawRandom(5, [derive_seed(0, "a red disc", 1, "9x32x32")]).normal((8, 3, 4, 4), "sample")
    conditions = [Conditioning(*generator.text.encode([prompt])) for prompt in ("a red disc", "")]
    with torch.no_grad():
        latents = integrate(model, noise, conditions[0], sampler, null_cond=conditions[1])
        expected = video_to_pixels(decoder.decode(decoder.denormalize(latents)))
    assert (found.int() - expected.int()).abs().max() <= 1


def test_solvers_and_guidance_are_options(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shapes", "1x32x32", "--per-prompt", "2"]

    def frames(name: str, *options: str) -> np.ndarray:
        rows = run_sample(pipeline, tmp_path / name, *shape, *options)
        return np.stack([decode_image((tmp_path / name / str(row["file"])).read_bytes())[0] for row in rows]).astype(
            int
        )

    words = ["--solver", "unipc", "--order", "3", "--steps", "9", "--guidance", "5", "--guidance-interval", "0.2,0.6"]
    words += ["--guidance-rescale", "0.7", "--guidance-channels", "3", "--noise", "0.5", "--shift", "2"]
    args = sample.parse([str(pipeline / "denoiser"), "--prompts", "p", "--out", "o", *words])
    assert sample.read_sampler(args) == SamplerConfig(
        kind="unipc",
        order=3,
        steps=9,
        noise=0.5,
        shift=ShiftConfig(factor=2.0),
        guidance=GuidanceConfig(scale=5.0, interval=(0.2, 0.6), rescale=0.7, channels=3),
    )
    euler = frames("euler")
    assert np.abs(frames("calm", "--solver", "sde", "--noise", "0.5") - euler).max() > 0
    assert np.abs(frames("unipc", "--solver", "unipc", "--order", "3") - euler).max() < 128  # runs
    sde = frames("sde", "--solver", "sde")
    # Noise of its own; products of other sizes may round differently.
    assert np.abs(frames("single", "--solver", "sde", "--batch-size", "1") - sde).max() <= 1
    assert np.abs(euler - sde).max() > 16
    # Led away from itself, a denoiser is left as it is: guidance of 1.
    itself = frames("itself", "--guide", str(pipeline / "denoiser"), "--guidance", "7")
    assert np.abs(itself - frames("one", "--guidance", "1")).max() <= 1
    for arguments, message in (
        (["--guidance-interval", "0.5"], "--guidance-interval: got '0.5', needed LOW,HIGH"),
        (["--guidance-interval", "0.9,0.1"], "interval: got (0.9, 0.1), needed 0 <= low <= high <= 1"),
        (["--solver", "unipc", "--order", "3", "--steps", "2"], "steps: got 2, needed at least order = 3"),
        (
            ["--guide", str(pipeline / "autoencoder")],
            "is a run of kind 'autoencoder', needed the run directory of a den",
        ),
    ):
        with pytest.raises(SystemExit):
            run_sample(pipeline, tmp_path / "no", *shape, *arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["unipc", "dpmpp_2m", "sde"])
def test_solvers_follow_the_path_of_the_denoiser(pipeline: Path, kind: Literal["unipc", "dpmpp_2m", "sde"]) -> None:
    sampler = SamplerConfig(kind=kind, steps=3, guidance=GuidanceConfig(scale=2.0))
    made = load_generator(pipeline / "denoiser", sampler=sampler)
    assert isinstance(made.denoiser, denoisers.Dit)
    other = denoisers.Parametrized(made.denoiser, ParametrizationConfig(path=GvpPathConfig()))
    shape = VideoShape(5, 64, 96)
    requests = [Request(prompt="a red ball", repetition=0, shape=shape, fps=8.0)]
    drawn = {}
    for name, denoiser in (("linear", made.denoiser), ("gvp", other)):
        generator = Generator(denoiser, made.autoencoder, made.text, sampler=sampler)
        drawn[name] = generator.draw_latents(requests, generator.condition(requests), seed=0)
    conditions = made.condition(requests)
    size = made.autoencoder.compression.latent(shape)
    cells = (made.autoencoder.latent_channels, size.num_frames, size.height, size.width)
    random = DrawRandom(0, [derive_seed(0, "a red ball", 0, str(shape))])
    expected = integrate(
        other,
        random.normal(cells, "sample"),
        conditions[0],
        dataclasses.replace(sampler, path=GvpPathConfig()),
        null_cond=conditions[1],
        random=random,
    )
    assert torch.allclose(drawn["gvp"], made.autoencoder.denormalize(expected), atol=1e-4)
    assert not torch.allclose(drawn["gvp"], drawn["linear"], atol=1e-2)


def test_frames_are_decoded_in_tiles(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shapes", "5x64x96", "--per-prompt", "1"]
    run_sample(pipeline, tmp_path / "whole", *shape)
    run_sample(pipeline, tmp_path / "one", *shape, "--tile", "128x128")
    run_sample(pipeline, tmp_path / "tiled", *shape, "--tile", "64x64", "--tile-overlap", "48")
    clips = [
        np.asarray(decode_clip((tmp_path / name / "0000.mp4").read_bytes(), start=0, num_frames=5), dtype=int)
        for name in ("whole", "one", "tiled")
    ]
    assert clips[0].shape == (5, 64, 96, 3) and clips[0].std() > 1
    assert np.abs(clips[1] - clips[0]).max() <= 2  # one tile, in chunks of time
    assert 0 < np.abs(clips[2] - clips[0]).mean() < 4
    for arguments, message in (
        (["--tile", "32"], "--tile: got '32', needed HEIGHTxWIDTH"),
        (["--tile", "32x48", "--tile-overlap", "48"], "tile: got (32, 48), needed more than overlap (48)"),
        (["--tile", "64x64", "--tile-overlap", "30"], "overlap: got 30"),
    ):
        with pytest.raises(SystemExit):
            run_sample(pipeline, tmp_path / "no", *shape, *arguments)
        assert message in capsys.readouterr().err


def test_batches_keep_order_and_split_by_shape() -> None:
    shapes = [VideoShape(9, 32, 32)] * 3 + [VideoShape(1, 32, 32)] * 2
    requests = [Request(prompt=str(i), repetition=0, shape=shape, fps=8.0) for i, shape in enumerate(shapes)]
    assert [[r.prompt for r in batch] for batch in batches(requests, 2)] == [["0", "1"], ["2"], ["3", "4"]]


def test_long_prompts_are_refused_or_cut(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def made(prompt: str, *options: str) -> bytes:
        (tmp_path / "prompts.txt").write_text(f"{prompt}\n")
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        files = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(out), "--shapes", "1x64x96", "--steps", "2"]
        assert sample.main([str(pipeline / "denoiser"), *files, *options]) == 0
        return (out / "0000.png").read_bytes()

    assert made("a red ball") == made("a red ball", "--cut-prompts")
    assert made("x" * 60, "--cut-prompts")
    with pytest.raises(SystemExit):
        made("x" * 60)
    assert "--prompts: 'xxx" in (error := capsys.readouterr().err) and "13 tokens longer than the 48" in error
    with pytest.raises(SystemExit):
        made("a red ball", "--negative", "x" * 60)
    assert "--negative" in capsys.readouterr().err


def test_shape_off_the_rule_is_refused(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_sample(pipeline, tmp_path, "--shapes", "8x32x32")
    assert stop.value.code == 2
    assert "--shapes" in capsys.readouterr().err


def test_pixels_and_video_are_inverse_and_tiles_keep_every_still() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(1, 2, 16, 16, 3).contiguous()
    assert torch.equal(video_to_pixels(pixels_to_video(pixels)), pixels)
    stills = [np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30)]
    grid = tile(stills, columns=2)
    assert grid.shape == (8, 12, 3)
    assert [grid[0, 0, 0], grid[0, 6, 0], grid[4, 0, 0], grid[4, 6, 0]] == [10, 20, 30, 0]


def _view(num_frames: int):  # type: ignore[no-untyped-def]
    from ltd.data import ViewConfig

    return ViewConfig(num_frames=num_frames, height=32, width=32)


def _denoiser_run(pipeline: Path, shards: Path) -> DenoiserRun:
    from ltd import config

    overrides = [f"data.shards={shards}", f"autoencoder={pipeline}/autoencoder", "untrained_autoencoder=null"]
    overrides += ["data.views=[{num_frames: 9, height: 32, width: 32}]", "data.global_batch=8", "parallel.engine=torch"]
    loaded = config.load(DenoiserRun, ROOT / "configs" / "debug" / "denoiser.yaml", [*overrides, "evaluation.every=0"])
    assert isinstance(loaded, DenoiserRun)
    return loaded


def test_prompt_file_without_prompts_is_refused(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    args = sample.parse([str(pipeline / "denoiser"), "--prompts", str(tmp_path / "empty.txt"), "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="holds no prompt"):
        sample.plan(args)


def test_an_autoencoder_that_changed_since_is_refused(pipeline: Path, tmp_path: Path) -> None:
    model = autoencoders.load(pipeline / "autoencoder")
    model.set_latent_norm(model.latent_norm.mean, model.latent_norm.std * 2)
    autoencoders.save(model, tmp_path / "other")
    with pytest.raises(ConfigError, match="latent_norm of .* the denoiser was trained with"):
        load_generator(pipeline / "denoiser", sampler=SamplerConfig(steps=1), autoencoder=str(tmp_path / "other"))


def test_a_cache_of_another_text_encoder_is_refused(pipeline: Path) -> None:
    from dataclasses import replace

    from ltd.encoders.text import BytesTextConfig
    from ltd.parallel.layout import Layout

    run = _denoiser_run(pipeline, pipeline / "latents" / "train")
    layout = Layout.from_environment(run.parallel)
    LatentInputs(run, layout)
    with pytest.raises(ConfigError, match="text_encoder_hash"):
        LatentInputs(replace(run, text=BytesTextConfig(dim=32, max_length=40)), layout)
