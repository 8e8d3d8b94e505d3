"""Features of a vision network in a latent cache: beside their latents whatever happens to a job, read if asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ltd.config import ConfigError, digest
from ltd.data import DataConfig, ViewConfig, build_loader
from ltd.data.index import Index, open_index
from ltd.data.latent_join import finish_cache
from ltd.data.latent_writer import LatentCacheWriter
from ltd.data.latents import LatentCache, check_cache
from ltd.data.windows import Windows, enumerate_windows
from tests.data.latent_cases import VIEWS, check_content, features, identity, latents, write

OF = {"teacher_hash": "ffff", "frames": "middle"}


@pytest.fixture
def index(toy: Path) -> Index:
    return open_index(str(toy))


@pytest.fixture
def windows(index: Index) -> Windows:
    return enumerate_windows(index, VIEWS)


def check_features(cache: LatentCache, windows: Windows, tolerance: float = 0.0) -> None:
    order = np.random.default_rng(0).permutation(len(windows))
    for t in (1, 2):
        rows = order[cache.latent_shapes[order, 0] == t]
        found = cache.load(rows, features=True).features
        assert found is not None and found.shape == (len(rows), 5, t, 2, 2) and found.dtype == cache.dtype
        for place, row in enumerate(rows.tolist()):
            torch.testing.assert_close(found[place].float(), features(windows[row]), rtol=tolerance, atol=0)
            assert cache.features_shape(row) == (5, t, 2, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8)])
def test_what_is_written_is_read(tmp_path: Path, index: Index, windows: Windows, dtype: str, tolerance: float) -> None:
    write(tmp_path / "c", index, windows, dtype=dtype, features=OF)
    finish_cache(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    assert cache.num_features == 5 and cache.load(np.arange(3)).features is None
    check_features(cache, windows, tolerance)
    check_content(cache, index, list(windows), tolerance)
    check_cache(cache.manifest, features=OF)
    with pytest.raises(ConfigError, match=r"made with features.frames = middle, but this run has all"):
        check_cache(cache.manifest, features={**OF, "frames": "all"})


def test_a_killed_job_goes_on_with_another_number_of_processes(tmp_path: Path, index: Index, windows: Windows) -> None:
    directory = tmp_path / "c"
    write(directory, index, windows, stop=9, features=OF)
    part = directory / "parts" / "00000-of-00001"
    paths = list(part.glob("features_*.bin"))
    assert paths
    for path in paths:  # a whole row and a half that no record knows
        path.write_bytes(path.read_bytes() + b"x" * (5 * 2 * 4 * 4) + b"half a row")
    write(directory, index, windows, stop=3, features=OF)
    for rank in range(3):
        write(directory, index, windows, global_rank=rank, world_size=3, features=OF)
    finish_cache(directory)
    check_features(LatentCache(directory), windows)


def test_windows_whose_features_are_not_finite_are_left_out(tmp_path: Path, index: Index, windows: Windows) -> None:
    writer = LatentCacheWriter(tmp_path / "c", identity(index, text_encoder=None, features=OF), windows)
    for number, window in enumerate(writer.pending()):
        mean, logvar = latents(window)
        maps = features(window) if number != 4 else torch.full_like(features(window), torch.nan)
        assert writer.add(window, mean=mean, logvar=logvar, features=maps) == (number != 4)
    writer.close()
    manifest = finish_cache(tmp_path / "c")
    assert manifest["counts"]["bad"] == 1
    check_features(LatentCache(tmp_path / "c"), windows.take(np.arange(len(windows)) != 4))


def test_the_identity_without_features_is_what_it_was(index: Index) -> None:
    """Caches that older code began are continued."""
    fields = dataclasses.asdict(identity(index))
    assert fields["features"] is None
    del fields["features"], fields["text_parts"]
    assert identity(index).digest == digest(fields) != identity(index, features=OF).digest


def test_batches_bring_features_when_asked(tmp_path: Path, index: Index, windows: Windows) -> None:
    write(tmp_path / "c", index, windows, features=OF)
    finish_cache(tmp_path / "c")
    keys = {window.key: window for window in windows}
    for asked in (True, False):
        data = DataConfig(shards=str(tmp_path / "c"), views=VIEWS, global_batch=4, read_features=asked)
        with build_loader(data, seed=0, global_rank=0, world_size=1) as loader:
            batches, _ = next(iter(loader))
        (batch,) = batches
        assert (batch.features is not None) == asked
        if batch.features is not None:
            for key, found in zip(batch.keys, batch.features, strict=True):
                assert torch.equal(found, features(keys[key]))


def test_bad_use_is_refused(tmp_path: Path, index: Index, windows: Windows) -> None:
    (window, *_) = windows
    mean, logvar = latents(window)
    writer = LatentCacheWriter(tmp_path / "c", identity(index, features=OF), windows)
    with pytest.raises(ValueError, match=r"got None, needed \(d, .*, h, w\)"):
        writer.add(window, mean=mean, logvar=logvar)
    with pytest.raises(ValueError, match=r"got \(5, 9, 2, 2\), needed"):
        writer.add(window, mean=mean, logvar=logvar, features=torch.zeros(5, 9, 2, 2))
    writer.close()
    with pytest.raises(ConfigError, match="holds a cache that differs in features, identity"):
        LatentCacheWriter(tmp_path / "c", identity(index), windows)
    plain = LatentCacheWriter(tmp_path / "plain", identity(index), windows)
    with pytest.raises(ValueError, match="needed None"):
        plain.add(window, mean=mean, logvar=logvar, features=features(window))
    plain.close()

    write(tmp_path / "whole", index, windows, features=OF)
    finish_cache(tmp_path / "whole")
    path = next(tmp_path.glob("whole/parts/*/features_3x2*.bin"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="features_3x2x3x4.bin is truncated: 25 rows, needed 26"):
        LatentCache(tmp_path / "whole")


def test_features_that_are_not_there_are_refused(tmp_path: Path, index: Index, windows: Windows) -> None:
    write(tmp_path / "c", index, windows)
    finish_cache(tmp_path / "c")
    data = DataConfig(shards=str(tmp_path / "c"), views=(ViewConfig(num_frames=5, height=24, width=32),))
    with pytest.raises(ConfigError, match="data.read_features: got true, but the latent cache .* has no features"):
        build_loader(dataclasses.replace(data, read_features=True), seed=0, global_rank=0, world_size=1)
