from __future__ import annotations

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.data import DataConfig, ViewConfig, build_loader, evaluation_batches
from ltd.data.index import Index, open_index
from ltd.data.latent_writer import LatentCacheWriter, finish_cache
from ltd.data.latents import CacheIdentity, LatentCache, check_cache, read_cache_manifest
from ltd.data.windows import Window, enumerate_windows

VIEWS = (ViewConfig(num_frames=5, height=24, width=32), ViewConfig(num_frames=1, height=24, width=32))


@pytest.fixture
def index(toy: Path) -> Index:
    return open_index(str(toy))


@pytest.fixture
def windows(index: Index) -> tuple[Window, ...]:
    return enumerate_windows(index, VIEWS)


def identity(index: Index, **fields: Any) -> CacheIdentity:
    given = {
        "autoencoder_hash": "aaaa",
        "compression": (4, 8, 8),
        "latent_channels": 3,
        "data_digest": index.digest,
        "transforms": {"crop": "centre"},
        "text_encoder": "words",
        "text_encoder_hash": "tttt",
        "dtype": "fp32",
    }
    return CacheIdentity(**{**given, **fields})


def latents(window: Window) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(window.position)
    t = 1 + (window.view.num_frames - 1) // 4
    both = torch.randn(2, 3, t, 3, 4, generator=generator)
    return both[0], both[1]


def embed(caption: str) -> tuple[Tensor, Tensor]:
    words = caption.split() or ["<none>"]
    table = torch.tensor([[float(len(word)), float(ord(word[0]))] for word in words])
    padded = torch.cat([table, torch.full((2, 2), 99.0)])
    return padded, torch.tensor([True] * len(words) + [False] * 2)


def write(
    directory: Path, index: Index, windows: tuple[Window, ...], *, stop: int | None = None, **fields: Any
) -> LatentCacheWriter:
    world = {"global_rank": fields.pop("global_rank", 0), "world_size": fields.pop("world_size", 1)}
    writer = LatentCacheWriter(directory, identity(index, **fields), windows, **world)
    for window in writer.pending()[:stop]:
        caption = index.caption(window.entry)
        for text in writer.missing_texts([caption, ""]):
            writer.add_text(text, *embed(text))
        mean, logvar = latents(window)
        writer.add(window, caption=caption, mean=mean, logvar=logvar)
    writer.close()
    return writer


def check_content(cache: LatentCache, windows: tuple[Window, ...], tolerance: float = 0.0) -> None:
    assert [entry.key for entry in cache.entries] == [window.key for window in windows]
    for entry, window in zip(cache.entries, windows, strict=True):
        sample, (mean, logvar) = cache.read(entry), latents(window)
        assert torch.allclose(sample.mean, mean, rtol=tolerance, atol=0)  # type: ignore[arg-type]
        assert torch.allclose(sample.logvar, logvar, rtol=tolerance, atol=0)  # type: ignore[arg-type]
        assert sample.text is not None and sample.text_mask is not None
        expected, mask = embed(sample.caption)
        assert torch.allclose(sample.text[sample.text_mask], expected[mask], rtol=tolerance, atol=0)
        assert not sample.text[~sample.text_mask].any()
        assert sample.fps == window.fps


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8), ("fp16", 2**-10)])
def test_what_is_written_is_read(
    tmp_path: Path, index: Index, windows: tuple[Window, ...], dtype: str, tolerance: float
) -> None:
    write(tmp_path / "c", index, windows, dtype=dtype)
    manifest = finish_cache(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    check_content(cache, windows, tolerance)
    assert manifest["counts"]["windows"] == len(windows) == 13 * 2 + 11
    captions = {index.caption(entry) for entry in index.entries} | {""}
    assert manifest["counts"]["captions"] == len(captions)  # each once
    null, mask = cache.text("")
    assert null is not None and mask is not None and mask.sum() == 1
    assert torch.allclose(null[0], torch.tensor([6.0, 60.0]), rtol=2**-8)


def test_a_killed_job_goes_on_with_another_number_of_processes(
    tmp_path: Path, index: Index, windows: tuple[Window, ...]
) -> None:
    directory = tmp_path / "c"
    write(directory, index, windows, stop=9)
    # Killed between a row and its record, and inside a record.
    part = directory / "parts" / "00000-of-00001"
    for path in part.glob("latents_*.bin"):
        path.write_bytes(path.read_bytes() + b"half a row")
    with (part / "records.jsonl").open("ab") as log:
        log.write(b'{"position": 30, "ke')
    with pytest.raises(ConfigError, match="has 9 of 37 windows; run the command again"):
        finish_cache(directory)
    with pytest.raises(ConfigError, match=r"is not finished: run tools/cache_latents\.py again"):
        LatentCache(directory)
    write(directory, index, windows, stop=3)
    for rank in range(3):
        write(directory, index, windows, global_rank=rank, world_size=3)
    finish_cache(directory)
    check_content(LatentCache(directory), windows)
    again = LatentCacheWriter(directory, identity(index), windows)
    assert again.complete and again.pending() == []
    again.close()


def test_windows_that_fail_are_recorded(tmp_path: Path, index: Index, windows: tuple[Window, ...]) -> None:
    writer = LatentCacheWriter(tmp_path / "c", identity(index), windows)
    writer.skip(windows[4], cause="undecodable", message="broken")
    writer.close()
    write(tmp_path / "c", index, windows)
    assert finish_cache(tmp_path / "c")["counts"]["bad"] == 1
    check_content(LatentCache(tmp_path / "c"), windows[:4] + windows[5:])


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"autoencoder_hash": "bbbb"}, "autoencoder_hash"), ({"transforms": {"crop": "left"}}, "transforms")],
)
def test_a_cache_of_other_making_is_refused(
    tmp_path: Path, index: Index, windows: tuple[Window, ...], fields: dict[str, Any], name: str
) -> None:
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    with pytest.raises(ConfigError, match=f"differs in {name}, identity; delete it"):
        write(tmp_path / "c", index, windows, **fields)
    manifest = read_cache_manifest(tmp_path / "c")
    check_cache(manifest, autoencoder_hash="aaaa", compression=(4, 8, 8), transforms={"crop": "centre"})
    with pytest.raises(ConfigError, match=rf"cache was made with {name} = .*but this run has .*make it again"):
        check_cache(manifest, **fields)
    with pytest.raises(TypeError, match="'hash' is no field"):
        check_cache(manifest, hash="x")


def test_a_truncated_or_foreign_directory_is_refused(tmp_path: Path, index: Index, windows: tuple[Window, ...]) -> None:
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    path = next((tmp_path / "c" / "parts" / "00000-of-00001").glob("latents_3x2*.bin"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is truncated: 25 rows, needed 26"):
        LatentCache(tmp_path / "c")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no latent cache"):
        LatentCacheWriter(tmp_path / "other", identity(index), windows)
    with pytest.raises(ConfigError, match="is no latent cache"):
        read_cache_manifest(tmp_path / "other")
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 7}))
    with pytest.raises(ConfigError, match="format 7, needed 1"):
        LatentCache(tmp_path / "c")


def test_training_and_evaluation_read_the_cache_like_shards(
    tmp_path: Path, index: Index, windows: tuple[Window, ...]
) -> None:
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    config = DataConfig(shards=str(tmp_path / "c"), views=VIEWS, global_batch=8, num_workers=1)
    by_key = {window.key: window for window in windows}
    with build_loader(config, seed=0, global_rank=1, world_size=2) as loader:
        for (batch,), info in loader:
            assert batch.pixels is None and batch.mean is not None and batch.text is not None
            assert str(batch.shape) == ("2x3x4" if batch.kinds[0] == "video" else "1x3x4")
            for number, key in enumerate(batch.keys):
                assert torch.equal(batch.mean[number], latents(by_key[key])[0])
            if info.step == 8:
                break
    by_latents = dataclasses.replace(config, views=(ViewConfig(num_frames=2, height=3, width=4),))
    assert sum(int(batch.weight.sum()) for batch in evaluation_batches(by_latents, batch_size=8)) == 26
    with pytest.raises(ConfigError, match=r"data.views\[0\]: got 9x24x32, .*cached at 5x24x32 pixels"):
        build_loader(
            dataclasses.replace(config, views=(ViewConfig(num_frames=9, height=24, width=32),)),
            seed=0,
            global_rank=0,
            world_size=1,
        )


def test_latents_that_are_not_finite_count_as_bad(tmp_path: Path, index: Index, windows: tuple[Window, ...]) -> None:
    writer = LatentCacheWriter(tmp_path / "c", identity(index, text_encoder=None), windows[:2])
    for window in windows[:2]:
        mean, logvar = latents(window)
        writer.add(window, caption="x", mean=mean * (float("nan") if window.position else 1.0), logvar=logvar)
    with pytest.raises(ValueError, match=r"needed \(3, t, h, w\) twice"):
        writer.add(windows[0], caption="x", mean=mean[:2], logvar=logvar[:2])
    writer.close()
    finish_cache(tmp_path / "c")
    config = DataConfig(shards=str(tmp_path / "c"), views=VIEWS[:1], global_batch=2)
    with build_loader(config, seed=0, global_rank=0, world_size=1) as loader:
        (batch,), info = next(iter(loader))
    assert batch.text is None
    assert [record.cause for record in info.bad] == ["not_finite"]
    assert sorted(batch.weight.tolist()) == [0.0, 1.0]


def test_processes_that_start_together_do_not_disturb_each_other(
    tmp_path: Path, index: Index, windows: tuple[Window, ...]
) -> None:
    for trial in range(10):
        directory, barrier = tmp_path / str(trial), threading.Barrier(4)

        def work(rank: int, directory: Path = directory, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            write(directory, index, windows[:8], global_rank=rank, world_size=4)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        finish_cache(directory)
        check_content(LatentCache(directory), windows[:8])
