"""LPIPS of an autoencoder run's held-out samples: what it is of, what is refused, and training that does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from ltd import autoencoders, storage
from ltd import config as config_io
from ltd.config import ConfigError
from ltd.data import ViewConfig, evaluation_batches
from ltd.encoders.perceptual import StLpipsConfig, build_perceptual
from ltd.evaluation.rows import MetricRow, rows_from_json
from ltd.inference.media import pixels_to_video, video_to_pixels
from ltd.training.autoencoder import AutoencoderRun
from ltd.training.autoencoder_checks import warn_of_small_views
from ltd.training.metrics import write_rows
from tools import report

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug" / "autoencoder_adversarial.yaml")


def arguments(shards: Path, run_dir: Path, *overrides: str, steps: int) -> list[str]:
    common = [f"run_dir={run_dir}", f"data.shards={shards}", f"steps={steps}", "evaluation.every=0"]
    plain = ["adversarial=null", "equivariance=null", "checkpoint.every=1", "statistics_from=4"]
    return [CONFIG, *common, *plain, *overrides]


def run(shards: Path, run_dir: Path, *overrides: str, steps: int) -> int:
    return train.main(arguments(shards, run_dir, *overrides, steps=steps))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))} for line in lines]


def state(run_dir: Path, step: int) -> dict[str, Tensor]:
    reader = storage.Reader(storage.checkpoint_path(run_dir, step))
    groups = {group: reader.read_full(group) for group in reader.groups()}
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def test_lpips_of_held_out_samples_is_measured_without_a_perceptual_term_and_training_does_not_notice(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    schedule = (f"evaluation.shards={shards}", "evaluation.every=2")
    assert run(shards, tmp_path / "without", *schedule, steps=2) == 0
    assert run(shards, tmp_path / "with", *schedule, "lpips={kind: st_lpips, max_frames: 3}", steps=2) == 0
    assert "lpips of held-out samples: st-lpips alexnet" in caplog.text
    with_state, without_state = state(tmp_path / "with", 2), state(tmp_path / "without", 2)
    assert with_state.keys() == without_state.keys()
    assert all(torch.equal(with_state[name], without_state[name]) for name in with_state)
    model = autoencoders.load(storage.checkpoint_path(tmp_path / "with", 2), weights="raw")
    network = build_perceptual(StLpipsConfig(max_frames=3))
    data = config_io.load(AutoencoderRun, CONFIG, arguments(shards, tmp_path / "read", steps=2)[1:]).data
    found: dict[str, list[Tensor]] = {"video": [], "image": []}
    with torch.no_grad():
        for batch in evaluation_batches(data, batch_size=4, windows_per_clip=1):
            assert batch.pixels is not None
            pixels = batch.pixels[batch.weight > 0]
            decoded = model.decode(model.encode(pixels_to_video(pixels)).mean)
            found[batch.kinds[0]].append(
                network(pixels_to_video(video_to_pixels(decoded)), pixels_to_video(pixels)).double()
            )
    with_lpips, without = rows(tmp_path / "with")[-1], rows(tmp_path / "without")[-1]
    for kind, each in found.items():
        assert with_lpips.pop(f"eval/lpips_{kind}") == pytest.approx(float(torch.cat(each).mean()), rel=1e-4)
    assert with_lpips == without


def test_rows_say_what_held_out_figures_were_measured_with(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "evaluation.json").write_text("[{")
    held = (f"evaluation.shards={shards}", "evaluation.every=1", "loss.perceptual_weight=0.1")
    assert run(shards, run_dir, *held, "lpips={kind: st_lpips, max_frames: 3}", steps=1) == 0
    assert "evaluation.json is replaced: not a list of metric rows" in caplog.text
    other = MetricRow(part="samples", name="fvd", value=1.0, unit="", n=2)
    write_rows(run_dir, [other])
    assert run(shards, run_dir, *held, "lpips={kind: st_lpips, max_frames: 3}", steps=2) == 0
    first, *found = rows_from_json((run_dir / "evaluation.json").read_text())
    assert first == other
    last, units = rows(run_dir)[-1], {"psnr": "_db"}
    kinds = {"video": 16, "image": 8}
    names = [(name, kind) for kind in kinds for name in ("psnr", "ssim", "perceptual", "lpips")]
    assert [row.name for row in found] == [f"{name}_{kind}" for name, kind in names]
    for row, (name, kind) in zip(found, names, strict=True):
        assert row.value == last[f"eval/{row.name}{units.get(name, '')}"]
        assert (row.part, row.weights, row.n, row.floor) == ("heldout", "raw", kinds[kind], None)
        assert row.note == "reconstructions of held-out samples after step 2"
        assert row.network == ("none" if name in ("psnr", "ssim") else "st-lpips alexnet (shift-tolerant)")
        assert ("at most 3 evenly spaced frames" in row.preprocessing) == (name == "lpips") and row.preprocessing
    assert report.main([str(run_dir), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "heldout/lpips_video" in page and "st-lpips alexnet (shift-tolerant)" in page
    assert "at most 3 evenly spaced frames of each clip, raw weights" in page


def test_lpips_of_the_terms_own_network_is_that_of_the_term(shards: Path, tmp_path: Path) -> None:
    overrides = (f"evaluation.shards={shards}", "evaluation.every=1")
    both = ("loss.perceptual_weight=0.1", "lpips={kind: st_lpips}")
    assert run(shards, tmp_path / "run", *overrides, *both, steps=1) == 0
    last = rows(tmp_path / "run")[-1]
    assert last["eval/lpips_video"] == last["eval/perceptual_video"] > 0


def test_a_network_of_lpips_that_is_not_there_names_its_field(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = (f"evaluation.shards={shards}", "evaluation.every=1")
    with pytest.raises(SystemExit):
        run(shards, tmp_path / "run", *held, "lpips={kind: vgg_lpips, backbone: b.pth, heads: absent.pth}", steps=1)
    assert "error: lpips.heads: no file absent.pth; needed weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("lpips={kind: st_lpips}",), r"lpips: is measured of held-out samples; set evaluation\.every"),
        (
            ("lpips={kind: st_lpips}", "evaluation.every=1", "data.views=[{num_frames: 9, height: 16, width: 64}]"),
            r"lpips: no view of data\.views has 32 pixels or more on its shorter side, got 16",
        ),
        (
            (
                "lpips={kind: st_lpips}",
                "evaluation.every=1",
                "data.batching={kind: buckets, tokens: 64, token: [4, 4, 4], multiple: 4, sides: [16, 24]}",
            ),
            r"lpips: no bucket of data\.batching\.sides has 32 pixels or more on its shorter side, got 24 at most",
        ),
    ],
)
def test_lpips_that_nothing_could_have_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_io.load(AutoencoderRun, CONFIG, ["evaluation.every=0", "adversarial=null", *overrides])


def test_lpips_takes_buckets_of_which_one_is_large_enough() -> None:
    # The square nearest to a side of 30 pixels, in tokens of 8, is 32 x 32.
    batching = "data.batching={kind: buckets, tokens: 64, token: [4, 8, 8], multiple: 4, sides: [16, 30]}"
    overrides = ["evaluation.every=1", "adversarial=null", "lpips={kind: st_lpips}", batching]
    assert config_io.load(AutoencoderRun, CONFIG, overrides).lpips is not None


@pytest.mark.parametrize(
    "overrides",
    [
        ("evaluation.every=1", "lpips={kind: st_lpips}"),
        ("stages=[{from_step: 1, set: {evaluation: {every: 1}, lpips: {kind: st_lpips}}}]",),
    ],
)
def test_lpips_without_held_out_samples_is_refused(
    overrides: tuple[str, ...], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(shards, tmp_path / "run", *overrides, steps=2)
    error = capsys.readouterr().err
    assert "error: lpips: is measured of held-out samples, and evaluation.shards is null" in error
    assert ("null after step 1;" in error) == (len(overrides) == 1)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_toy_data_are_held_out_samples_and_small_images_are_warned_of(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy = ("data.shards=null", "toy_data={num_samples: 4, num_heldout: 2}", "evaluation.every=1")
    views = "data.views=[{num_frames: 9, height: 32, width: 32}, {num_frames: 1, height: 16, width: 32}]"
    assert run(shards, tmp_path / "run", *toy, views, "lpips={kind: st_lpips, max_frames: 1}", steps=1) == 0
    assert sum("images get no LPIPS" in record.getMessage() for record in caplog.records) == 1
    last = rows(tmp_path / "run")[-1]
    assert "eval/lpips_video" in last and "eval/lpips_image" not in last


@pytest.mark.parametrize(
    ("sides", "told"),
    [
        ({"video": (32, 48), "image": (32,)}, None),
        ({"video": (32,), "image": (16,)}, "images get no LPIPS"),
        ({"video": (16,), "image": (32,)}, "videos get no LPIPS"),
        ({"video": (16, 32), "image": (32,)}, "eval/lpips_video is of the larger videos alone"),
    ],
)
def test_views_too_small_for_lpips_are_warned_of_once(
    sides: dict[str, tuple[int, ...]], told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    frames = {"video": 9, "image": 1}
    warn_of_small_views(
        [ViewConfig(num_frames=frames[kind], height=64, width=side) for kind in sides for side in sides[kind]]
    )
    assert [record.getMessage().split(": ", 2)[2] for record in caplog.records] == ([] if told is None else [told])
