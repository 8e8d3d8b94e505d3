"""Autoencoders through the disk: exported folders, run directories, and the hash of the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ltd import autoencoders, storage
from ltd import config as ltd_config
from ltd.autoencoders import CausalVae, CausalVaeConfig
from ltd.config import ConfigError

CONFIG = CausalVaeConfig(
    latent_channels=4, front=(4, 4, 4), channels=(8,), factors=(), encoder_blocks=(1,), decoder_blocks=(1,)
)


def _model(seed: int = 0) -> CausalVae:
    torch.manual_seed(seed)
    model = autoencoders.build_autoencoder(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.set_latent_norm(torch.arange(4.0), torch.arange(4.0) + 0.5)
    return model


def _run_directory(path: Path, *, ema: bool = True) -> tuple[CausalVae, CausalVae]:
    """Write a run the way a trainer does: the root's config, and a checkpoint in two flat shards."""
    raw, average = _model(1), _model(2)
    path.mkdir()
    checkpoint = storage.checkpoint_path(path, 3)
    checkpoint.mkdir(parents=True)
    groups = {"master": dict(raw.named_parameters()), **({"ema_0.9": dict(average.named_parameters())} if ema else {})}
    shards: list[list[storage.Slice]] = [[], []]
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            flat, half = tensor.detach().flatten(), tensor.numel() // 2
            for shard, (start, data) in zip(shards, ((0, flat[:half]), (half, flat[half:])), strict=True):
                shard.append(storage.Slice(group, name, tuple(tensor.shape), start, data))
    for name, tensor in raw.named_buffers():
        shards[0].append(storage.Slice("buffer", name, tuple(tensor.shape), 0, tensor.flatten()))
    for index, slices in enumerate(shards):
        storage.write_shard(checkpoint, f"shard-{index}", [item for item in slices if item.data.numel()])
    config = {"kind": "autoencoder", "model": ltd_config.to_dict(CONFIG), "seed": 0}
    storage.write_manifest(checkpoint, {"step": 3, "config": config, "ema": ["ema_0.9"] if ema else []})
    return raw, average


def _same(left: CausalVae, right: CausalVae) -> bool:
    a, b = dict(left.named_parameters()), dict(right.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_kernels_are_laid_out_as_their_inputs_are(tmp_path: Path) -> None:
    model = _model()
    autoencoders.save(model, tmp_path / "export")
    loaded = autoencoders.load(tmp_path / "export")
    kernels = [parameter for parameter in loaded.parameters() if parameter.ndim == 5]
    assert kernels and all(k.is_contiguous(memory_format=torch.channels_last_3d) for k in kernels)
    # and go back to the disk, and into a hash, as the same numbers
    assert autoencoders.weights_hash(loaded) == autoencoders.weights_hash(model)
    autoencoders.save(loaded, tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("export", "again")]
    assert files[0] == files[1]


def test_an_exported_folder_gives_back_the_model(tmp_path: Path) -> None:
    model = _model()
    autoencoders.save(model, tmp_path / "export")
    loaded = autoencoders.load(tmp_path / "export")
    assert loaded.config == model.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    video = torch.rand(1, 3, 5, 8, 8)
    assert torch.equal(loaded.encode(video).mean, model.encode(video).mean)
    assert torch.equal(loaded.latent_norm.std, model.latent_norm.std)
    assert autoencoders.weights_hash(loaded) == autoencoders.weights_hash(model)


def test_a_run_directory_gives_the_average_or_the_raw_weights(tmp_path: Path) -> None:
    raw, average = _run_directory(tmp_path / "run")
    assert _same(autoencoders.load(tmp_path / "run"), average)
    assert _same(autoencoders.load(tmp_path / "run", weights="raw"), raw)
    checkpoint = storage.checkpoint_path(tmp_path / "run", 3)
    loaded = autoencoders.load(checkpoint, dtype=torch.float64)
    assert loaded.latent_norm.std.tolist() == [0.5, 1.5, 2.5, 3.5]
    assert next(loaded.parameters()).dtype == torch.float64


def test_a_run_without_an_average_gives_the_raw_weights_only_when_asked(tmp_path: Path) -> None:
    raw, _ = _run_directory(tmp_path / "run", ema=False)
    assert _same(autoencoders.load(tmp_path / "run", weights="raw"), raw)
    with pytest.raises(storage.StorageError, match="got 'ema', but .* holds raw"):
        autoencoders.load(tmp_path / "run")


def test_an_export_counts_only_while_it_is_of_the_latest_checkpoint(tmp_path: Path) -> None:
    _, average = _run_directory(tmp_path / "run")
    exported = _model(5)
    autoencoders.save(exported, tmp_path / "run" / "model", lineage={"step": 3})
    assert _same(autoencoders.load(tmp_path / "run"), exported)
    autoencoders.save(exported, tmp_path / "run" / "model", lineage={"step": 2})
    assert _same(autoencoders.load(tmp_path / "run"), average)


def test_the_hash_follows_weights_and_config_but_not_the_latent_norm() -> None:
    model = _model()
    before = autoencoders.weights_hash(model)
    model.set_latent_norm(torch.zeros(4), torch.ones(4))
    assert autoencoders.weights_hash(model) == before
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1e-3
    assert autoencoders.weights_hash(model) != before
    other = CausalVae(dataclasses.replace(CONFIG, residual_scale=0.5))
    other.load_state_dict(_model().state_dict())
    assert autoencoders.weights_hash(other) != before


def test_what_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        autoencoders.load(tmp_path / "nothing")
    with pytest.raises(storage.StorageError, match="neither an exported folder"):
        autoencoders.load(tmp_path)
    storage.save_model(tmp_path / "dit", {"x": torch.zeros(1)}, {"family": "denoiser", "model": {}})
    with pytest.raises(ConfigError, match="holds a denoiser, needed an autoencoder"):
        autoencoders.load(tmp_path / "dit")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = _model().state_dict()
    del state["latent_norm.std"]
    state["surprise"] = torch.zeros(1)
    tree = {"family": "autoencoder", "model": ltd_config.to_dict(CONFIG)}
    storage.save_model(tmp_path / "export", state, tree)
    with pytest.raises(ConfigError, match=r"missing \['latent_norm.std'\], unknown \['surprise'\]"):
        autoencoders.load(tmp_path / "export")
