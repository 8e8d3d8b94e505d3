"""The job that encodes shards into a latent cache: captions, buckets, bad media, failures and resuming."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ltd import autoencoders
from ltd.autoencoders import CausalVae, build_autoencoder
from ltd.config import ConfigError, load
from ltd.data import BucketsConfig, DataConfig, ViewConfig, build_loader
from ltd.data.index import Index, index_tar, open_index
from ltd.data.latents import LatentCache, check_source, read_cache_manifest
from ltd.data.write import encode_image, encode_video
from ltd.encoders.text import BytesTextConfig
from ltd.inference.cache import CacheConfig, build_caches
from ltd.training.autoencoder import AutoencoderRun

ROOT = Path(__file__).resolve().parents[2]
VIEWS = (ViewConfig(num_frames=5, height=32, width=32), ViewConfig(num_frames=1, height=32, width=32))


def gradient(frames: int, height: int, width: int, number: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([rows * 3 + number * 20, columns * 2, np.full_like(rows, 90)], axis=-1)
    return np.stack([np.clip(picture + 5 * t, 0, 255).astype(np.uint8) for t in range(frames)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three clips and five stills of two aspects, and an untrained autoencoder."""
    folder = tmp_path_factory.mktemp("cache")
    members: dict[str, bytes] = {}
    for number in range(3):
        members[f"clip{number}.mp4"] = encode_video(gradient(11, 40, 40, number), 8.0)
        captions = [[f"clip {number}", 3.0], ["moving", 1.0]]
        members[f"clip{number}.captions.json"] = json.dumps(captions).encode()
    for number in range(5):
        height, width = (32, 64) if number < 2 else (48, 48)
        members[f"still{number}.png"] = encode_image(gradient(1, height, width, number)[0])
        members[f"still{number}.txt"] = b"still"
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "x.tar", "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    index_tar(folder / "shards" / "x.tar")
    run = load(AutoencoderRun, ROOT / "configs" / "debug" / "autoencoder.yaml", [])
    model, random = build_autoencoder(run.model), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=random)
    autoencoders.save(model, folder / "autoencoder")
    return folder


def config(folder: Path, out: Path, **fields: Any) -> CacheConfig:
    given: dict[str, Any] = {
        "views": VIEWS,
        "dtype": "fp32",
        "batch_size": 2,
        "text": BytesTextConfig(dim=8, max_length=16),
    }
    return CacheConfig(
        shards=str(folder / "shards"), out=str(out), autoencoder=str(folder / "autoencoder"), **{**given, **fields}
    )


def test_all_captions_and_windows_are_cached(folder: Path, tmp_path: Path) -> None:
    (out,) = build_caches(config(folder, tmp_path / "c", flip=True))
    cache = LatentCache(out)
    assert cache.manifest["counts"]["windows"] == cache.num_windows == 2 * (3 * 2 + 5)
    assert cache.manifest["counts"]["captions"] == 1 + 3 + 1 + 1  # null, clips, "moving", "still"
    loaded = cache.load(np.arange(4), np.array([0.1, 0.7, 0.8, 0.99]))
    assert loaded.captions == ("clip 0", "clip 0", "moving", "moving")
    assert loaded.mean.shape == (4, 8, 2, 4, 4)
    assert cache.entries[2].key.startswith("clip0@5:") or cache.entries[2].key.startswith("clip0@6:")
    assert check_source(cache.manifest), "the tars are where the manifest says"
    assert build_caches(config(folder, tmp_path / "c", flip=True)) == [out]  # nothing left to do


def test_buckets_cut_each_sample_once_and_train_from_the_cache(folder: Path, tmp_path: Path) -> None:
    buckets = BucketsConfig(tokens=32, token=(4, 8, 8), multiple=1, sides=(32,), frames=(1, 5), max_aspects=2)
    (out,) = build_caches(config(folder, tmp_path / "c", views=(), batching=buckets, windows_per_clip=1))
    cache = LatentCache(out)
    assert sorted(entry.key.split("@")[0] for entry in cache.entries) == sorted(
        [f"clip{n}" for n in range(3)] + [f"still{n}" for n in range(5)]
    )
    sizes = {entry.key.split("@")[0]: (entry.height, entry.width) for entry in cache.entries}
    assert sizes["still0"][1] > sizes["still0"][0] and sizes["still4"] == (32, 32)
    data = DataConfig(shards=str(out), batching=buckets)
    with build_loader(data, seed=0, global_rank=0, world_size=1) as loader:
        batches, info = next(iter(loader))
    assert info.bad == () and len(batches[0]) >= 1
    with pytest.raises(ConfigError, match="^views: got 2, needed none with batching.kind: buckets"):
        config(folder, tmp_path / "c", batching=buckets)
    with pytest.raises(ConfigError, match="^views: got 0, needed at least one"):
        config(folder, tmp_path / "c", views=())


def test_latents_that_are_not_finite_are_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = CausalVae.encode
    calls = 0

    def poisoned(self: CausalVae, video: Tensor) -> Any:
        nonlocal calls
        calls += 1
        posterior = encode(self, video)
        if calls == 2:
            posterior.mean[0, 0] = float("inf")
        return posterior

    monkeypatch.setattr(CausalVae, "encode", poisoned)
    (out,) = build_caches(config(folder, tmp_path / "c"))
    assert read_cache_manifest(out)["counts"]["bad"] == 1
    assert [json.loads(line)["cause"] for line in (out / "bad.jsonl").read_text().splitlines()] == ["not_finite"]
    assert torch.isfinite(LatentCache(out).load(np.arange(5)).mean).all()


def test_a_job_whose_reads_fail_stops_and_goes_on_later(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Index.load
    monkeypatch.setattr("ltd.inference.cache._FEW_BAD", 3)

    def down(self: Index, entry: Any) -> Any:
        if entry.key != "clip0":
            raise OSError("the network is down")
        return read(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "load", down)
        with pytest.raises(ConfigError, match=r"^max_bad_fraction: got 4 bad windows of 6, .*the network is down"):
            build_caches(config(folder, tmp_path / "c"))
    (out,) = build_caches(config(folder, tmp_path / "c"))
    counts = read_cache_manifest(out)["counts"]
    assert (counts["windows"], counts["bad"]) == (3 * 2 + 5, 0)


def test_a_cache_of_other_settings_is_not_continued(folder: Path, tmp_path: Path) -> None:
    build_caches(config(folder, tmp_path / "c"))
    with pytest.raises(ConfigError, match="holds a cache that differs in transforms, identity, windows; delete it"):
        build_caches(config(folder, tmp_path / "c", flip=True))
    assert open_index(str(folder / "shards")).digest == read_cache_manifest(tmp_path / "c")["data_digest"]
