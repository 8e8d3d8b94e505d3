from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ltd.config import ConfigError
from ltd.data import DataConfig, ViewConfig, build_loader, evaluation_batches
from ltd.data.index import Index, index_tar, open_index
from ltd.data.latent_join import finish_cache
from ltd.data.latent_writer import LatentCacheWriter
from ltd.data.latents import RULES, LatentCache, check_cache, check_source, read_cache_manifest
from ltd.data.row_file import RowFile
from ltd.data.windows import Windows, enumerate_windows
from ltd.data.write import encode_image
from tests.data.latent_cases import VIEWS, check_content, embed, identity, latents, write


@pytest.fixture
def index(toy: Path) -> Index:
    return open_index(str(toy))


@pytest.fixture
def windows(index: Index) -> Windows:
    return enumerate_windows(index, VIEWS)


@pytest.fixture
def captioned(tmp_path: Path, write_tar: Callable[[Path, Mapping[str, bytes]], Path]) -> Index:
    """Stills with no caption, with one, and with three of unequal weight."""
    still = encode_image(np.zeros((24, 32, 3), dtype=np.uint8))
    several = [["a lot", 2.0], ["some é", 1.0], ["few", 1.0]]
    members = {"a.png": still, "b.png": still, "b.txt": b"one", "c.png": still}
    tar = write_tar(tmp_path / "captioned" / "x.tar", {**members, "c.captions.json": json.dumps(several).encode()})
    index_tar(tar)
    return open_index(str(tar))


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8), ("fp16", 2**-10)])
def test_what_is_written_is_read(tmp_path: Path, index: Index, windows: Windows, dtype: str, tolerance: float) -> None:
    write(tmp_path / "c", index, windows, dtype=dtype)
    manifest = finish_cache(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    check_content(cache, index, list(windows), tolerance)
    assert manifest["counts"]["windows"] == cache.num_windows == len(windows) == 13 * 2 + 11
    captions = {index.caption(entry) for entry in index.entries} | {""}
    assert manifest["counts"]["captions"] == len(captions)  # each once
    null, mask = cache.text("")
    assert null is not None and mask is not None and mask.sum() == 1
    assert torch.allclose(null[0], torch.tensor([6.0, 60.0]), rtol=2**-8)
    with pytest.raises(ValueError, match="more than one latent shape"):
        cache.load(np.array([0, len(windows) - 1]))
    for rows in ([-1], [len(windows)]):
        with pytest.raises(IndexError):
            cache.load(np.array(rows))


def test_several_captions_are_chosen_by_weight(tmp_path: Path, captioned: Index) -> None:
    windows = enumerate_windows(captioned, VIEWS, flip=True)
    assert [window.key.split("@")[0] for window in windows] == ["a", "a", "b", "b", "c", "c"]
    write(tmp_path / "c", captioned, windows)
    assert finish_cache(tmp_path / "c")["counts"]["captions"] == 5
    cache = LatentCache(tmp_path / "c")
    uniform = np.array([0.0, 0.49, 0.51, 0.74, 0.76, 0.999])
    rows = np.array([4, 4, 5, 4, 5, 4])
    assert cache.load(rows, uniform).captions == ("a lot", "a lot", "some é", "some é", "few", "few")
    assert cache.load(rows).captions == ("a lot",) * 6
    mixed = cache.load(np.array([0, 2, 4]), np.array([0.9, 0.9, 0.6]))
    assert mixed.captions == ("", "one", "some é")
    assert mixed.text is not None and mixed.text_mask is not None
    assert mixed.text_mask.tolist() == [[True, False], [True, False], [True, True]]
    assert torch.equal(mixed.text[2], embed("some é")[0][:2])
    assert cache.entries[4].caption_chars == (5, 6, 3) and not cache.entries[0].captioned

    write(tmp_path / "plain", captioned, windows, text_encoder=None, text_encoder_hash=None)
    finish_cache(tmp_path / "plain")
    plain = LatentCache(tmp_path / "plain").load(np.array([0, 2, 4]), np.array([0.9, 0.9, 0.6]))
    assert plain.captions == mixed.captions and plain.text is None and plain.text_mask is None


@pytest.mark.parametrize(
    ("fields", "differs", "message"),
    [
        ({"autoencoder_hash": "bbbb"}, "autoencoder_hash", "autoencoder_hash = aaaa, but this run has bbbb"),
        ({"text_encoder_hash": "uuuu"}, "text_encoder_hash", "text_encoder_hash = tttt, but this run has uuuu"),
        ({"data_digest": "dddd"}, "data_digest", "data_digest = [0-9a-f]{64}, but this run has dddd"),
        (
            {"transforms": {"flip": True, "precision": "fp32"}},
            "transforms",
            "made with transforms.flip = False, but this run has True; make",
        ),
        (
            {"rules": {**RULES, "filter": "nearest"}},
            "rules",
            f"made with rules.filter = {RULES['filter']}, but this run has nearest; make",
        ),
    ],
)
def test_a_cache_of_other_making_is_refused(
    tmp_path: Path, index: Index, windows: Windows, fields: dict[str, Any], differs: str, message: str
) -> None:
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    with pytest.raises(ConfigError, match=f"differs in .*{differs}.*identity.*; delete it"):
        write(tmp_path / "c", index, windows, **fields)
    manifest = read_cache_manifest(tmp_path / "c")
    check_cache(manifest, autoencoder_hash="aaaa", compression=(4, 8, 8), data_digest=index.digest)
    with pytest.raises(ConfigError, match=rf"{message}.* again in another directory: python tools/cache_latents.py"):
        check_cache(manifest, **fields)
    with pytest.raises(TypeError, match="'hash' is no field"):
        check_cache(manifest, hash="x")


def test_a_cache_of_older_rules_is_refused_without_being_asked(
    tmp_path: Path, index: Index, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "c", index, windows)
    manifest = finish_cache(tmp_path / "c")
    check_cache(manifest)
    monkeypatch.setitem(RULES, "crop", "top left")
    with pytest.raises(ConfigError, match=r"rules\.crop = largest part, centre, but this run has top left"):
        check_cache(manifest)


def test_a_cache_of_tars_that_changed_is_refused(tmp_path: Path, captioned: Index) -> None:
    windows = enumerate_windows(captioned, VIEWS)
    write(tmp_path / "c", captioned, windows)
    manifest = finish_cache(tmp_path / "c")
    assert check_source(manifest)
    tar = Path(captioned.shards[0])
    with tarfile.open(tar) as archive:
        kept = {m.name: archive.extractfile(m).read() for m in archive if not m.name.startswith("b.")}  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as archive:
        for name, data in kept.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    index_tar(tar)
    with pytest.raises(ConfigError, match=f"data_digest = {captioned.digest}, but this run has [0-9a-f]{{64}}; make"):
        check_source(manifest)
    tar.unlink()
    assert not check_source(manifest)


def test_a_damaged_or_foreign_directory_is_refused(tmp_path: Path, index: Index, windows: Windows) -> None:
    directory = tmp_path / "c"
    write(directory, index, windows)
    finish_cache(directory)
    keys = directory / "columns" / "keys.bin"
    whole = keys.read_bytes()
    keys.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="is damaged .*keys.bin has .* bytes, needed"):
        LatentCache(directory)
    keys.write_bytes(whole)
    row = directory / "columns" / "row.npy"
    np.save(row, np.load(row) + 1)
    with pytest.raises(ConfigError, match="is damaged: a row is not in its file"):
        LatentCache(directory).load(np.arange(26))
    path = next((directory / "parts" / "00000-of-00001").glob("latents_3x2*.bin"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is truncated: 25 rows, needed 26"):
        LatentCache(directory)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no latent cache"):
        LatentCacheWriter(tmp_path / "other", identity(index), windows)
    with pytest.raises(ConfigError, match="is no latent cache"):
        read_cache_manifest(tmp_path / "other")
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 1}))
    with pytest.raises(ConfigError, match="of format 1, needed 3 or 2; make it again"):
        LatentCache(directory)


def test_rows_that_are_not_in_memory_are_asked_for_first(
    tmp_path: Path, index: Index, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        write(tmp_path / "c", index, windows, global_rank=rank, world_size=2)
    finish_cache(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    rows = np.array([3, 20, 8, 9])
    asked: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(RowFile, "request", lambda self, row, count=1: asked.append((self.path, row, count)))
    monkeypatch.setattr(RowFile, "in_memory", lambda self, row: True)
    expected = cache.load(rows)
    assert not asked
    monkeypatch.setattr(RowFile, "in_memory", lambda self, row: False)
    assert torch.equal(cache.load(rows).mean, expected.mean)
    parts = [tmp_path / "c" / "parts" / f"0000{row % 2}-of-00002" / "latents_3x2x3x4.bin" for row in rows]
    assert asked[:4] == [(path, row // 2, 1) for path, row in zip(parts, rows.tolist(), strict=True)]
    tokens = [len(caption.split()) for caption in expected.captions]
    assert [count for _, _, count in asked[4:]] == tokens


def test_threads_read_the_same_cache(tmp_path: Path, index: Index, windows: Windows) -> None:
    for rank in range(2):
        write(tmp_path / "c", index, windows, global_rank=rank, world_size=2)
    finish_cache(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    expected = cache.load(np.arange(26))
    orders = [np.random.default_rng(seed).permutation(26) for seed in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for order, loaded in zip(orders, pool.map(cache.load, orders), strict=True):
            assert torch.equal(loaded.mean, expected.mean[order])
            assert loaded.captions == tuple(expected.captions[place] for place in order)


def test_training_and_evaluation_read_the_cache_like_shards(tmp_path: Path, index: Index, windows: Windows) -> None:
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
