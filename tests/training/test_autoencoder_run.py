"""Runs of the autoencoder stage: discriminator, codebook, equivariance, chunks, frozen encoder; one process and two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

import train
from ltd import autoencoders, storage
from ltd import config as config_io
from ltd.autoencoders import (
    ConvVae,
    ConvVaeConfig,
    build_autoencoder,
)
from ltd.config import ConfigError
from ltd.parallel import Layout, ParallelConfig, preflight
from ltd.training.autoencoder import AutoencoderRun
from ltd.training.autoencoder_heldout import Heldout
from tests import launched
from tools import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug" / "autoencoder_adversarial.yaml")
SGD = ("optim.kind=sgd", "optim.lr=0.01", "adversarial.optim.kind=sgd", "adversarial.optim.lr=0.01")
VQ = ("adversarial=null", "equivariance=null", "model.bottleneck={kind: vq, num_codes: 16}")


def arguments(shards: Path, run_dir: Path, *overrides: str, steps: int) -> list[str]:
    common = [f"run_dir={run_dir}", f"data.shards={shards}", f"steps={steps}", "evaluation.every=0"]
    return [CONFIG, *common, "checkpoint.every=1", "checkpoint.keep_last=null", "statistics_from=4", *overrides]


def run(shards: Path, run_dir: Path, *overrides: str, steps: int = 6) -> int:
    return train.main(arguments(shards, run_dir, "adversarial.start_step=3", *overrides, steps=steps))


def launch(shards: Path, run_dir: Path, *overrides: str, steps: int = 6) -> None:
    launched.train(*arguments(shards, run_dir, *overrides, "parallel.engine=deepspeed", steps=steps))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))} for line in lines]


def state(run_dir: Path, step: int) -> dict[str, dict[str, Tensor]]:
    reader = storage.Reader(storage.checkpoint_path(run_dir, step))
    return {group: reader.read_full(group) for group in sorted(reader.groups())}


def equal(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[g][n], b[g][n]) for g in a for n in a[g])


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.fixture(scope="module")
def adversarial(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("adversarial") / "run"
    assert run(shards, run_dir) == 0
    return run_dir


def test_the_discriminator_joins_at_its_step(adversarial: Path) -> None:
    found = rows(adversarial)
    assert [("loss/adversarial" in row, "loss/discriminator" in row) for row in found] == [(False,) * 2] * 3 + [
        (True,) * 2
    ] * 3
    before, after = state(adversarial, 3), state(adversarial, 4)
    assert {"critic.master", "critic.exp_avg", "critic.exp_avg_sq"} <= before.keys()
    first = state(adversarial, 1)
    assert (
        worst(first["critic.master"], before["critic.master"])
        == 0
        < worst(before["critic.master"], after["critic.master"])
    )
    assert found[3]["loss/discriminator"] > 0 and found[3]["loss/adversarial_weight"] > 0
    # The autoencoder is judged by the discriminator as it stands before its own step: the same logits.
    for row in found[3:]:
        assert row["loss/adversarial"] == pytest.approx(-row["loss/logits_fake"], rel=1e-5)


@pytest.mark.parametrize("stopped", [2, 3, 4])
def test_resumes_across_the_boundary_bit_for_bit(adversarial: Path, shards: Path, stopped: int, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(adversarial, again)
    for step in range(stopped + 1, 7):
        shutil.rmtree(storage.checkpoint_path(again, step))
    storage.write_latest(again, storage.checkpoint_path(again, stopped))
    assert run(shards, again) == 0
    assert equal(state(again, 6), state(adversarial, 6))
    assert rows(again)[-1] == rows(adversarial)[-1]


def test_a_checkpoint_without_discriminator_starts_one(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(shards, tmp_path / "run", "adversarial=null", steps=2) == 0
    assert run(shards, tmp_path / "run", "adversarial.start_step=2", steps=4) == 0
    assert "has no discriminator: it starts anew" in caplog.text
    assert "loss/discriminator" in rows(tmp_path / "run")[-1]


def test_an_adversarial_term_of_weight_0_changes_no_bit(shards: Path, tmp_path: Path) -> None:
    assert run(shards, tmp_path / "off", "adversarial=null") == 0
    assert run(shards, tmp_path / "on", "adversarial.weight=0", "adversarial.start_step=0") == 0
    off, on = state(tmp_path / "off", 6), state(tmp_path / "on", 6)
    assert all(torch.equal(off["master"][name], on["master"][name]) for name in off["master"])
    assert rows(tmp_path / "on")[0]["loss/discriminator"] > 0


def test_an_equivariance_of_probability_0_changes_no_bit(shards: Path, tmp_path: Path) -> None:
    off = ("adversarial=null", "equivariance=null")
    never = ("adversarial=null", "equivariance.probability=0", "equivariance.downscale_share=0")
    always = ("adversarial=null", "equivariance.probability=1")
    for name, overrides in {"off": off, "never": never, "always": always}.items():
        assert run(shards, tmp_path / name, *overrides, steps=2) == 0
    assert equal(state(tmp_path / "off", 2), state(tmp_path / "never", 2))
    assert not equal(state(tmp_path / "off", 2), state(tmp_path / "always", 2))


def test_chunks_train_as_the_whole_clip_does(shards: Path, tmp_path: Path) -> None:
    assert run(shards, tmp_path / "whole", *SGD, steps=5) == 0
    assert run(shards, tmp_path / "chunks", *SGD, "frames_per_chunk=4", steps=5) == 0
    whole, chunks = state(tmp_path / "whole", 5), state(tmp_path / "chunks", 5)
    assert worst(whole["master"], state(tmp_path / "whole", 1)["master"]) > 1e-4
    assert worst(whole["master"], chunks["master"]) < 1e-6
    assert worst(whole["critic.master"], chunks["critic.master"]) < 1e-6


def test_the_decoder_alone_is_trained_from_another_run(adversarial: Path, shards: Path, tmp_path: Path) -> None:
    start = (f"start_from={adversarial}", "train=decoder", "adversarial=null", "equivariance=null")
    assert run(shards, tmp_path / "run", *start, steps=2) == 0
    before, after = (autoencoders.load(path) for path in (adversarial, tmp_path / "run"))
    weights = after.state_dict()
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, weights[name])}
    assert moved and all(name.startswith(("decoder.", "latent_norm.")) for name in moved)


def test_a_video_vae_grows_from_an_image_vae(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ConvVaeConfig(
        latent_channels=4,
        encoder_width=16,
        decoder_width=16,
        multipliers=(1, 2, 2),
        blocks=1,
        halve_time=(False, False),
        temporal_kernel=1,
    )
    torch.manual_seed(0)
    image = build_autoencoder(config)
    autoencoders.save(image, tmp_path / "image")
    off = (f"start_from={tmp_path / 'image'}", "adversarial=null", "equivariance=null", "optim.lr=0")
    assert run(shards, tmp_path / "run", *off, "model.front=repeat", steps=1) == 0
    grown = autoencoders.load(tmp_path / "run")
    assert isinstance(grown, ConvVae) and grown.config.temporal_kernel == 3
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(grown.encode(video).mean, image.encode(video[:, :, ::4]).mean, rtol=0, atol=1e-5)
    with pytest.raises(SystemExit):
        run(shards, tmp_path / "other", *off, steps=1)
    assert "has model.front = repeat, this run zeros" in capsys.readouterr().err


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32)
    path = tmp_path_factory.mktemp("dino")
    Dinov2Model(config).save_pretrained(path)
    return f"alignment={{teacher: {{path: {path}, size: 32}}, loss: {{cosine_margin: 0, distance_margin: 0}}}}"


def test_alignment_trains_alike_on_two_processes_and_is_not_exported(
    teacher: str, shards: Path, tmp_path: Path
) -> None:
    off = (*SGD[:2], "adversarial=null", "equivariance=null")
    assert run(shards, tmp_path / "off", *off, steps=4) == 0
    assert run(shards, tmp_path / "one", *off, teacher, steps=4) == 0
    launch(shards, tmp_path / "two", *off, teacher, "parallel.zero=2", steps=4)
    one, two = state(tmp_path / "one", 4), state(tmp_path / "two", 4)
    assert worst(one["master"], two["master"]) < 1e-5
    moved = state(tmp_path / "one", 1)["master"]["alignment.projection.weight"]
    assert not torch.equal(moved, one["master"]["alignment.projection.weight"])
    plain = state(tmp_path / "off", 4)["master"]
    assert any(not torch.equal(plain[name], one["master"][name]) for name in plain if name.startswith("encoder."))
    row = rows(tmp_path / "one")[-1]
    assert row["loss/align_cosine"] > 0 and row["loss/align_weight"] > 0
    model = autoencoders.load(tmp_path / "one")
    assert not any(name.startswith("alignment.") for name in model.state_dict())
    command = [str(tmp_path / "one"), str(tmp_path / "out"), "--to", "safetensors", "--weights", "raw"]
    assert convert_checkpoint.main(command) == 0
    raw = autoencoders.load(tmp_path / "out").state_dict()
    assert all(torch.equal(raw[name], one["master"][name]) for name in plain)


def test_alignment_of_weight_0_changes_no_bit(teacher: str, shards: Path, tmp_path: Path) -> None:
    off = ("adversarial=null", "equivariance=null", "optim.grad_clip=null")
    assert run(shards, tmp_path / "off", *off, steps=2) == 0
    assert run(shards, tmp_path / "on", *off, teacher, "alignment.loss.weight=0", steps=2) == 0
    before, after = state(tmp_path / "off", 2)["master"], state(tmp_path / "on", 2)["master"]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_processes_equal_one_with_a_discriminator(zero: int, shards: Path, tmp_path: Path) -> None:
    # Without clipping: it would hide a gradient that is a multiple of the right one.
    plain = ("optim.grad_clip=null", "adversarial.optim.grad_clip=null")
    more = (*SGD, *plain, "adversarial.start_step=1", "adversarial.weight=20")
    launch(shards, tmp_path / "two", *more, f"parallel.zero={zero}", steps=4)
    assert run(shards, tmp_path / "one", *more, steps=4) == 0
    one, two = state(tmp_path / "one", 4), state(tmp_path / "two", 4)
    for group in ("master", "critic.master"):
        moved = worst(one[group], state(tmp_path / "one", 1)[group])
        assert worst(one[group], two[group]) < 1e-5 < 1e-4 < moved, group
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert {key: b[key] for key in a if key.startswith("loss/")} == pytest.approx(
            {key: value for key, value in a.items() if key.startswith("loss/")}, rel=1e-4, abs=1e-6
        )


@pytest.mark.parametrize(
    ("precision", "fast", "warns"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_bf16_without_its_instructions_is_warned_of(
    shards: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    fast: bool,
    warns: bool,
) -> None:
    monkeypatch.setattr(preflight, "has_fast_bf16", lambda: fast)
    assert run(shards, tmp_path / "run", "adversarial=null", f"parallel.precision={precision}", steps=1) == 0
    assert ("parallel.precision: bf16, for which this processor" in caplog.text) == warns


def test_two_processes_equal_one_with_a_codebook(shards: Path, tmp_path: Path) -> None:
    launch(shards, tmp_path / "two", *SGD[:2], *VQ, "parallel.zero=2", steps=4)
    assert run(shards, tmp_path / "one", *SGD[:2], *VQ, steps=4) == 0
    one, two = state(tmp_path / "one", 4), state(tmp_path / "two", 4)
    assert one["buffer"]["quantizer.initialized"].item()
    assert worst(one["master"], two["master"]) < 1e-5
    for name in ("codebook", "counts", "sums"):
        torch.testing.assert_close(one["buffer"][f"quantizer.{name}"], two["buffer"][f"quantizer.{name}"])


@pytest.mark.parametrize(
    "bottleneck", ["{kind: vq, num_codes: 16, gradient: rotation}", "{kind: fsq, levels: [5,5,3,3]}"]
)
def test_codes_train_are_measured_and_exported(bottleneck: str, shards: Path, tmp_path: Path) -> None:
    off = ("adversarial=null", "equivariance=null", f"model.bottleneck={bottleneck}")
    held = ("evaluation.every=2", f"evaluation.shards={shards}")
    assert run(shards, tmp_path / "run", *off, *held, steps=4) == 0
    last = rows(tmp_path / "run")[-1]
    assert "loss/kl" not in last and last["loss/commitment"] >= 0
    assert 1 <= last["codes/perplexity"] <= 225
    model = autoencoders.load(tmp_path / "run")
    posterior = model.encode(torch.rand(1, 3, 5, 32, 32) * 2 - 1)
    assert posterior.indices.shape == (1, 2, 8, 8)  # type: ignore[attr-defined]
    assert torch.equal(model.quantizer.indices_to_latents(posterior.indices), posterior.mean)  # type: ignore


def test_diagnostics_are_logged_and_the_same_on_two_processes(shards: Path, tmp_path: Path) -> None:
    held = ("evaluation.every=2", f"evaluation.shards={shards}", "adversarial=null", "evaluation.batch_size=2")
    assert run(shards, tmp_path / "one", *held, steps=2) == 0
    launch(shards, tmp_path / "two", *held, "parallel.zero=1", steps=2)
    measured = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert [row["n"] for row in measured[0]] == [16, 16, 8, 8]
    for one_row, two_row in zip(*measured, strict=True):
        assert two_row == {**one_row, "value": pytest.approx(one_row["value"], rel=1e-4)}
    one, two = rows(tmp_path / "one")[0], rows(tmp_path / "two")[0]
    names = {key for key in one if key.startswith(("eval/", "artifacts/", "latents/"))}
    assert {
        "artifacts/color_shift_levels",
        "artifacts/grid_ratio",
        "artifacts/blur_share",
        "artifacts/corner_ratio",
        "latents/spectrum_slope",
        "latents/dead_channels",
        "latents/equivariance_error_turned",
        "eval/psnr_video_db",
        "eval/ssim_video",
    } <= names
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["frames_per_chunk=3"], "frames_per_chunk: got 3, needed a multiple of 4"),
        (["frames_per_chunk=4", *VQ], "frames_per_chunk: is for bottleneck.kind kl"),
        (["train=decoder"], "train: decoder needs an encoder that was trained; set start_from"),
        (["initialize_from=4"], "initialize_from: needs a model with a linear path"),
        (["equivariance.scales=[4,31]"], r"data.views[0]: the shorter side, times the least scale 0.125"),
        (["model.bottleneck={kind: fsq, levels: [5,5]}"], "bottleneck.levels: got 2, needed one per channel"),
        (["model.bottleneck={kind: fsq, levels: [5,1,5,5]}"], "levels"),
        (["model.bottleneck={kind: lfq}"], "kind: got 'lfq', needed one of kl, fsq, vq"),
        (["data.views=[{num_frames: 8, height: 32, width: 32}]"], "data.views[0]: num_frames must be 1 + k * 4"),
        (["data.views=[{num_frames: 9, height: 30, width: 32}]"], "height must be a multiple of 4"),
        (["adversarial.balance=often"], "adversarial.balance"),
    ],
)
def test_refuses(
    overrides: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_code:
        run(shards, tmp_path / "run", *overrides)
    assert exit_code.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_droplets_in_the_decoder_are_found_where_they_are(shards: Path) -> None:
    torch.manual_seed(0)
    config = ConvVaeConfig(latent_channels=4, encoder_width=8, decoder_width=8, multipliers=(1, 2), halve_time=(True,))
    model = ConvVae(config).eval()
    video = torch.rand(2, 3, 5, 48, 48) * 2 - 1
    kept = torch.tensor([True, False])

    def measure() -> dict[str, float]:
        found = Heldout(model)
        with torch.no_grad(), found.watching(kept):
            reconstruction, posterior = model(video, None)
        pixels = torch.zeros(2, 5, 48, 48, 3, dtype=torch.uint8)
        found.add("video", kept, pixels, video, reconstruction, posterior, {})
        layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)
        return found.merged(layout, 1)[0]

    assert measure()["artifacts/droplet_share"] == 0
    block = model.get_submodule("decoder.levels.1.blocks.0")

    def plant(_module: Any, _inputs: Any, output: Any) -> Any:
        output[0][kept, :, :, 3, 3] += 1e4
        return output

    handle = block.register_forward_hook(plant)
    assert measure()["artifacts/droplet_share"] == 1
    handle.remove()
    assert measure()["artifacts/droplet_share"] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("loss.high_frequency_levels=6", "equivariance=null"),
            r"levels: got 6, but 32 x 32 \(data\.views\[0\]\) are no",
        ),
        (("loss.high_frequency_levels=4",), r"got 4, but 4 x 4 \(the compression, to multiples of which equivariance"),
    ],
)
def test_bands_that_no_size_has_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_io.load(AutoencoderRun, CONFIG, ["loss.high_frequency_weight=1", *overrides])
