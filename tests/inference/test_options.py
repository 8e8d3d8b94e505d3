"""Arguments of sampling that cannot be, or that would change nothing: one line, before any work and any deletion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sample
from ltd.config import ConfigError
from ltd.denoisers import DitConfig
from ltd.inference.conditions import check_guidance
from ltd.inference.generate import check_guide
from ltd.inference.known import Given, check_given
from ltd.shapes import Compression, VideoShape
from tests.inference.jobs_worker import ARGUMENTS, make_run

PLAIN = ("text=null", "model.text_dim=null")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Denoisers told texts, classes, nothing, and texts with sizes."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "text")
    make_run(folder / "classes", *PLAIN, "model.num_classes=4")
    make_run(folder / "nothing", *PLAIN)
    make_run(folder / "sizes", "model.scalars=[height,width]")
    return folder


def call(runs: Path, kind: str, out: Path, *arguments: str) -> int:
    told = ("--labels", "1") if kind == "classes" else ("--prompts", str(runs / "text" / "prompts.txt"))
    given = [word.replace("{runs}", str(runs)) for word in arguments]
    return sample.main([str(runs / kind / "run"), *told, "--out", str(out), *ARGUMENTS, "--shapes", "1x32x32", *given])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*arguments)  # type: ignore[arg-type]
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    return error


IDLE = "changes nothing here; needed"


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("text", ("--order", "3"), f"--order: {IDLE} --solver unipc (got euler)"),
        ("text", ("--noise", "1.0"), f"--noise: {IDLE} --solver sde (got euler)"),
        ("text", ("--overlap", "1"), f"--overlap: {IDLE} --segments"),
        ("text", ("--tile-overlap", "8"), f"--tile-overlap: {IDLE} --tile"),
        ("text", ("--box", "0,0,8,8"), f"--box: {IDLE} --condition with --task inpainting"),
        ("text", ("--known", "2"), f"--known: {IDLE} --condition with --task extension, "),
        ("text", ("--known", "2", "--condition", "{runs}/text/prompts.txt"), f"--known: {IDLE} --condition"),
        ("text", ("--crop", "0,0"), f"--crop: {IDLE} a denoiser with crop_top"),
        ("sizes", ("--crop", "0,0"), f"--crop: {IDLE} a denoiser with crop_top"),
        ("text", ("--original-size", "9x9"), f"--original-size: {IDLE} a denoiser with height"),
        ("sizes", ("--original-size", "0x8"), "--original-size: got '0x8', needed 1 or more"),
        ("text", ("--guidance", "1", "--guidance-interval", "0,1"), f"--guidance-interval: {IDLE} --guidance other"),
        ("text", ("--guidance", "1", "--guidance-rescale", "0.5"), f"--guidance-rescale: {IDLE} --guidance other"),
        ("text", ("--guidance", "1", "--guidance-channels", "3"), f"--guidance-channels: {IDLE} --guidance other"),
        ("text", ("--guidance", "1", "--negative", "x"), f"--negative: {IDLE} --guidance other"),
        ("text", ("--guidance", "1", "--guide", "{runs}/text/run"), f"--guide: {IDLE} --guidance other"),
        ("text", ("--negative", "x", "--guide", "{runs}/text/run"), f"--negative: {IDLE} no --guide"),
        ("classes", ("--negative", "x"), f"--negative: {IDLE} a denoiser that takes text"),
        ("classes", ("--cut-prompts",), f"--cut-prompts: {IDLE} a denoiser that takes text"),
        ("classes", ("--prompts", "{runs}/text/prompts.txt"), "--prompts: changes nothing here, the denoiser takes"),
        ("text", ("--guide", "{runs}/sizes/run"), "is told the numbers ['height', 'width'] (model.scalars)"),
        ("nothing", (), "guidance: got 2, but the denoiser takes neither text nor classes"),
        ("text", ("--shift", "inf"), "--shift factor: got inf, needed above 0 and finite"),
        ("text", ("--fps", "nan"), "--fps: must be above 0 and finite, got nan"),
        ("text", ("--fps", "inf"), "--fps: must be above 0 and finite, got inf"),
        ("text", ("--timeout", "nan"), "parallel.timeout_s: seconds, got nan"),
        ("text", ("--timeout", "inf"), "parallel.timeout_s: seconds, got inf"),
        ("text", ("--guidance", "nan"), "--guidance: got nan, needed a finite number"),
        ("text", ("--guidance", "inf"), "--guidance: got inf, needed a finite number"),
        ("text", ("--guidance", "-2"), "--guidance: got -2.0, needed 0 or more (1 = off)"),
        ("text", ("--noise", "inf", "--solver", "sde"), "--noise: got inf, needed 0 or more and finite"),
        ("text", ("--noise", "nan", "--solver", "sde"), "--noise: got nan, needed 0 or more and finite"),
        ("text", ("--device", "foo"), "--device: got 'foo', needed cpu, cuda or cuda:NUMBER"),
        ("text", ("--device", "meta"), "--device: got 'meta', needed cpu, cuda or cuda:NUMBER"),
        ("text", ("--device", "cuda:99"), "--device: got cuda:99, but this process sees "),
    ],
)
def test_what_cannot_be_or_changes_nothing_is_refused(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert message in refused(capsys, runs, kind, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_empty_list_of_classes_deletes_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(runs, "classes", tmp_path / "out") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "empty.txt").write_text("\n")
    message = refused(capsys, runs, "classes", tmp_path / "out", "--labels", str(tmp_path / "empty.txt"))
    assert "--labels: " in message and "holds no class" in message
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before and "0000.png" in before


def test_damage_in_the_folder_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(runs, "text", tmp_path, "--shapes", "5x32x32") == 0
    whole = (tmp_path / "0001.mp4").read_bytes()
    (tmp_path / "0001.mp4").write_bytes(b"damaged")
    assert call(runs, "text", tmp_path / "other") == 0
    capsys.readouterr()
    assert call(runs, "text", tmp_path, "--shapes", "5x32x32") == 1
    assert "0001.mp4 of an earlier job is damaged" in (tmp_path / "failed.jsonl").read_text()
    (tmp_path / "0001.mp4").unlink()
    assert call(runs, "text", tmp_path, "--shapes", "5x32x32") == 0
    assert (tmp_path / "0001.mp4").read_bytes() == whole
    for content in ("{", "3", '{"samples": "x"}'):
        (tmp_path / "request.json").write_text(content)
        capsys.readouterr()
        assert "request.json is damaged" in refused(capsys, runs, "text", tmp_path, "--shapes", "5x32x32")
        assert (tmp_path / "0001.mp4").exists()


def test_a_denoiser_told_nothing_is_led_away_from_a_weaker_one(runs: Path, tmp_path: Path) -> None:
    assert call(runs, "nothing", tmp_path, "--guide", "{runs}/nothing/run") == 0
    check_guidance(1.0, DitConfig(latent_channels=4, width=24, num_heads=2, depth=1), "samples.guidance")


def test_a_guide_told_the_same_is_taken(runs: Path) -> None:
    check_guide(runs / "sizes" / "run", runs / "sizes" / "run")
    with pytest.raises(ConfigError, match=r"model\.scalars"):
        check_guide(runs / "sizes" / "run", runs / "text" / "run")


def test_interpolation_keeps_more_than_the_first(tmp_path: Path) -> None:
    from ltd.data.write import write_video

    write_video(tmp_path / "clip.mp4", np.zeros((9, 16, 16, 3), np.uint8), fps=8.0)
    given = Given(task="interpolation", media=(str(tmp_path / "clip.mp4"),), known=2)
    shape, compression = VideoShape(9, 16, 16), Compression(4, 8, 8)
    check_given(given, shape, compression, (1, 1, 1))
    late = Given(task="interpolation", media=given.media, known=3)
    with pytest.raises(ConfigError, match="known = 3 keeps the first of 3 latent frames"):
        check_given(late, shape, compression, (1, 1, 1))


def test_a_missing_prompt_file_is_said_before_a_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sample.main([str(tmp_path), "--prompts", str(tmp_path / "absent.txt"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "absent.txt does not exist" in capsys.readouterr().err
