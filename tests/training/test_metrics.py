"""Metrics while training: what they say, on any number of processes, and that training does not notice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import train
from ltd import config as config_io
from ltd.config import ConfigError
from ltd.data import Batch, DataConfig, ViewConfig
from ltd.data.real_clips import RealClips
from ltd.denoisers import load
from ltd.diffusion import GuidanceConfig, SamplerConfig
from ltd.encoders.features import build_features
from ltd.encoders.packaged import FrameDifferences, PackagedFeaturesConfig
from ltd.encoders.text import build_text_encoder
from ltd.evaluation.frechet import frechet_distance
from ltd.evaluation.rows import rows_from_json
from ltd.inference.generate import Generator, Request
from ltd.parallel.layout import Layout
from ltd.shapes import VideoShape
from ltd.training.denoiser import DenoiserRun
from ltd.training.latent_inputs import open_autoencoder
from ltd.training.measures import MeasureConfig
from ltd.training.metrics import MetricsConfig
from ltd.training.reference import RealFeatures, ReferenceFeatures, read_features, write_features
from tests.training import metric_runs
from tests.training.metric_runs import OFF, Runs, check_training_goes_on, measured, same, state, trained

CONFIG = metric_runs.ROOT / "configs" / "debug" / "denoiser_metrics.yaml"
SMALL = ("toy_data.num_samples=18", "toy_data.num_heldout=2", "data.global_batch=2", "evaluation.every=0")
SMALL += ("optim.lr=0.02", "optim.warmup_steps=0", "steps=4", "ema.decays=[0.5]", "checkpoint.every=2")
MEASURED = ("metrics.every=2", "metrics.num_samples=7", "metrics.steps=2", "metrics.batch_size=3")


RUNS = Runs(CONFIG, SMALL, MEASURED)
run, launch = RUNS.run, RUNS.launch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return RUNS.pair(tmp_path_factory.mktemp("metrics"))


def test_training_goes_on_bit_for_bit(runs: dict[str, Path]) -> None:
    check_training_goes_on(runs)


def test_a_resume_between_measurements_changes_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path / "run", *MEASURED, "steps=3")
    run(tmp_path / "run", *MEASURED)
    assert same(state(tmp_path / "run"), state(runs["measured"]))
    assert trained(tmp_path / "run") == trained(runs["measured"])
    found = measured(tmp_path / "run")
    assert list(found) == [2, 3, 4], "step 3 was the last step of the first run"
    assert found[4] == measured(runs["measured"])[4]


def test_values_are_those_of_the_averaged_weights_against_the_real_clips(runs: dict[str, Path]) -> None:
    config = config_io.load(DenoiserRun, runs["measured"] / "config.yaml")
    data = DataConfig(shards=str(runs["measured"] / "toy_data" / "train"))
    clips = RealClips(data, ViewConfig(num_frames=9, height=32, width=32), needed=16, seed=0)
    (batch,) = clips.batches(batch_size=16, global_rank=0, world_size=1)
    assert batch.pixels is not None
    features = build_features(PackagedFeaturesConfig(name="frame_differences"))
    real = features(batch.pixels)
    requests = [
        Request(prompt=batch.captions[i], repetition=i, shape=VideoShape(9, 32, 32), fps=24.0) for i in range(7)
    ]
    values = {}
    for weights in ("ema_0.5", "raw"):
        denoiser = load(runs["measured"], weights=weights)
        sampler = SamplerConfig(steps=2, guidance=GuidanceConfig(scale=1.0))
        text = build_text_encoder(config.text)  # type: ignore[arg-type]
        generator = Generator(denoiser, open_autoencoder(config), text, sampler=sampler)
        made = features(generator.generate(requests, seed=0))
        values[weights] = frechet_distance(made, real[7:14]).value
    found = measured(runs["measured"])[4]
    assert found["eval/fvd_motion"] == pytest.approx(values["ema_0.5"], rel=1e-4)
    assert found["eval/fvd_motion"] != pytest.approx(values["raw"], rel=1e-4)
    assert found["eval/fvd_motion_floor"] == pytest.approx(frechet_distance(real[:7], real[7:14]).value, rel=1e-6)


def test_rows_say_how_the_numbers_were_made(runs: dict[str, Path]) -> None:
    table = {row.name: row for row in rows_from_json((runs["measured"] / "evaluation.json").read_text())}
    assert set(table) == {"fvd_motion", "kid_pixels", "kid_std_pixels", "precision_pixels", "recall_pixels"}
    row, values = table["fvd_motion"], measured(runs["measured"])[4]
    assert (row.value, row.floor) == (values["eval/fvd_motion"], values["eval/fvd_motion_floor"])
    assert (row.weights, row.steps, row.guidance, row.seed, row.n) == ("ema_0.5", 2, 1.0, 0, 7)
    assert "frame_differences" in row.network and "resize" in row.preprocessing
    assert "after step 4" in row.note and "biased upwards" in row.note
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_train_on_bit_for_bit(zero: int, tmp_path: Path) -> None:
    common = (f"parallel.zero={zero}",)
    launch(tmp_path / "plain", *common, *OFF)
    for steps in [3, 4] if zero == 3 else [4]:  # a resume in between
        launch(tmp_path / "measured", *common, *MEASURED, f"steps={steps}")
    assert same(state(tmp_path / "plain"), state(tmp_path / "measured"))
    assert trained(tmp_path / "plain") == trained(tmp_path / "measured")
    assert list(measured(tmp_path / "measured")) == ([2, 3, 4] if zero == 3 else [2, 4])


def test_one_and_two_processes_find_the_same_bits(runs: dict[str, Path], tmp_path: Path) -> None:
    # The same weights: a step at rate 0 from one checkpoint. Each computes its own features of the real clips.
    still = (*MEASURED, f"resume={runs['measured']}", "optim.lr=0", "steps=5", "optim.weight_decay=0")
    data = f"data.shards={runs['measured'] / 'toy_data' / 'train'}"
    one = run(tmp_path / "one", *still, data, f"metrics.cache={tmp_path / 'cache1'}")
    two = launch(tmp_path / "two", *still, data, f"metrics.cache={tmp_path / 'cache2'}", "parallel.zero=3")
    assert measured(one)[5] == measured(two)[5]
    files = [sorted((tmp_path / name).iterdir()) for name in ("cache1", "cache2")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] and len(files[0]) == 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_features_of_real_clips_are_read_again_unless_damaged(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = (*MEASURED, f"resume={runs['measured']}", "optim.lr=0", "steps=5")
    data = f"data.shards={runs['measured'] / 'toy_data' / 'train'}"
    cache = f"metrics.cache={tmp_path / 'cache'}"
    fresh = measured(run(tmp_path / "fresh", *again, data, cache))[5]
    files = sorted((tmp_path / "cache").iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    assert measured(run(tmp_path / "cached", *again, data, cache))[5] == fresh
    assert [file.stat().st_mtime_ns for file in files] == before, "nothing was computed"
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    caplog.clear()
    assert measured(run(tmp_path / "damaged", *again, data, cache))[5] == fresh
    assert "is damaged" in caplog.text and files[0].read_bytes() == whole


def test_all_processes_move_on_with_each_part_of_the_figures(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    lead = Layout.lead

    def counted(layout: Layout, work: Callable[[Callable[[], None]], Any], moved: Callable[[], None]) -> Any:
        steps.append(0)

        def count() -> None:
            steps[-1] += 1
            moved()

        return lead(layout, work, count)

    monkeypatch.setattr(Layout, "lead", counted)
    assert measured(run(tmp_path / "run", *MEASURED)) == measured(runs["measured"])
    # one before each metric; then 3 of FVD, a subset of KID each, a block of precision and recall each
    once = (1 + 3) + (1 + 100) + (1 + 4)
    assert steps == [2 * once, once], "the floors once"


def test_too_few_real_clips_that_can_be_read_end_no_training(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RealClips.batches

    def batches(clips: RealClips, **kwargs: int) -> Iterator[Batch]:
        for batch in whole(clips, **kwargs):
            yield dataclasses.replace(batch, weight=batch.weight * 0)

    data = f"data.shards={runs['measured'] / 'toy_data' / 'train'}"
    common = (*MEASURED, data, f"metrics.cache={tmp_path / 'cache'}")
    with monkeypatch.context() as unreadable:
        unreadable.setattr(RealClips, "batches", batches)
        run(tmp_path / "run", *common, "steps=2")
    assert "step 2: no samples are measured" in caplog.text and "0 can be read, needed 14" in caplog.text
    assert not measured(tmp_path / "run") and state(tmp_path / "run", 2), "the due save was written"
    run(tmp_path / "run", *common)
    assert measured(tmp_path / "run")[4] == measured(runs["measured"])[4], "the data were mended"


def test_a_file_of_other_features_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, values = tmp_path / "f.safetensors", {"features": torch.rand(3, 2), "numbers": torch.arange(3)}
    write_features(path, {"network": "a"}, values)
    found = read_features(path, {"network": "a"})
    assert found is not None and all(torch.equal(found[name], values[name]) for name in values)
    assert read_features(path, {"network": "b"}) is None and "not what its name says" in caplog.text
    path.write_bytes(path.read_bytes()[:-1])
    assert read_features(path, {"network": "a"}) is None and "is damaged" in caplog.text
    safetensors.torch.save_file(values, path)
    assert read_features(path, {"network": "a"}) is None
    assert read_features(tmp_path / "none", {"network": "a"}) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("metrics.num_samples=10",), "metrics.num_samples: got 10, which needs 20 real clips of 9x32x32"),
        (("metrics.shape=[4,32,32]",), "metrics.shape: 4x32x32"),
        (("metrics.decay=0.9",), "metrics.decay: got 0.9"),
        (("metrics.reference=/nowhere",), "metrics.reference: got '/nowhere': no such path"),
        (
            ("metrics.measures=[{features: {kind: i3d, path: /nowhere.pt}, metrics: [fvd]}]",),
            "metrics.measures[0].features.path: no file /nowhere.pt",
        ),
        (
            ("metrics.measures=[{features: {kind: packaged, name: pixels}, metrics: [sfid]}]",),
            "metrics.measures[0].metrics: sfid reads spatial, which pixels 5x8x14 (no network) does not give",
        ),
        (("metrics.shape=[1,32,32]",), "metrics.measures[0].features: fails on a clip of 1x32x32"),
    ],
)
def test_mistakes_end_before_any_step(
    overrides: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(CONFIG), f"run_dir={tmp_path / 'run'}", "parallel.engine=torch", *SMALL, *MEASURED]
    with pytest.raises(SystemExit):
        train.main([*arguments, *overrides])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_whose_features_are_not_finite_is_refused(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = FrameDifferences.__call__
    monkeypatch.setattr(FrameDifferences, "__call__", lambda network, clips: whole(network, clips) * value)
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *MEASURED)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "metrics.measures[0].features: " in message
    assert "gives features of a clip of 9x32x32 that are not finite" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("part", ["reference", "floor"])
def test_features_of_real_clips_that_are_not_finite_are_no_fault_of_the_samples(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ReferenceFeatures.get

    def get(reference: ReferenceFeatures, extractors: Any) -> list[RealFeatures]:
        found = whole(reference, extractors)
        getattr(found[0], part).outputs["features"][2] = math.nan
        return found

    monkeypatch.setattr(ReferenceFeatures, "get", get)
    run(tmp_path / "run", *MEASURED, "steps=2")
    number = {"reference": 9, "floor": 2}[part]
    assert f"features of 1 of 14 real clips are not finite, first of clip {number}" in caplog.text
    assert "of the samples" not in caplog.text and "the samples cannot be measured" not in caplog.text
    names = measured(tmp_path / "run")[2]
    assert "eval/kid_pixels" in names and "eval/fvd_motion" not in names, "the other network measures on"


def test_bad_numbers_name_the_field() -> None:
    def metrics(*overrides: str) -> None:
        config_io.load(DenoiserRun, CONFIG, list(overrides))

    with pytest.raises(ConfigError, match="metrics.num_samples: got 3, kid needs 4 or more; 3 samples: unbiased, but"):
        metrics("metrics.num_samples=3")
    with pytest.raises(ConfigError, match="metrics.num_samples: got 1, fvd needs 2 or more; 1 samples: biased upwards"):
        metrics("metrics.num_samples=1")
    for fps in ("-1", "0", "1001"):
        with pytest.raises(ConfigError, match="metrics.fps: got .*, needed a rate in"):
            metrics(f"metrics.fps={fps}")
    with pytest.raises(ConfigError, match="metrics.guidance: got -3.0, needed a scale of 0 or more"):
        metrics("metrics.guidance=-3")
    metrics("metrics.fps=1000", "metrics.guidance=0")
    with pytest.raises(ConfigError, match="metrics.measures: got none"):
        metrics("metrics.measures=[]")
    with pytest.raises(ConfigError, match="metrics.shape: got"):
        metrics("metrics.shape=[0,1,1]")
    twice = [MeasureConfig(features=PackagedFeaturesConfig(name="pixels"), metrics=("fid",))] * 2
    with pytest.raises(ConfigError, match="measures: got fid twice under one name"):
        MetricsConfig(measures=tuple(twice))


@pytest.mark.parametrize(
    ("measures", "output"),
    [
        ("[{name: std, metrics: [kid]}, {metrics: [kid]}]", "kid_std"),
        ("[{metrics: [fid]}, {name: floor, metrics: [fid]}]", "fid_floor"),
        ("[{metrics: [kid]}, {name: std_floor, metrics: [kid]}]", "kid_std_floor"),
        ("[{name: x, metrics: [precision_recall]}, {name: x_floor, metrics: [precision_recall]}]", "precision_x_floor"),
    ],
)
def test_two_figures_do_not_have_one_name(measures: str, output: str) -> None:
    features = "features: {kind: packaged, name: pixels}, metrics"
    with pytest.raises(ConfigError, match=f"metrics.measures: .* with name .* both give eval/{output};"):
        config_io.load(DenoiserRun, CONFIG, [f"metrics.measures={measures.replace('metrics', features)}"])
    others = "[{name: spread, metrics: [kid]}, {metrics: [kid, fid, precision_recall]}]"
    config_io.load(DenoiserRun, CONFIG, [f"metrics.measures={others.replace('metrics', features)}"])


def test_samples_that_are_not_finite_give_no_figure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(generator: Generator, latents: torch.Tensor) -> torch.Tensor:
        video = generator.autoencoder.decode(latents)
        video[1, 0, 0, 0, 0] = torch.inf
        return video

    monkeypatch.setattr(Generator, "decode", decode)
    run(tmp_path / "run", *MEASURED, "steps=2", "metrics.num_samples=6")
    assert not measured(tmp_path / "run") and "rows hold NaN or infinity, of samples 1" in caplog.text
    assert not (tmp_path / "run" / "evaluation.json").exists()
