import io
import json
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import ltd.autoencoders
from ltd.data.index import index_tar, open_index
from ltd.data.plan import ViewConfig
from ltd.data.write import encode_image, encode_video, write_image, write_video
from ltd.evaluation.rows import rows_from_json
from ltd.shapes import Compression
from tests.encoders.standins import Inception, save
from tools import evaluate

SHOTS = 6


def _shot(number: int, frames: int = 12) -> np.ndarray:
    """A shot of its own colours and texture that drifts to the right."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (8, 16, 3)).astype(np.uint8)
    picture = small.repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(picture, 2 * k, axis=1) for k in range(frames)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards of six captioned shots and their stills, and samples that are windows of the first three."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "train").mkdir()
    with tarfile.open(root / "train/a.tar", "w") as tar:
        for i in range(SHOTS):
            members = {f"v{i}.mp4": encode_video(_shot(i), 8.0), f"v{i}.txt": f"shot {i}".encode()}
            members |= {f"i{i}.png": encode_image(_shot(i)[3]), f"i{i}.txt": f"shot {i}".encode()}
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index_tar(root / "train/a.tar")
    (root / "samples").mkdir()
    rows = []
    for i in range(3):
        facts = {
            "prompt": f"shot {i}",
            "seed": 7,
            "steps": 20,
            "guidance": 2.0,
            "weights": "ema",
            "height": 32,
            "width": 64,
        }
        write_video(root / f"samples/{i}.mp4", _shot(i)[2:7], fps=8.0)
        write_image(root / f"samples/{i}.png", _shot(i)[8])
        rows += [{"file": f"{i}.mp4", "num_frames": 5, **facts}, {"file": f"{i}.png", "num_frames": 1, **facts}]
    (root / "samples/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


class _MeanColours:
    """Stands in for the networks, which have tests of their own: 12 mean colours, and the motion of the brightness."""

    name, preprocessing, dim = "stand-in", "none", 13

    def __call__(self, clips):
        x = clips.float()
        colours = x.mean(dim=(1, 2)).unfold(1, 16, 16).mean(dim=3)  # (b, 4, 3)
        motion = x.mean(dim=4).diff(dim=1).abs().mean(dim=(1, 2, 3)) if x.shape[1] > 1 else torch.zeros(len(x))
        return torch.cat((colours.flatten(1), motion[:, None]), dim=1)


@pytest.fixture
def light(monkeypatch):
    real, networks = evaluate.build_packaged, ("transnetv2", "efficientnet_lite0")
    monkeypatch.setattr(
        evaluate, "build_packaged", lambda name, **rest: _MeanColours() if name in networks else real(name)
    )


def _run(run: Path, *arguments: object) -> dict[str, object]:
    run.mkdir(exist_ok=True)
    assert evaluate.main([str(run), *map(str, arguments)]) == 0
    rows = rows_from_json((run / "evaluation.json").read_text())
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def test_samples_get_every_row_with_floor_and_origin(data, light, tmp_path, capsys):
    rows = _run(tmp_path / "run", "--samples", data / "samples", "--reference", data / "train", "--fps", 8)
    assert set(rows) == {
        "frechet_frames", "frechet_frames_real_same_captions",
        "frechet_clips", "frechet_clips_real_same_captions", "frechet_clips_shuffled_frames",
        "frechet_motion", "frechet_motion_real_same_captions", "frechet_motion_shuffled_frames",
        "clip_retrieval_top1_features", "clip_retrieval_top1_pixels", "nearest_training_clip",
        "frechet_images", "frechet_images_real_same_captions",
        "image_retrieval_top1_features", "image_retrieval_top1_pixels", "nearest_training_image",
    }  # fmt: skip
    for row in rows.values():
        assert row.floor is not None and row.network and row.preprocessing
        assert (row.weights, row.steps, row.guidance, row.seed) == ("ema", 20, 2.0, 7)
    # 3 samples of each kind; two frames of each clip
    assert (rows["frechet_clips"].n, rows["frechet_frames"].n, rows["frechet_images"].n) == (3, 6, 3)
    assert "blind" in rows["frechet_clips"].note
    assert rows["clip_retrieval_top1_pixels"].value == 1.0
    assert rows["clip_retrieval_top1_pixels"].floor == pytest.approx(1 / 3)
    assert rows["nearest_training_clip"].value < 0.3 * rows["nearest_training_clip"].floor
    assert rows["frechet_motion_shuffled_frames"].value > 3 * rows["frechet_motion"].floor
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_wrong_samples_score_worse(data, light, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    rows = [json.loads(line) for line in (data / "samples/samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["num_frames"] > 1]
    noise = np.random.default_rng(0)
    for i, row in enumerate(rows):
        frames = _shot((i + 1) % 3)[2:7]  # the next prompt's shot, and grain
        write_video(
            bad / row["file"], (frames + noise.normal(0, 40, frames.shape)).clip(0, 255).astype(np.uint8), fps=8.0
        )
    (bad / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = _run(tmp_path / "good", "--samples", data / "samples", "--reference", data / "train")
    worse = _run(tmp_path / "worse", "--samples", bad, "--reference", data / "train")
    assert worse["frechet_motion"].value > good["frechet_motion"].value
    assert worse["frechet_motion"].floor == good["frechet_motion"].floor
    for name in ("clip_retrieval_top1_pixels", "clip_retrieval_top1_features"):
        assert (good[name].value, worse[name].value) == (1.0, 0.0)


def test_unknown_captions_leave_retrieval_out(data, light, tmp_path):
    rows = [json.loads(line) for line in (data / "samples/samples.jsonl").read_text().splitlines()]
    other = tmp_path / "other"
    other.mkdir()
    for row in rows:
        (other / row["file"]).write_bytes((data / "samples" / row["file"]).read_bytes())
    (other / "samples.jsonl").write_text("".join(json.dumps(row | {"prompt": "a new one"}) + "\n" for row in rows))
    found = _run(tmp_path / "run", "--samples", other, "--reference", data / "train")
    assert not any("retrieval" in name or "same_captions" in name for name in found)
    assert {"frechet_clips", "nearest_training_clip", "nearest_training_image"} <= set(found)


def test_prompts_choose_samples_and_max_clips_bounds_them(data, light, tmp_path):
    (tmp_path / "prompts.txt").write_text("shot 0\nshot 2\n")
    found = _run(
        tmp_path / "run",
        "--samples",
        data / "samples",
        "--reference",
        data / "train",
        "--prompts",
        tmp_path / "prompts.txt",
    )
    assert found["frechet_clips"].n == 2
    assert found["clip_retrieval_top1_pixels"].floor == 0.5
    found = _run(tmp_path / "run", "--samples", data / "samples", "--reference", data / "train", "--max-clips", 2)
    assert found["frechet_clips"].n == 2 and found["nearest_training_clip"].n == 3


def test_matched_windows_are_of_the_samples_own_captions(data):
    index, view = open_index(str(data / "train")), ViewConfig(num_frames=5, height=32, width=64)
    table = [row for row in evaluate.read_samples(data / "samples", None) if row["num_frames"] == 5]
    samples = evaluate.load_samples(data / "samples", table)
    pairing = evaluate.pair_up(index, view, len(samples), max_clips=64)
    counted, reference = evaluate.read_reference(samples, index, pairing, seed=0)
    assert reference.matched.captions == counted.captions == ("shot 0", "shot 1", "shot 2")
    assert len(reference.pool) == 6
    for i, clip in enumerate(reference.matched.pixels.float()):
        errors = [
            min(float((clip[0] - torch.from_numpy(f).float()).abs().mean()) for f in _shot(k)) for k in range(SHOTS)
        ]
        assert int(np.argmin(errors)) == i
    again = evaluate.read_reference(samples, index, pairing, seed=0)[1]
    assert torch.equal(again.pool.pixels, reference.pool.pixels)
    other = evaluate.read_reference(samples, index, pairing, seed=1)[1]
    assert other.pool.groups != reference.pool.groups


def test_autoencoder_rows_and_kept_parts(data, light, tmp_path, monkeypatch):
    class Darker:
        """A lossy stand-in whose error is known: 10 steps of 255 darker, where that does not clip."""

        compression = Compression(4, 8, 8)

        def encode(self, video):
            self.mean = video
            return self

        def decode(self, latents):
            return latents - 10 / 127.5

    seen = {}
    monkeypatch.setattr(ltd.autoencoders, "load", lambda path, **rest: seen.update(path=path, **rest) or Darker())
    run = tmp_path / "run"
    before = _run(run, "--samples", data / "samples", "--reference", data / "train")
    after = _run(run, "--autoencoder", "somewhere", "--shards", data / "train", "--size", "5x32x64")
    assert {name: row for name, row in after.items() if row.part == "samples"} == before
    assert (seen["path"], seen["weights"]) == ("somewhere", "ema")
    assert after["psnr"].n == 12  # six shots, two windows each
    assert 28.1 < after["psnr"].value < 29.0  # 20 log10(255 / 10) = 28.13, a little more where black clips
    assert 0.9 < after["ssim"].value < 1 and after["psnr"].weights == "ema"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure: give --shards"),
        (["--samples", "S"], "--reference: samples are held against training clips"),
        (["--samples", "EMPTY", "--reference", "R"], "--samples: no samples.jsonl in"),
        (["--samples", "S", "--reference", "R", "--prompts", "absent.txt"], "--prompts: absent.txt does not exist"),
        (["--samples", "S", "--reference", "R", "--max-clips", "0"], "--max-clips: must be at least 1, got 0"),
        (["--samples", "S", "--reference", "R", "--max-clips", "1"], "need 2 samples and 4 training windows"),
        (
            ["--samples", "S", "--reference", "R", "--max-clips", "1"],
            "error: --max-clips: Frechet distances of 5x32x64",
        ),
        (["--samples", "S", "--reference", "R", "--fps", "-1"], "error: --fps: got -1.0, needed a rate"),
        (["--samples", "S", "--reference", "/nope"], "error: --reference: got '/nope': no such path"),
        (["--shards", "R", "--size", "17x64"], "--size: '17x64' is not FRAMESxHEIGHTxWIDTH"),
        (["--shards", "R", "--size", "0x64x64"], "error: --size: num_frames: got 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(data, tmp_path, capsys, arguments, message):
    places = {"S": str(data / "samples"), "R": str(data / "train"), "EMPTY": str(tmp_path)}
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path), *(places.get(argument, argument) for argument in arguments)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists()


def test_a_sample_of_another_size_than_its_row_is_refused(data):
    rows = evaluate.read_samples(data / "samples", None)[:1]
    with pytest.raises(evaluate.ConfigError, match="its row of samples.jsonl says otherwise"):
        evaluate.load_samples(data / "samples", [rows[0] | {"height": 64}])
    with pytest.raises(evaluate.ConfigError, match="gone.mp4 is named in samples.jsonl and does not exist"):
        evaluate.load_samples(data / "samples", [rows[0] | {"file": "gone.mp4"}])


def _inception(path: Path) -> None:
    """Write the stand-in for the TorchScript Inception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        save(Inception(), path)


def test_metrics_by_name_stand_beside_real_clips(data, light, tmp_path):
    pytest.importorskip("cv2")
    _inception(tmp_path / "inception.pt")
    names = ["fid", "sfid", "inception_score", "fvd", "warping_error", "motion"]
    network = f"inception:{tmp_path / 'inception.pt'}"
    common = ["--samples", data / "samples", "--reference", data / "train", "--fps", 8]
    before = _run(tmp_path / "before", *common)
    rows = _run(
        tmp_path / "run", *common, "--metrics", *names, "--features", network, "--clip-features", "frame_differences"
    )
    of_frames = {"fid", "sfid", "inception_score", "inception_score_std"}
    new = {f"{name}_{kind}" for name in of_frames for kind in ("frames", "images")}
    new |= {"fvd", "warping_error", "motion_magnitude", "motion_dynamic_degree", "motion_flicker"}
    assert set(rows) - set(before) == new
    for name in new:
        row = rows[name]
        assert row.floor is not None and row.network and row.preprocessing and row.n
        assert (row.weights, row.steps, row.guidance, row.seed) == ("ema", 20, 2.0, 7)
    assert "inception-v3 2015-12-05 (TorchScript, sha256" in rows["fid_frames"].network
    assert "published" not in rows["fid_frames"].note and "not the I3D of published figures" in rows["fvd"].note
    assert (rows["fid_frames"].n, rows["fid_images"].n, rows["warping_error"].n) == (6, 3, 3)
    # clips cut from the same shots move as real ones do: 2 pixels to the left in each frame
    assert rows["motion_magnitude"].value == pytest.approx(rows["motion_magnitude"].floor, rel=0.3)
    assert 1 < rows["motion_magnitude"].value < 3


def test_lpips_of_reconstructions(data, tmp_path, monkeypatch):
    class Perceptual:
        name, preprocessing = "stand-in", "none"

        def __call__(self, x, y):
            return (x - y).abs().mean(dim=(1, 2, 3, 4))

    class Darker:
        compression = Compression(4, 8, 8)

        def encode(self, video):
            self.mean = video
            return self

        def decode(self, latents):
            return latents * 0.9

    built = []
    monkeypatch.setattr(
        evaluate, "build_perceptual", lambda config, device, field: built.append(config) or Perceptual()
    )
    monkeypatch.setattr(ltd.autoencoders, "load", lambda path, **rest: Darker())
    heldout = ["--autoencoder", "somewhere", "--shards", data / "train", "--size", "5x32x64"]
    rows = _run(tmp_path / "run", *heldout, "--metrics", "lpips", "--perceptual", "vgg.pth")
    assert rows["lpips"].network == "stand-in" and rows["lpips"].n == 12
    assert 0.02 < rows["lpips"].value < 0.1  # a tenth of the mean distance from grey
    assert built[0].kind == "vgg_lpips" and built[0].backbone == "vgg.pth"
    assert "lpips" not in _run(tmp_path / "plain", *heldout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "S", "--reference", "R", "--metrics", "lpips"], "--metrics: lpips measures what --shards names"),
        (["--shards", "R", "--metrics", "fid"], "--metrics: fid measures what --samples names, which is not given"),
        (["--samples", "S", "--reference", "R", "--features", "vgg"], "features: got 'vgg', needed efficientnet_lite0"),
        (["--shards", "R", "--metrics", "lpips", "--perceptual", "R"], "error: --perceptual: "),
        (["--samples", "S", "--reference", "R", "--metrics", "fdd"], "invalid choice: 'fdd'"),
        (
            ["--samples", "S", "--reference", "R", "--metrics", "precision_recall", "--features", "pixels"],
            "--metrics: 1x32x64: precision_recall: got 3 samples, needed 4 or more",
        ),
    ],
)
def test_mistakes_about_metrics(data, light, tmp_path, capsys, arguments, message):
    places = {"S": str(data / "samples"), "R": str(data / "train")}
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path), *(places.get(argument, argument) for argument in arguments)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists()


class _Never:
    """An autoencoder whose sizes are known and that must not be used."""

    compression = Compression(4, 8, 8)

    def __getattr__(self, name):
        raise AssertionError(f"{name} was reached")


def _refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("shards", "size", "message"),
    [
        ("R", "9x30x32", "error: --size: got 9x30x32: height must be a multiple of 8 (compression), got 30; nearest"),
        ("R", "6x32x64", "error: --size: got 6x32x64: num_frames must be 1 + k * 4 (compression.t), got 6"),
        ("/nope", "5x32x64", "error: --shards: got '/nope': no such path"),
        ("R", "97x32x64", "error: --size: got 97x32x64, but none of the 12 samples fits"),
    ],
)
def test_held_out_data_that_do_not_fit_name_their_option(data, tmp_path, capsys, monkeypatch, shards, size, message):
    monkeypatch.setattr(ltd.autoencoders, "load", lambda path, **rest: _Never())
    found = _refused(capsys, tmp_path, "--shards", str(data / "train") if shards == "R" else shards, "--size", size)
    assert found.startswith(message) and "data." not in found


def _copy(data: Path, to: Path, edit) -> Path:
    """Copy the samples; ``edit`` changes the lines of samples.jsonl."""
    shutil.copytree(data / "samples", to)
    lines = (to / "samples.jsonl").read_text().splitlines()
    (to / "samples.jsonl").write_text("\n".join(edit(lines)) + "\n")
    return to


def _cut(name: str):
    def edit(lines, to):
        path = to / name
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
        return lines

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines, to: [*lines[:2], lines[2][:40]], "line 3 of SAMPLES/samples.jsonl is not JSON ("),
        (lambda lines, to: ["[1]", *lines], "line 1 of SAMPLES/samples.jsonl is a list, needed the object of a sample"),
        (lambda lines, to: ['{"file": "0.png"}'], "line 1 of SAMPLES/samples.jsonl lacks height, num_frames, prompt"),
        (lambda lines, to: [lines[0].replace("32", '"a"')], "line 1 of SAMPLES/samples.jsonl: height: got 'a', needed"),
        (lambda lines, to: [lines[0].replace('"shot 0"', "null")], "jsonl: prompt: got None, needed a text"),
        # the second size's, so that the first one's would have been measured
        (_cut("2.png"), "SAMPLES/2.png (1x32x64 by samples.jsonl) cannot be read: "),
        (_cut("2.mp4"), "SAMPLES/2.mp4 (5x32x64 by samples.jsonl) cannot be read: "),
        (
            lambda lines, to: [line.replace('"num_frames": 5', '"num_frames": 9') for line in lines],
            "SAMPLES/0.mp4 (9x32x64 by samples.jsonl) cannot be read: ",
        ),
    ],
)
def test_damaged_samples_are_one_line_before_anything_is_measured(data, tmp_path, capsys, monkeypatch, edit, message):
    monkeypatch.setattr(evaluate, "_measure_shape", _reached)
    samples = tmp_path / "samples"
    _copy(data, samples, lambda lines: edit(lines, samples))
    found = _refused(capsys, tmp_path, "--samples", samples, "--reference", data / "train")
    assert found.replace(str(samples), "SAMPLES").startswith("error: --samples: ")
    assert message in found.replace(str(samples), "SAMPLES")


def _reached(*arguments):
    raise AssertionError("measured")


def test_damaged_results_are_refused_before_anything_is_measured(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ltd.autoencoders, "load", _reached)
    path = tmp_path / "evaluation.json"
    for text in ("[{", '[{"name": "psnr"}]', "5"):
        path.write_text(text)
        found = _refused(capsys, tmp_path, "--shards", data / "train", "--size", "5x32x64")
        assert found.startswith(f"error: RUN: {path} is damaged: ") and path.read_text() == text


def test_counts_of_all_sizes_are_checked_before_any_is_measured(data, tmp_path, capsys, monkeypatch):
    """Three clips show six frames, enough for the metric; the three stills are too few, but come second."""
    monkeypatch.setattr(evaluate, "_measure_shape", _reached)
    monkeypatch.setattr(ltd.autoencoders, "load", _reached)
    both = ["--samples", data / "samples", "--reference", data / "train", "--shards", data / "train"]
    metrics = ["--size", "5x32x64", "--metrics", "density_coverage", "--features", "pixels"]
    found = _refused(capsys, tmp_path, *both, *metrics)
    assert found.startswith("error: --metrics: 1x32x64: density_coverage: got 3 samples, needed 6 or more")


def test_few_real_windows_are_said(data, caplog):
    index = open_index(str(data / "train"))
    view = ViewConfig(num_frames=12, height=32, width=64)  # a window of each shot
    assert evaluate.pair_up(index, view, 3, max_clips=64).num_compared == 3 and not caplog.text
    assert evaluate.pair_up(index, view, 9, max_clips=3).num_compared == 3 and not caplog.text
    assert evaluate.pair_up(index, view, 5, max_clips=64).num_compared == 3
    assert "6 windows of 12x32x64 for 5 samples, needed twice as many; only 3 samples are compared" in caplog.text
