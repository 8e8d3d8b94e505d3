"""What a later stage reads is looked for before the first step, once, and not when it has begun already."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from ltd import autoencoders
from ltd import config as config_io
from ltd.autoencoders import build_autoencoder
from ltd.encoders import perceptual
from ltd.parallel import ParallelConfig
from ltd.parallel.layout import Layout
from ltd.training.autoencoder import AutoencoderRun
from ltd.training.denoiser import DenoiserRun
from ltd.training.later_stages import Need, check_later_stages
from ltd.training.replay import load_run, replay
from ltd.training.stages import StageConfig
from ltd.training.start import Start
from tests import launched
from tests.training.test_denoiser_alignment import make_cache

ROOT = Path(__file__).resolve().parents[2]
AUTOENCODER = ROOT / "configs" / "debug" / "autoencoder.yaml"
DENOISER = ROOT / "configs" / "debug" / "denoiser.yaml"
LABELS = ROOT / "configs" / "debug" / "denoiser_labels.yaml"
MISSING = "/nowhere/at-all"
STEPS = 4


def arguments(config: Path, shards: Path, run_dir: Path, later: str, *overrides: str) -> list[str]:
    """A short run that learns after 2 steps what ``later`` says, a mapping as in a file."""
    short = [f"steps={STEPS}", "evaluation.every=0", "checkpoint.every=1", "parallel.engine=torch"]
    stage = f"stages=[{{from_step: 1, set: {{log_every: 1}}}}, {{from_step: 2, set: {later}}}]"
    return [str(config), f"run_dir={run_dir}", f"data.shards={shards}", stage, *short, *overrides]


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        train.main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def cache(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of an autoencoder that no run here has."""
    folder = tmp_path_factory.mktemp("cache")
    model = config_io.load(DenoiserRun, DENOISER, []).untrained_autoencoder
    assert model is not None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        autoencoders.save(build_autoencoder(model), folder / "autoencoder")
    return make_cache(shards, folder / "autoencoder", folder / "latents")


@pytest.mark.parametrize(
    ("config", "later", "message"),
    [
        (AUTOENCODER, "{data: {shards: MISSING}}", "data.shards: got 'MISSING'"),
        (DENOISER, "{data: {shards: MISSING}}", "data.shards: got 'MISSING'"),
        (
            DENOISER,
            "{data: {shards: null, datasets: [{shards: SHARDS}, {shards: MISSING}]}}",
            "data.datasets[1].shards: got 'MISSING'",
        ),
        (AUTOENCODER, "{data: {views: [{num_frames: 65, height: 32, width: 32}]}}", "data.views[0]: "),
        (DENOISER, "{data: {views: [{num_frames: 9, height: 28, width: 28}]}}", "data.views[0]: height must be a mul"),
        (DENOISER, "{data: {views: [{num_frames: 7, height: 32, width: 32}]}}", "data.views[0]: num_frames must be"),
        (
            DENOISER,
            "{data: {batching: {kind: buckets, tokens: 512, token: [4, 12, 12], sides: [24], frames: [9]}}}",
            "data.batching.token: got [4, 12, 12]",
        ),
        (AUTOENCODER, "{evaluation: {every: 1, shards: MISSING}}", "evaluation.shards: got 'MISSING'"),
        (AUTOENCODER, "{data: {shards: CACHE}}", "data.shards: CACHE holds latents; an autoencoder trains on media"),
        (AUTOENCODER, "{evaluation: {every: 1, shards: CACHE}}", "evaluation.shards: CACHE holds latents; an auto"),
        (DENOISER, "{data: {shards: CACHE}}", "data.shards: the latent cache was made with autoencoder_hash = "),
        (
            DENOISER,
            "{data: {shards: null, datasets: [{shards: CACHE}, {shards: CACHE}]}}",
            "data.datasets[0].shards: the latent cache was made with autoencoder_hash = ",
        ),
        (DENOISER, "{evaluation: {every: 1, shards: CACHE}}", "evaluation.shards: the latent cache was made with auto"),
        (AUTOENCODER, "{parallel: {accumulation: 3}}", "data.global_batch: "),
        (AUTOENCODER, "{loss: {perceptual_weight: 0.1}, perceptual: VGG}", "perceptual.heads: "),
        (AUTOENCODER, "{evaluation: {every: 1, shards: SHARDS}, lpips: VGG}", "lpips.heads: "),
        (AUTOENCODER, "{metrics: {every: 1, reference: MISSING, NUMBERS}}", "metrics.reference: got 'MISSING'"),
        (DENOISER, "{metrics: {every: 1, reference: MISSING, NUMBERS}}", "metrics.reference: got 'MISSING'"),
        (AUTOENCODER, "{metrics: {every: 1, NETWORK}}", "metrics.measures[0].features.path: "),
        (DENOISER, "{metrics: {every: 1, NETWORK}}", "metrics.measures[0].features.path: "),
        (DENOISER, "{samples: {every: 1, prompts: MISSING}}", "samples.prompts: MISSING does not exist"),
        (DENOISER, "{samples: {every: 1, prompts: LONG}}", "samples.prompts: 'AAAA"),
        (DENOISER, "{samples: {every: 1, prompts: BYTES}}", "samples.prompts: BYTES is no text that can be read"),
        (LABELS, "{data: {classes: [a, b]}}", "data.classes: "),
        (
            LABELS,
            "{data: {classes: null}, samples: {every: 1, labels: [disc up]}}",
            "samples.labels: got 'disc up', but the run knows no names",
        ),
    ],
)
def test_what_a_later_stage_lacks_is_told_before_the_first_step(
    shards: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: Path,
    later: str,
    message: str,
) -> None:
    (tmp_path / "long").write_text("A" * 400)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfd")
    features = f"{{kind: torchscript, path: {MISSING}.pt, dim: 8}}"
    names = {
        "VGG": f"{{kind: vgg_lpips, backbone: {MISSING}, heads: {MISSING}}}",
        "NUMBERS": "num_samples: 2, measures: [{features: {kind: packaged, name: efficientnet_lite0}, metrics: [fid]}]",
        "NETWORK": f"num_samples: 2, measures: [{{features: {features}, metrics: [fid]}}]",
        "MISSING": MISSING,
        "SHARDS": str(shards),
        "CACHE": str(cache),
        "LONG": str(tmp_path / "long"),
        "BYTES": str(tmp_path / "bytes"),
    }
    for name, value in names.items():
        later, message = later.replace(name, value), message.replace(name, value)
    said = refusal(arguments(config, shards, tmp_path / "run", later), capsys)
    assert f"error: stages[1].set.{message}" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_caches_of_a_later_stage_have_what_the_run_takes_from_them(
    shards: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["untrained_autoencoder=null", f"autoencoder={cache.parent / 'autoencoder'}"]
    aligned = "alignment={teacher: {kind: efficientnet_lite0, size: 32}, block: 1}"
    bare = make_cache(shards, cache.parent / "autoencoder", tmp_path / "bare", text=None)
    copied = tmp_path / "shards"
    shutil.copytree(shards, copied)
    changed = make_cache(copied, cache.parent / "autoencoder", tmp_path / "changed")
    tar = min(copied.glob("*.tar"))
    tar.write_bytes(tar.read_bytes() + bytes(512))
    for path, overrides, message in (
        (cache, [aligned], f"alignment: got the latent cache {cache} as data, which has no pixels"),
        (bare, [], "data.shards: the latent cache "),
        (changed, [], "data.shards: "),
    ):
        words = arguments(DENOISER, shards, tmp_path / "run", f"{{data: {{shards: {path}}}}}", *own, *overrides)
        assert f"error: stages[1].set.{message}" in refusal(words, capsys)
    # One that has all of it: from media to a cache, and back.
    words = arguments(DENOISER, shards, tmp_path / "run", f"{{data: {{shards: {cache}}}}}", *own)
    back = f", {{from_step: 3, set: {{data: {{shards: {shards}}}}}}}]"
    assert train.main([word.removesuffix("]") + back if word.startswith("stages=") else word for word in words]) == 0


def test_class_names_of_later_stages_are_those_of_the_stages_before(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names may begin in a later stage, whose samples may be asked for by them; from then on they stay."""
    names = config_io.load(DenoiserRun, LABELS, []).data.classes
    assert isinstance(names, tuple)
    later = f"{{data: {{classes: [{', '.join(names)}]}}, samples: {{every: 9, steps: 1, labels: [disc up]}}}}"
    words = arguments(LABELS, shards, tmp_path / "run", later, "data.classes=null")
    last = f", {{from_step: 3, set: {{data: {{classes: [{', '.join(reversed(names))}]}}, samples: null}}}}]"
    wrong = [word.removesuffix("]") + last if word.startswith("stages=") else word for word in words]
    said = refusal(wrong, capsys)
    assert "error: stages[2].set.data.classes: the names of the classes, or their order, are other than in the" in said
    assert train.main(words) == 0


def test_what_cannot_be_reached_just_now_is_warned_of(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = config_io.load(AutoencoderRun, AUTOENCODER, arguments(AUTOENCODER, shards, Path("run"), "{}")[1:])
    moves: list[None] = []

    def needs(stage: AutoencoderRun) -> Iterator[Need]:
        def fail() -> None:
            raise ConnectionError("the store is down")

        yield ("there", stage.log_every), lambda: None
        yield ("down", stage.log_every), fail

    stages = tuple(StageConfig(from_step=step, set={"log_every": 1 + step}) for step in (1, 2))
    start: Start[Any] = Start(dataclasses.replace(run, stages=stages), None, {}, own=False)
    layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)
    check_later_stages(start, layout, needs, lambda: moves.append(None))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "what the stage from step 2 reads cannot be looked at now: the store is down" in caplog.text
    assert len(moves) == 2, "each time something was opened, so that no process counts as standing still"


def test_held_out_latents_that_nothing_reads_are_no_fault(shards: Path, cache: Path, tmp_path: Path) -> None:
    words = arguments(AUTOENCODER, shards, tmp_path / "run", "{log_every: 2}", f"evaluation.shards={cache}")
    assert train.main(words) == 0


def test_guidance_away_from_nothing_is_refused_in_a_later_stage(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["text=null", "model.text_dim=null", "caption_dropout=0"]
    measure = "{features: {kind: packaged, name: pixels}, metrics: [kid]}"
    for section, message in (
        ("{metrics: {every: 1, num_samples: 4, guidance: 3, measures: [MEASURE]}}", "metrics.guidance: got 3, but"),
        ("{samples: {every: 1, guidance: 3}}", "samples.guidance: got 3, but the denoiser takes neither text nor"),
    ):
        later = section.replace("MEASURE", measure)
        said = refusal(arguments(DENOISER, shards, tmp_path / "run", later, *plain), capsys)
        assert f"error: stages[1].set.{message}" in said


def test_what_is_to_come_is_opened_once_and_not_at_each_boundary(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    loaded: list[str] = []
    load = perceptual._load_shift_tolerant
    monkeypatch.setattr(perceptual, "_load_shift_tolerant", lambda field: loaded.append(field) or load(field))
    words = arguments(AUTOENCODER, shards, tmp_path / "run", "{log_every: 2}")
    last = ", {from_step: 3, set: {loss: {perceptual_weight: 0.1}}}]"
    words = [word.removesuffix("]") + last if word.startswith("stages=") else word for word in words]
    assert train.main(words) == 0
    assert loaded == ["perceptual"] * 2, "once before the first step, once for its stage"
    told = [line for line in caplog.messages if line.startswith("what the stage")]
    assert told == ["what the stage from step 3 reads is there"]
    loaded.clear()
    replay(load_run(tmp_path / "run", []), tmp_path / "run", 3)
    assert not loaded, "whoever takes a step again needs no later stage"


def test_a_fault_of_the_first_stage_is_not_blamed_on_a_later_one(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = "{data: {views: [{num_frames: 1, height: 32, width: 32}]}}"
    said = refusal(arguments(AUTOENCODER, shards, tmp_path / "run", later, f"data.shards={MISSING}"), capsys)
    assert "error: data.shards: " in said


def test_a_stage_that_has_begun_is_not_looked_at_again(shards: Path, tmp_path: Path) -> None:
    """What only stages behind need may be gone by then."""
    heldout = tmp_path / "heldout"
    heldout.symlink_to(shards)
    words = arguments(AUTOENCODER, shards, tmp_path / "run", f"{{evaluation: {{every: 9, shards: {heldout}}}}}")
    last = f", {{from_step: 3, set: {{evaluation: {{every: 9, shards: {shards}}}}}}}]"
    words = [word.removesuffix("]") + last if word.startswith("stages=") else word for word in words]
    assert train.main(words) == 0
    heldout.unlink()
    assert train.main([*words, f"steps={STEPS + 1}"]) == 0


def test_each_thing_is_opened_once_and_not_if_the_first_stage_has_it(shards: Path) -> None:
    run = config_io.load(AutoencoderRun, AUTOENCODER, arguments(AUTOENCODER, shards, Path("run"), "{}")[1:])
    stages = tuple(
        StageConfig(from_step=step, set={"loss": {"perceptual_weight": weight}})
        for step, weight in ((1, 0.1), (2, 0.2), (3, 0.1))
    )
    run = dataclasses.replace(run, stages=stages, loss=dataclasses.replace(run.loss, perceptual_weight=0.2))
    opened: list[float] = []
    layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)

    def needs(stage: AutoencoderRun) -> Iterator[Need]:
        weight = stage.loss.perceptual_weight
        yield ("weight", weight), lambda: opened.append(weight)

    def refuse(stage: AutoencoderRun) -> Iterator[Need]:
        raise AssertionError("listed")

    for step, wanted in ((0, [0.1]), (1, [0.2]), (3, [])):
        opened.clear()
        start: Start[Any] = Start(run, None, {"step": step}, own=False)
        check_later_stages(start, layout, needs, lambda: None)
        assert opened == wanted
    # Without stages nothing is listed at all.
    check_later_stages(Start(dataclasses.replace(run, stages=()), None, {}, own=False), layout, refuse, lambda: None)


@pytest.mark.dist
def test_two_processes_are_told_alike(shards: Path, tmp_path: Path) -> None:
    words = arguments(AUTOENCODER, shards, tmp_path / "run", f"{{data: {{shards: {MISSING}}}}}")
    with pytest.raises(AssertionError, match=r"exit codes \[2, 2\]") as failed:
        launched.train(*words, "parallel.engine=deepspeed", "parallel.precision=fp32")
    assert "error: stages[1].set.data.shards: " in str(failed.value)


@pytest.mark.dist
def test_a_fault_of_the_present_stage_is_told_by_every_process(shards: Path, tmp_path: Path) -> None:
    """What only listing a stage's needs finds, on the one process that looks."""
    buckets = "data.batching={kind: buckets, tokens: 256, token: [4, 8, 8], sides: [32]}"
    measure = "{features: {kind: packaged, name: pixels}, metrics: [kid]}"
    section = f"metrics={{every: 1, num_samples: 4, measures: [{measure}]}}"
    words = arguments(AUTOENCODER, shards, tmp_path / "run", "{log_every: 2}", buckets, section)
    with pytest.raises(AssertionError, match=r"exit codes \[2, 2\]") as failed:
        launched.train(*words, "parallel.engine=deepspeed", "parallel.precision=fp32")
    assert str(failed.value).count("error: metrics.shape: ") == 2
