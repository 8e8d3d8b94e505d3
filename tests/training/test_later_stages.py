"""What a later stage reads is looked for before the first step, once, and not when it has begun already."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import train
from ltd import config as config_io
from ltd.config import ConfigError
from ltd.encoders import perceptual
from ltd.parallel import ParallelConfig
from ltd.parallel.layout import Layout
from ltd.training.autoencoder import AutoencoderRun
from ltd.training.later_stages import Need, check_later_stages
from ltd.training.stages import StageConfig
from ltd.training.start import Start
from tests import launched

ROOT = Path(__file__).resolve().parents[2]
AUTOENCODER = ROOT / "configs" / "debug" / "autoencoder.yaml"
DENOISER = ROOT / "configs" / "debug" / "denoiser.yaml"
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


@pytest.mark.parametrize(
    ("config", "later", "message"),
    [
        (AUTOENCODER, f"{{data: {{shards: {MISSING}}}}}", "data.shards: "),
        (DENOISER, f"{{data: {{shards: {MISSING}}}}}", "data.shards: "),
        (AUTOENCODER, "{data: {views: [{num_frames: 65, height: 32, width: 32}]}}", "data.views[0]: "),
        (AUTOENCODER, f"{{evaluation: {{every: 1, shards: {MISSING}}}}}", "evaluation.shards: "),
        (AUTOENCODER, "{parallel: {accumulation: 3}}", "data.global_batch: "),
        (
            AUTOENCODER,
            "{loss: {perceptual_weight: 0.1}, perceptual: VGG}",
            "perceptual.heads: ",
        ),
        (
            AUTOENCODER,
            "{evaluation: {every: 1, shards: SHARDS}, lpips: VGG}",
            "lpips.heads: ",
        ),
        (AUTOENCODER, f"{{metrics: {{every: 1, reference: {MISSING}, NUMBERS}}}}", "metrics.reference: "),
        (DENOISER, f"{{metrics: {{every: 1, reference: {MISSING}, NUMBERS}}}}", "metrics.reference: "),
        (AUTOENCODER, "{metrics: {every: 1, NETWORK}}", "metrics.measures[0].features.path: "),
        (DENOISER, "{metrics: {every: 1, NETWORK}}", "metrics.measures[0].features.path: "),
        (DENOISER, f"{{samples: {{every: 1, prompts: {MISSING}.jsonl}}}}", "samples.prompts: "),
    ],
)
def test_what_a_later_stage_lacks_is_told_before_the_first_step(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Path, later: str, message: str
) -> None:
    features = f"{{kind: torchscript, path: {MISSING}.pt, dim: 8}}"
    later = (
        later.replace("SHARDS", str(shards))
        .replace("VGG", f"{{kind: vgg_lpips, backbone: {MISSING}, heads: {MISSING}}}")
        .replace(
            "NUMBERS",
            "num_samples: 2, measures: [{features: {kind: packaged, name: efficientnet_lite0}, metrics: [fid]}]",
        )
        .replace("NETWORK", f"num_samples: 2, measures: [{{features: {features}, metrics: [fid]}}]")
    )
    said = refusal(arguments(config, shards, tmp_path / "run", later), capsys)
    assert f"error: stages[1].set.{message}" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


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
        raise ConfigError("listed")

    for step, wanted in ((0, [0.1]), (1, [0.2]), (3, [])):
        opened.clear()
        start: Start[Any] = Start(run, None, {"step": step}, own=False)
        check_later_stages(start, layout, needs)
        assert opened == wanted
    # Without stages nothing is listed at all.
    check_later_stages(Start(dataclasses.replace(run, stages=()), None, {}, own=False), layout, refuse)


def test_a_network_of_both_stages_is_loaded_by_the_first_alone(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = perceptual._load_shift_tolerant
    monkeypatch.setattr(perceptual, "_load_shift_tolerant", lambda field: loaded.append(field) or load(field))
    later = "{loss: {perceptual_weight: 0.2}}"
    words = arguments(AUTOENCODER, shards, tmp_path / "run", later, "loss.perceptual_weight=0.1")
    assert train.main(words) == 0
    assert len(loaded) == 3, "a stage each"


@pytest.mark.dist
def test_two_processes_are_told_alike(shards: Path, tmp_path: Path) -> None:
    words = arguments(AUTOENCODER, shards, tmp_path / "run", f"{{data: {{shards: {MISSING}}}}}")
    with pytest.raises(AssertionError, match=r"exit codes \[2, 2\]") as failed:
        launched.train(*words, "parallel.engine=deepspeed", "parallel.precision=fp32")
    assert "error: stages[1].set.data.shards: " in str(failed.value)
