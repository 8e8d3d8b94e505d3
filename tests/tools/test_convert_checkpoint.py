"""Checkpoints to exported folders: the same model bit for bit, and the same samples out of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import sample
from ltd import autoencoders, denoisers, storage
from ltd import config as configuration
from ltd.autoencoders import CausalVaeConfig
from ltd.denoisers import DitConfig
from ltd.diffusion import ShiftConfig
from ltd.inference.run_parts import read_run_parts
from ltd.storage import Slice
from tools import convert_checkpoint

VAE = CausalVaeConfig(
    latent_channels=4, front=(4, 4, 4), channels=(8,), factors=(), encoder_blocks=(1,), decoder_blocks=(1,)
)
DIT = DitConfig(latent_channels=4, width=24, num_heads=2, depth=2, text_dim=8)
STATISTICS = torch.tensor([0.1, -2 / 3, 3e-5, 4.0]), torch.tensor([1 / 3, 1e-3, 7.0, 0.7])
AVERAGES = ["ema_0.99", "ema_0.9"]


def random(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in model.named_parameters()}


def write_run(run_dir: Path, model: nn.Module, manifest: dict[str, Any]) -> Path:
    """Write a run's checkpoint in two shards that cut through tensors: raw weights and two averages."""
    path = storage.checkpoint_path(run_dir, 7)
    shards: list[list[Slice]] = [[], []]
    for seed, group in enumerate(["master", *AVERAGES]):
        for name, value in random(model, seed).items():
            flat, cut = value.flatten(), value.numel() // 3
            shards[0] += [Slice(group, name, tuple(value.shape), 0, flat[:cut])] if cut else []
            shards[1].append(Slice(group, name, tuple(value.shape), cut, flat[cut:]))
    shards[0] += [Slice("buffer", name, tuple(b.shape), 0, b.flatten()) for name, b in persistent(model).items()]
    with storage.atomic_directory(path) as incomplete:
        for index, slices in enumerate(shards):
            storage.write_shard(incomplete, f"rank_{index:05d}", slices)
        storage.write_manifest(incomplete, {"step": 7, "ema": AVERAGES, **manifest})
    return path


def persistent(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if name in model.state_dict()}


@pytest.fixture
def vae_run(tmp_path: Path) -> Path:
    """A finished run: a checkpoint, and the export with latent statistics that training makes at its end."""
    model = autoencoders.build_autoencoder(VAE)
    config = {"kind": "autoencoder", "run_dir": str(tmp_path / "vae"), "model": configuration.to_dict(VAE)}
    path = write_run(tmp_path / "vae", model, {"config": config})
    best = autoencoders.load(path)
    best.set_latent_norm(*STATISTICS)
    autoencoders.save(best, tmp_path / "vae" / "model", lineage={"step": 7})
    return tmp_path / "vae"


@pytest.fixture
def dit_run(tmp_path: Path, vae_run: Path) -> Path:
    decoder = autoencoders.load(vae_run)
    config = {
        "kind": "denoiser",
        "run_dir": str(tmp_path / "dit"),
        "model": configuration.to_dict(DIT),
        "autoencoder": str(vae_run),
        "text": {"kind": "bytes", "dim": 8, "max_length": 16},
        "objective": {"shift": {}},
        "data": {"views": [{"num_frames": 5, "height": 16, "width": 16, "fps": None}]},
    }
    lineage = {
        "time": denoisers.TIME_CONVENTION,
        "autoencoder_hash": autoencoders.weights_hash(decoder),
        "latent_norm": decoder.latent_norm.to_plain(),
    }
    write_run(tmp_path / "dit", denoisers.build_denoiser(DIT), {"config": config, "lineage": lineage})
    return tmp_path / "dit"


def convert(source: Path, out: Path, *options: str) -> int:
    return convert_checkpoint.main([str(source), str(out), "--to", "safetensors", *options])


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("weights", ["raw", "ema", "ema_0.9"])
def test_converted_equals_checkpoint_bit_for_bit(
    dit_run: Path, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert_checkpoint, "_BATCH_BYTES", 4000)
    assert convert(storage.checkpoint_path(dit_run, 7), tmp_path / "out", "--weights", weights) == 0
    assert same(denoisers.load(tmp_path / "out"), denoisers.load(dit_run, weights=weights))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.yaml", "model.safetensors"]
    assert "float32: " in capsys.readouterr().out
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(denoisers.build_denoiser(DIT).state_dict())


def test_averages_differ_and_the_first_is_the_default(dit_run: Path, tmp_path: Path) -> None:
    assert convert(dit_run, tmp_path / "out") == 0
    assert same(denoisers.load(tmp_path / "out"), denoisers.load(dit_run, weights="ema_0.99"))
    assert not same(denoisers.load(tmp_path / "out"), denoisers.load(dit_run, weights="ema_0.9"))


def test_samples_of_the_converted_folder_are_the_runs(dit_run: Path, tmp_path: Path) -> None:
    assert convert(dit_run, tmp_path / "converted") == 0
    (tmp_path / "prompts.txt").write_text("a disc\n")
    for name, run in (("a", dit_run), ("b", tmp_path / "converted")):
        command = [str(run), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / name), "--steps", "2"]
        assert sample.main(command) == 0
    assert (tmp_path / "a" / "0000.mp4").read_bytes() == (tmp_path / "b" / "0000.mp4").read_bytes()


def test_the_fields_of_stages_go_along(dit_run: Path, tmp_path: Path) -> None:
    """The checkpoint is of step 7: what the second stage set holds, the third has trained nothing yet."""
    checkpoint = storage.checkpoint_path(dit_run, 7)
    manifest = storage.read_manifest(checkpoint)
    manifest["config"]["data"] |= {"shards": "first", "licence": "CC0-1.0"}
    manifest["config"]["stages"] = [
        {"from_step": 4, "set": {"objective": {"shift": {"factor": 3.0}}, "data": {"shards": "second"}}},
        {"from_step": 6, "set": {"data": {"shards": "first", "licence": "CC-BY-4.0"}}},
        {"from_step": 7, "set": {"objective": {"shift": {"factor": 5.0}}, "data": {"shards": "third"}}},
    ]
    storage.write_manifest(checkpoint, manifest)
    assert convert(dit_run, tmp_path / "converted") == 0
    for source in (dit_run, checkpoint, tmp_path / "converted"):
        assert read_run_parts(source).shift == ShiftConfig(factor=3.0)
        card = convert_checkpoint._card(source, convert_checkpoint._configuration(source), "ema")
        assert (card["Data"], card["Data licences"]) == (["first", "second"], "CC0-1.0; CC-BY-4.0")


def test_another_autoencoder_is_refused_from_the_converted_folder_too(
    dit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(dit_run, tmp_path / "converted") == 0
    autoencoders.save(autoencoders.build_autoencoder(VAE), tmp_path / "other")
    (tmp_path / "prompts.txt").write_text("a disc\n")
    command = [str(tmp_path / "converted"), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit):
        sample.main([*command, "--autoencoder", str(tmp_path / "other")])
    assert "give the autoencoder it was trained with" in capsys.readouterr().err


def test_an_autoencoder_keeps_its_latent_statistics(vae_run: Path, tmp_path: Path) -> None:
    assert convert(vae_run, tmp_path / "out") == 0
    converted = autoencoders.load(tmp_path / "out")
    assert same(converted, autoencoders.load(vae_run))
    assert torch.equal(converted.latent_norm.std, STATISTICS[1])
    assert convert(vae_run, tmp_path / "raw", "--weights", "raw") == 0
    assert same(autoencoders.load(tmp_path / "raw"), autoencoders.load(vae_run, weights="raw"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"depth": 3}, r"missing \(blocks.2."),
        ({"depth": 1}, r"unknown \(blocks.1."),
        ({"text_dim": 9}, "of another shape"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(
    dit_run: Path, tmp_path: Path, change: dict[str, int], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = storage.checkpoint_path(dit_run, 7)
    manifest = storage.read_manifest(path)
    manifest["config"]["model"] |= change
    storage.write_manifest(path, manifest)
    with pytest.raises(SystemExit) as stop:
        convert(dit_run, tmp_path / "out")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert re.search(told, error), error


def test_damage_ends_the_conversion_and_leaves_nothing(
    dit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = storage.checkpoint_path(dit_run, 7) / "rank_00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(SystemExit):
        convert(dit_run, tmp_path / "out")
    assert "rank_00001.safetensors: checksum" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_folder_in_the_way_is_not_replaced(dit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, out, told in (
        (dit_run, dit_run, "exists and is no exported folder"),
        (tmp_path / "nothing", tmp_path / "out", "neither an exported folder"),
        (dit_run.parent / "vae" / "model", tmp_path / "out", "is an exported folder already"),
    ):
        with pytest.raises(SystemExit):
            convert(source, out)
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert(dit_run, tmp_path / "out", "--weights", "ema_0.5")
    assert "holds raw, ema_0.99, ema_0.9" in capsys.readouterr().err
