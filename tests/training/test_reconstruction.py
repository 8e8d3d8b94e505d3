"""Metrics of reconstructions while an autoencoder trains: what they say, on any processes, and that nothing notices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from ltd import autoencoders, storage
from ltd import config as config_io
from ltd.autoencoders import CausalVae
from ltd.config import ConfigError
from ltd.data import Batch, DataConfig, ViewConfig
from ltd.data.real_clips import RealClips
from ltd.encoders.features import build_features
from ltd.encoders.flow import DenseFlow
from ltd.encoders.packaged import PackagedFeaturesConfig
from ltd.evaluation.figures import motion_figures
from ltd.evaluation.frechet import frechet_distance
from ltd.evaluation.measures import motion_vectors
from ltd.evaluation.rows import rows_from_json
from ltd.inference.media import pixels_to_video, video_to_pixels
from ltd.training.autoencoder import AutoencoderRun
from tests.training import metric_runs
from tests.training.metric_runs import OFF, Runs, check_training_goes_on, measured, same, state, trained

DEBUG = metric_runs.ROOT / "configs" / "debug"
CONFIG = DEBUG / "autoencoder_metrics.yaml"
SMALL = ("toy_data.num_samples=16", "toy_data.num_heldout=18", "data.global_batch=2", "evaluation.every=0")
SMALL += ("optim.lr=0.002", "optim.warmup_steps=0", "steps=4", "ema.decays=[0.5]", "checkpoint.every=2")
SMALL += ("statistics_from=2",)
MEASURED = ("metrics.every=2", "metrics.num_samples=7", "metrics.batch_size=3")
#: The adversarial configuration's run, with a metric of motion statistics.
BESIDE = ("metrics={every: 2, num_samples: 7, batch_size: 3, measures: [{features: {kind: packaged, "
"name: frame_differences}, metrics: [fvd]}]}",)  # fmt: skip


RUNS = Runs(CONFIG, SMALL, MEASURED)
run, launch = RUNS.run, RUNS.launch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return RUNS.pair(tmp_path_factory.mktemp("reconstruction"))


def test_training_goes_on_bit_for_bit(runs: dict[str, Path]) -> None:
    check_training_goes_on(runs)
    exports = [storage.sha256_file(run_dir / "model" / "model.safetensors") for run_dir in runs.values()]
    assert exports[0] == exports[1]


def test_a_resume_between_measurements_changes_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path / "run", *MEASURED, "steps=3")
    run(tmp_path / "run", *MEASURED)
    assert same(state(tmp_path / "run"), state(runs["measured"]))
    found = measured(tmp_path / "run")
    assert list(found) == [2, 3, 4] and found[4] == measured(runs["measured"])[4]


@pytest.mark.parametrize("beside", ["discriminator", "codebook"])
def test_what_is_trained_beside_it_goes_on_too(beside: str, runs: dict[str, Path], tmp_path: Path) -> None:
    data = [f"{field}.shards={runs['plain'] / 'toy_data' / 'heldout'}" for field in ("data", "evaluation")]
    chosen = ["adversarial.start_step=1"]
    if beside == "codebook":
        chosen = ["adversarial=null", "equivariance=null", "model.bottleneck={kind: vq, num_codes: 16}"]
    common = [*data, *chosen, "evaluation.every=0", "steps=4", "data.global_batch=2", "statistics_from=2"]
    for name, overrides in {"plain": (), "measured": BESIDE}.items():
        Runs(DEBUG / "autoencoder_adversarial.yaml", (*common, *overrides)).run(tmp_path / name)
    assert same(state(tmp_path / "plain"), state(tmp_path / "measured"))
    assert trained(tmp_path / "plain") == trained(tmp_path / "measured")
    assert list(measured(tmp_path / "measured")) == [2, 4]


def real_clips(run_dir: Path) -> Tensor:
    """The clips of both sets: the floor's first, then those that are reconstructed."""
    data = DataConfig(shards=str(run_dir / "toy_data" / "heldout"))
    clips = RealClips(data, ViewConfig(num_frames=9, height=32, width=32), needed=16, seed=0)
    (batch,) = clips.batches(batch_size=16, global_rank=0, world_size=1)
    assert batch.pixels is not None
    return batch.pixels


def test_values_are_those_of_the_averaged_weights_against_the_originals(runs: dict[str, Path]) -> None:
    pixels = real_clips(runs["measured"])
    features = build_features(PackagedFeaturesConfig(name="frame_differences"))
    originals = features(pixels[7:14])
    values = {}
    for weights in ("ema_0.5", "raw"):
        model = autoencoders.load(storage.checkpoint_path(runs["measured"], 4), weights=weights)
        with torch.no_grad():
            decoded = model.decode(model.encode(pixels_to_video(pixels[7:14])).mean)
        values[weights] = frechet_distance(features(video_to_pixels(decoded)), originals).value
    found = measured(runs["measured"])[4]
    assert found["eval/fvd_motion"] == pytest.approx(values["ema_0.5"], rel=1e-4)
    assert found["eval/fvd_motion"] != pytest.approx(values["raw"], rel=1e-4)
    floor = frechet_distance(features(pixels[:7]), originals).value
    assert found["eval/fvd_motion_floor"] == pytest.approx(floor, rel=1e-6)


def test_rows_say_how_the_numbers_were_made(runs: dict[str, Path]) -> None:
    table = {row.name: row for row in rows_from_json((runs["measured"] / "evaluation.json").read_text())}
    assert set(table) == {"fvd_motion", "fid_pixels", "precision_pixels", "recall_pixels"}
    row, values = table["fvd_motion"], measured(runs["measured"])[4]
    assert (row.value, row.floor) == (values["eval/fvd_motion"], values["eval/fvd_motion_floor"])
    assert (row.part, row.weights, row.steps, row.guidance, row.seed, row.n) == (
        *("reconstruction", "ema_0.5", None, None, 0, 7),
    )
    assert row.note.startswith("reconstructions after step 4; ") and "frame_differences" in row.network


@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_train_on_bit_for_bit(zero: int, tmp_path: Path) -> None:
    common = (f"parallel.zero={zero}",)
    launch(tmp_path / "plain", *common, *OFF)
    launch(tmp_path / "measured", *common, *MEASURED)
    assert same(state(tmp_path / "plain"), state(tmp_path / "measured"))
    assert trained(tmp_path / "plain") == trained(tmp_path / "measured")
    assert list(measured(tmp_path / "measured")) == [2, 4]


def test_one_and_two_processes_find_the_same_bits(runs: dict[str, Path], tmp_path: Path) -> None:
    # The same weights: a step at rate 0 from one checkpoint. Each computes its own features of the real clips.
    still = (*MEASURED, f"resume={runs['measured']}", "optim.lr=0", "steps=5", "optim.weight_decay=0")
    still += (f"data.shards={runs['measured'] / 'toy_data' / 'train'}",)
    still += (f"evaluation.shards={runs['measured'] / 'toy_data' / 'heldout'}",)
    one = run(tmp_path / "one", *still, f"metrics.cache={tmp_path / 'cache1'}")
    two = launch(tmp_path / "two", *still, f"metrics.cache={tmp_path / 'cache2'}", "parallel.zero=2")
    assert measured(one)[5] == measured(two)[5] and len(measured(one)[5]) == 8
    files = [sorted((tmp_path / name).iterdir()) for name in ("cache1", "cache2")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] and len(files[0]) == 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def spoil(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    """Let the autoencoder give its input back, with noise, whenever it is evaluated."""
    forward = CausalVae.forward

    def spoiled(self: CausalVae, video: Tensor, given: Tensor | None, **kwargs: object) -> object:
        reconstruction, posterior = forward(self, video, given, **kwargs)
        if self.training:
            return reconstruction, posterior
        random = torch.Generator().manual_seed(0)
        return video + noise * torch.randn(video.shape, generator=random), posterior

    monkeypatch.setattr(CausalVae, "forward", spoiled)


def test_a_worse_autoencoder_is_farther_away(tmp_path: Path) -> None:
    overrides = ("steps=2", "metrics.measures=[{features: {kind: packaged, name: pixels}, metrics: [fid, kid]},"
    "{name: motion, features: {kind: packaged, name: frame_differences}, metrics: [fvd]},"
    "{metrics: [warping_error, motion]}]")  # fmt: skip
    found = []
    for noise in (0.0, 0.05, 0.4):
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, noise)
            found.append(measured(run(tmp_path / f"run{noise}", *MEASURED, *overrides))[2])
    perfect = found[0]
    for name in ("eval/fid", "eval/fvd_motion"):
        values = [row[name] for row in found]
        assert abs(values[0]) < 1e-6 * perfect[f"{name}_floor"], "the originals themselves"
        assert all(a < b for a, b in itertools.pairwise(values)), values
    # What compares no sets has the originals as its floor.
    for name in ("warping_error", "motion_magnitude", "motion_dynamic_degree", "motion_flicker"):
        assert perfect[f"eval/{name}"] == perfect[f"eval/{name}_floor"]
    originals = real_clips(tmp_path / "run0.0")[7:14]
    flow = motion_figures(motion_vectors(originals, DenseFlow(), ["motion"]))
    assert perfect["eval/motion_flicker"] == pytest.approx(flow["motion_flicker"].value, rel=1e-9)
    assert found[2]["eval/motion_flicker"] > 5 * perfect["eval/motion_flicker"]
    rows = {row.name: row for row in rows_from_json((tmp_path / "run0.4" / "evaluation.json").read_text())}
    assert "floor: originals" in rows["motion_flicker"].note and "floor" not in rows["fvd_motion"].note
    assert perfect["eval/kid"] < 0 and "biased downwards" in rows["kid"].note


def test_the_clips_are_those_that_the_configuration_names(runs: dict[str, Path], tmp_path: Path) -> None:
    still = (*MEASURED, f"resume={runs['measured']}", "optim.lr=0", "steps=5", "optim.weight_decay=0")
    data = runs["measured"] / "toy_data"
    common = (*still, f"data.shards={data / 'train'}", "metrics.num_samples=3", "metrics.measures="
    "[{features: {kind: packaged, name: pixels}, metrics: [fid]}]")  # fmt: skip
    choices = {
        "heldout": (f"evaluation.shards={data / 'heldout'}",),
        "train": (f"evaluation.shards={data / 'heldout'}", f"metrics.reference={data / 'train'}"),
        "null": ("evaluation.shards=null",),
    }
    found = {name: measured(run(tmp_path / name, *common, *chosen))[5] for name, chosen in choices.items()}
    assert found["heldout"] != found["train"] == found["null"]


def test_reconstructions_that_are_not_finite_give_no_figure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, float("inf"))
    run(tmp_path / "run", *MEASURED, "steps=2")
    assert not measured(tmp_path / "run") and "the reconstructions cannot be measured" in caplog.text
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_clips_that_can_no_longer_be_read_give_no_figure(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RealClips.batches

    def batches(clips: RealClips, *, numbers: list[int] | None = None, **kwargs: int) -> Iterator[Batch]:
        for batch in whole(clips, numbers=numbers, **kwargs):
            unread = batch.weight * 0 if numbers else batch.weight
            yield dataclasses.replace(batch, weight=unread)

    monkeypatch.setattr(RealClips, "batches", batches)
    data = [f"{field}.shards={runs['plain'] / 'toy_data' / 'heldout'}" for field in ("data", "evaluation")]
    run(tmp_path / "run", *MEASURED, *data, "steps=2")
    assert not measured(tmp_path / "run") and "none of the real clips can be read" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("metrics.num_samples=10",), "metrics.num_samples: got 10, which needs 20 real clips of 9x32x32"),
        (("metrics.shape=[4,32,32]",), "metrics.shape: 4x32x32"),
        (("metrics.reference=/nowhere",), "metrics.reference: got '/nowhere': no such path"),
        (
            ("metrics.measures=[{features: {kind: packaged, name: pixels}, metrics: [sfid]}]",),
            "metrics.measures[0].metrics: sfid reads spatial, which pixels 5x8x14 (no network) does not give",
        ),
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


def test_mistakes_in_the_file_name_the_field() -> None:
    def load(*overrides: str) -> None:
        config_io.load(AutoencoderRun, CONFIG, list(overrides))

    with pytest.raises(ConfigError, match="metrics.decay: got 0.9"):
        load("metrics.decay=0.9")
    with pytest.raises(ConfigError, match="metrics.num_samples: got 3, precision_recall needs 4"):
        load("metrics.num_samples=3")
    score = "metrics.measures=[{features: {kind: transformers, path: clip}, metrics: [clip_score]}]"
    with pytest.raises(ConfigError, match=r"metrics.measures\[0\].metrics: clip_score .* reconstructions have none"):
        load(score)
    with pytest.raises(ConfigError, match="metrics.steps"):  # nothing is sampled
        load("metrics.steps=3")
