"""CLIP score, warping error and motion of samples while training: what they say, on any number of processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from ltd import config as config_io
from ltd.config import ConfigError
from ltd.data import DataConfig, ViewConfig
from ltd.data.real_clips import RealClips
from ltd.encoders.features import build_features
from ltd.encoders.flow import DenseFlow
from ltd.encoders.packaged import PackagedFeaturesConfig
from ltd.encoders.pretrained import ImageTextFeatures, TransformersFeaturesConfig
from ltd.evaluation.figures import FRAMES_SHOWN, MOTION_METRICS, caption_figures, figure_names, motion_figures
from ltd.evaluation.measures import caption_rows, motion_rows
from ltd.evaluation.protocol import ClipFeatures, Clips, Reference
from ltd.evaluation.rows import rows_from_json
from ltd.inference.generate import Generator
from ltd.inference.media import pixels_to_video, video_to_pixels
from ltd.parallel.config import ParallelConfig
from ltd.parallel.layout import Layout
from ltd.training.denoiser import DenoiserRun
from ltd.training.measures import Against, Captions, ClipSet, MeasureConfig, NetworkMeasure
from ltd.training.reference import ReferenceFeatures, read_features, write_features
from tests.encoders.standins import save_clip
from tests.training import metric_runs
from tests.training.metric_runs import Runs, measured, same, state

CONFIG = metric_runs.ROOT / "configs" / "debug" / "denoiser_metrics.yaml"
SMALL = ("toy_data.num_samples=18", "toy_data.num_heldout=2", "data.global_batch=2", "evaluation.every=0")
SMALL += ("steps=2", "ema.decays=[0.5]", "checkpoint.every=2")
SMALL += ("metrics.every=2", "metrics.num_samples=7", "metrics.steps=2", "metrics.batch_size=3")
MOTION = "{metrics: [warping_error, motion]}"
ALL = {"clip_score_clip", "fid_clip", "warping_error", "motion_magnitude", "motion_dynamic_degree", "motion_flicker"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


def measures(clip: Path) -> str:
    network = f"{{kind: transformers, path: {clip}}}"
    return f"metrics.measures=[{{name: clip, features: {network}, metrics: [fid, clip_score]}}, {MOTION}]"


RUNS = Runs(CONFIG, SMALL)
run = RUNS.run


def seen(monkeypatch: pytest.MonkeyPatch, change: float = 1.0) -> list[Tensor]:
    """Let samples be soft pictures that drift, as random weights make none, and keep what was made."""
    made: list[Tensor] = []

    def decode(generator: Generator, latents: Tensor) -> Tensor:
        video = generator.autoencoder.decode(latents)
        coarse = torch.nn.functional.adaptive_avg_pool3d(video[:, :, :1], (1, 4, 4)) * 8
        large = torch.nn.functional.interpolate(coarse[:, :, 0], size=(64, 64), mode="bicubic")
        moved = [large[:, :, 8 + round(change * t) :, 8 : 8 + 32][:, :, :32] for t in range(video.shape[2])]
        video = torch.stack(moved, dim=2).clamp(-1, 1)
        made.append(video_to_pixels(video))
        return pixels_to_video(made[-1])

    monkeypatch.setattr(Generator, "decode", decode)
    return made


def test_values_are_those_of_the_evaluation_tool(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = seen(monkeypatch)
    run_dir = run(tmp_path / "run", measures(clip))
    real = RealClips(
        DataConfig(shards=str(run_dir / "toy_data" / "train")),
        ViewConfig(num_frames=9, height=32, width=32),
        needed=16,
        seed=0,
    )
    (batch,) = real.batches(batch_size=16, global_rank=0, world_size=1)
    assert batch.pixels is not None
    captions = batch.captions[:7]
    samples = Clips(torch.cat(made), captions, captions)
    reference = Reference(
        Clips(batch.pixels, batch.captions, batch.captions), Clips(batch.pixels[:7], captions, captions)
    )
    features = build_features(TransformersFeaturesConfig(path=str(clip)))
    assert isinstance(features, ImageTextFeatures)
    rows = motion_rows(samples, reference, DenseFlow())
    rows += caption_rows(
        samples, reference, ClipFeatures(features, frames=FRAMES_SHOWN), features.embed_captions, suffix="_clip"
    )
    table = {row.name: row for row in rows_from_json((run_dir / "evaluation.json").read_text())}
    values = measured(run_dir)[2]
    assert table.keys() == ALL and len(rows) == 5
    for row in rows:
        found = table[row.name]
        assert found.value == values[f"eval/{row.name}"] == pytest.approx(row.value, rel=1e-6), row.name
        assert found.floor == values[f"eval/{row.name}_floor"] == pytest.approx(row.floor, rel=1e-6), row.name
        assert (found.network, found.preprocessing, found.n, found.unit) == (
            *(row.network, row.preprocessing, row.n, row.unit),
        )
    assert min(table["clip_score_clip"].value, table["clip_score_clip"].floor or 0) > 10
    assert table["motion_magnitude"].value > 0.5 and table["warping_error"].value > 0
    assert "7 of 7 clips" in table["warping_error"].note and "after step 2" in table["clip_score_clip"].note


def test_samples_that_stand_still_fall_below_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, change=0.0)
    values = measured(run(tmp_path / "run", f"metrics.measures=[{MOTION}]"))[2]
    for name in ("magnitude", "flicker"):
        assert values[f"eval/motion_{name}"] < 0.01 * values[f"eval/motion_{name}_floor"]


def test_a_metric_that_cannot_be_computed_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def decode(generator: Generator, latents: Tensor) -> Tensor:
        video = generator.autoencoder.decode(latents)
        random = torch.Generator().manual_seed(0)
        return torch.randint(0, 2, video.shape, generator=random) * 2.0 - 1

    monkeypatch.setattr(Generator, "decode", decode)
    monkeypatch.setattr("ltd.evaluation.motion._CONTRADICTION", (0.0, -1.0))  # no flow agrees
    values = measured(run(tmp_path / "run", f"metrics.measures=[{MOTION}]"))[2]
    assert "warping_error of the samples is left out: warping error: no pixel of 7 clips" in caplog.text
    assert {name for name in values if not name.endswith("_floor")} == {
        *("eval/motion_magnitude", "eval/motion_dynamic_degree", "eval/motion_flicker")
    }


def test_one_and_two_processes_find_the_same_bits(clip: Path, tmp_path: Path) -> None:
    trunk = run(tmp_path / "trunk", "metrics.every=0")
    still = (f"resume={trunk}", "optim.lr=0", "steps=3", "optim.weight_decay=0", "optim.warmup_steps=0")
    still += (f"data.shards={trunk / 'toy_data' / 'train'}", measures(clip))
    one = run(tmp_path / "one", *still, f"metrics.cache={tmp_path / 'cache1'}")
    two = RUNS.launch(tmp_path / "two", *still, f"metrics.cache={tmp_path / 'cache2'}", "parallel.zero=2")
    assert measured(one)[3] == measured(two)[3]
    assert {f"eval/{name}" for name in ALL} - {"eval/warping_error"} <= measured(one)[3].keys()
    assert same(state(one, 3), state(trunk, 2)) is False, "a step was taken"


class Colours:
    """Mean colours, and captions as the colours they name."""

    name, preprocessing, dim = "colours", "none", 3

    def __call__(self, clips: Tensor) -> Tensor:
        return clips.float().mean(dim=(1, 2, 3))

    def embed_captions(self, captions: list[str]) -> Tensor:
        return torch.eye(3)[[("red", "green", "blue").index(caption) for caption in captions]]


def test_clip_score_pairs_clips_and_captions_by_number() -> None:
    config = MeasureConfig(features=PackagedFeaturesConfig(), metrics=("clip_score",))
    measure = NetworkMeasure(config, Colours(), 5, "metrics")
    assert measure.dims == {"shown": 6}
    numbers = [4, 1, 3]  # in any order; clip 2 could not be read, clip 3 has no caption
    pixels = torch.zeros(3, 5, 4, 4, 3, dtype=torch.uint8)
    for row, number in enumerate(numbers):
        pixels[row, ..., number % 3] = 200
    clips = ClipSet.of(numbers, measure(pixels))
    texts = measure.embed_captions(["green", "blue", "green"])
    against = Against(clips, Captions([1, 2, 4], texts))
    found = measure.figures("clip_score", clips, against)["clip_score"]
    assert (found.value, found.n) == (pytest.approx(100), 4)
    wrong = Against(clips, Captions([1, 2, 4], texts.roll(1, dims=1)))
    assert measure.figures("clip_score", clips, wrong)["clip_score"].value == pytest.approx(0)
    half = pixels.clone()
    half[:, 3:] = torch.tensor([0, 0, 255], dtype=torch.uint8)  # the second of the two frames that are shown
    halved = ClipSet.of(numbers, measure(half))
    assert measure.figures("clip_score", halved, against)["clip_score"].value == pytest.approx(50)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("metrics.measures=[{features: {kind: packaged, name: pixels}, metrics: [clip_score]}]",),
            "metrics.measures[0].metrics: clip_score holds frames against captions, and pixels 5x8x14 (no network) has "
            "no text side",
        ),
        (
            ("metrics.measures=[{metrics: [motion]}]", "metrics.shape=[1,32,32]"),
            "metrics.measures[0].metrics: motion fails on a clip of 1x32x32: flow needs 2 frames of 16 x 16 or more",
        ),
        (
            ("metrics.measures=[{metrics: [fid]}]",),
            "metrics.measures[0].features: got null, fid reads a network's features",
        ),
        (
            ("metrics.measures=[{features: {kind: packaged, name: pixels}, metrics: [fid, motion]}]",),
            "metrics.measures[0].metrics: motion is of optical flow and reads no network",
        ),
        (
            ("metrics.measures=[CLIP]", "model.text_dim=null", "text=null"),
            "metrics.measures[0].metrics: clip_score holds samples against their captions, and the model takes none",
        ),
    ],
)
def test_mistakes_end_before_any_step(
    overrides: tuple[str, ...], message: str, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{{features: {{kind: transformers, path: {clip}}}, metrics: [clip_score]}}"
    arguments = [str(CONFIG), f"run_dir={tmp_path / 'run'}", "parallel.engine=torch", *SMALL]
    with pytest.raises(SystemExit):
        train.main([*arguments, *(override.replace("CLIP", text) for override in overrides)])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_without_opencv_the_field_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "metrics.measures=[{metrics: [warping_error]}]")
    message = "metrics.measures[0].metrics: warping_error reads optical flow; flow: needs the package opencv-python"
    assert message in capsys.readouterr().err


def test_a_clip_without_tokenizer_is_refused(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "clip").mkdir(exist_ok=True)
        (tmp_path / "clip" / name).write_bytes((clip / name).read_bytes())
    with pytest.raises(SystemExit):
        run(tmp_path / "run", measures(tmp_path / "clip"))
    found = capsys.readouterr().err
    assert "metrics.measures[0].features.path: " in found and "holds no tokenizer" in found


def test_real_clips_without_captions_have_no_clip_score(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RealClips, "told", lambda *_: ("", -1))
    with pytest.raises(SystemExit):
        run(tmp_path / "run", measures(clip))
    assert "the 7 real clips that were drawn have none" in capsys.readouterr().err


class Sum:
    """Sums of clips; keeps how many it saw."""

    def __init__(self, name: str) -> None:
        self.identity, self.seen = {"network": name}, 0

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        self.seen += len(clips)
        return {"features": clips.double().sum(dim=(1, 2, 3, 4))[:, None]}


def test_networks_see_the_same_clips(tmp_path: Path) -> None:
    from ltd.data.synthetic import make_toy_shards

    make_toy_shards(tmp_path / "toy", num_videos=12, num_images=0, num_frames=9, height=32, width=32, seed=0)
    view = ViewConfig(num_frames=9, height=32, width=32)
    clips = RealClips(DataConfig(shards=str(tmp_path / "toy")), view, needed=10, seed=0)
    layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)

    def get(*extractors: Sum) -> ReferenceFeatures:
        reference = ReferenceFeatures(clips, 4, tmp_path / "cache", batch_size=4, layout=layout, moved=lambda: None)
        first, second = reference.get(extractors)
        assert first.reference.numbers == second.reference.numbers == reference.numbers
        assert first.floor.outputs["features"].equal(second.floor.outputs["features"])
        assert first.reference.outputs["features"].dtype == torch.float64, "as precise as it was made"
        return reference

    whole = get(Sum("a"), Sum("b"))
    assert whole.numbers == [4, 5, 6, 7]
    path, identity = whole._file(Sum("b"))
    rows = read_features(path, identity)
    assert rows is not None
    write_features(path, identity, {name: values[1:] for name, values in rows.items()})  # clip 0 was not read
    found = Sum("a"), Sum("b")
    assert get(*found).numbers == [4, 5, 6, 7] and [one.seen for one in found] == [10, 10]
    path.unlink()  # one is missing, and the other lacks a clip
    path, identity = whole._file(Sum("a"))
    write_features(path, identity, {name: values[1:] for name, values in rows.items()})
    found = Sum("a"), Sum("b")
    assert get(*found).numbers == [4, 5, 6, 7] and [one.seen for one in found] == [10, 20]


def test_names_of_figures_are_known_before_they_are_computed() -> None:
    moved = motion_figures(dict.fromkeys(MOTION_METRICS, torch.ones(2, 3)))
    assert list(moved) == [name for metric in MOTION_METRICS for name in figure_names(metric)]
    assert tuple(caption_figures(torch.ones(2, 1, 3), torch.ones(2, 3))) == figure_names("clip_score")


def test_a_name_must_tell_networks_apart() -> None:
    with pytest.raises(ConfigError, match="metrics.measures: got motion twice under one name"):
        config_io.load(DenoiserRun, CONFIG, ["metrics.measures=[{metrics: [motion]}, {metrics: [motion]}]"])
