"""What the loader puts together: the right latents under the right key, streams of their own, honest figures."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ltd.data import Batch, DataConfig, DatasetConfig, PackedConfig, ViewConfig, build_loader, evaluation_batches
from ltd.data.entries import Entries, Entry
from ltd.data.index import index_tar, open_index
from ltd.data.latent_join import finish_cache
from ltd.data.latents import is_cache
from ltd.data.order import unit
from ltd.data.plan import random_placement
from ltd.data.windows import enumerate_windows
from ltd.data.write import encode_image, encode_video
from tests.data.latent_cases import latents, write

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]
STILL = ViewConfig(num_frames=1, height=24, width=32)
PICTURE = encode_image(np.zeros((24, 32, 3), dtype=np.uint8))


def make_stills(path: Path, write_tar: WriteTar, keys: list[str], *, without_caption: tuple[str, ...] = ()) -> Path:
    members = {}
    for key in keys:
        members[f"{key}.png"] = PICTURE
        if key not in without_caption:
            members[f"{key}.txt"] = f"caption of {key}".encode()
    tar = write_tar(path, members)
    index_tar(tar)
    return tar


def make_cache(folder: Path, tar: Path) -> dict[str, torch.Tensor]:
    """Cache a tar of stills with latents that depend on the window; key -> mean."""
    index = open_index(str(tar))
    windows = enumerate_windows(index, (STILL,))
    write(folder, index, windows, dtype="fp32")
    finish_cache(folder)
    return {window.key: latents(window)[0] for window in windows}


def test_a_long_pattern_is_no_cache(tmp_path: Path) -> None:
    assert not is_cache(tmp_path / f"{{{','.join(f'x{number:03d}' for number in range(80))}}}.tar")


def take(config: DataConfig, *, steps: int, **world: Any) -> list[Any]:
    with build_loader(config, **{"seed": 5, "global_rank": 0, "world_size": 1, **world}) as loader:
        return list(itertools.islice(loader, steps))


def check_latents(config: DataConfig, expected: dict[str, torch.Tensor], steps: int) -> list[str]:
    keys = []
    for (batch,), info in take(config, steps=steps):
        assert isinstance(batch, Batch) and batch.mean is not None
        assert all(record.draw is None for record in info.bad), info.bad
        assert list(batch.draws) == sorted(batch.draws)
        for place, key in enumerate(batch.keys):
            assert torch.equal(batch.mean[place], expected[key]), key
            assert batch.captions[place] == f"caption of {key.split('@')[0]}"
        keys += batch.keys
    return keys


def test_mixed_caches_hand_out_each_window_under_its_own_key(tmp_path: Path, write_tar: WriteTar) -> None:
    expected: dict[str, torch.Tensor] = {}
    for name, count in (("a", 14), ("b", 9)):
        tar = make_stills(tmp_path / f"{name}.tar", write_tar, [f"{name}{n:02d}" for n in range(count)])
        expected |= make_cache(tmp_path / name, tar)
    sets = (DatasetConfig(shards=str(tmp_path / "a")), DatasetConfig(shards=str(tmp_path / "b"), weight=2.0))
    config = DataConfig(datasets=sets, views=(STILL,), global_batch=8)
    keys = check_latents(config, expected, steps=20)
    assert len(set(keys)) == 23
    first = keys[:8]
    assert any(key.startswith("a") for key in first) and any(key.startswith("b") for key in first)


def test_windows_left_out_do_not_shift_the_others(tmp_path: Path, write_tar: WriteTar) -> None:
    keys = [f"k{n:02d}" for n in range(16)]
    tar = make_stills(tmp_path / "x.tar", write_tar, keys, without_caption=("k00", "k05", "k06"))
    expected = make_cache(tmp_path / "cache", tar)
    seen = check_latents(DataConfig(shards=str(tmp_path / "cache"), views=(STILL,), global_batch=6), expected, steps=13)
    assert len({key.split("@")[0] for key in seen}) == 13


def test_windows_of_a_cache_are_shuffled_all_together(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = make_stills(tmp_path / "x.tar", write_tar, [f"k{n:03d}" for n in range(120)])
    expected = make_cache(tmp_path / "cache", tar)
    config = DataConfig(shards=str(tmp_path / "cache"), views=(STILL,), global_batch=8, open_shards=1)
    order = [int(key[1:4]) for key in check_latents(config, expected, steps=15)]
    assert sorted(order) == list(range(120))
    assert abs(np.corrcoef(order, np.arange(120))[0, 1]) < 0.35
    second = [int(key[1:4]) for (batch,), _ in take(config, steps=30)[15:] for key in batch.keys]
    assert sorted(second) == sorted(order) and second != order


def test_captions_and_cuts_have_streams_of_their_own(tmp_path: Path, write_tar: WriteTar) -> None:
    clip = encode_video(np.zeros((30, 24, 32, 3), dtype=np.uint8), 8)
    captions = b'[["one", 1.0], ["two", 1.0]]'
    tar = write_tar(
        tmp_path / "x.tar", {f"{n}.{e}": d for n in range(4) for e, d in (("mp4", clip), ("captions.json", captions))}
    )
    index_tar(tar)
    view = ViewConfig(num_frames=5, height=24, width=32)
    config = DataConfig(shards=str(tar), views=(view,), global_batch=4)
    chosen, starts = [], []
    for (batch,), _ in take(config, steps=50):
        for draw, caption in zip(batch.draws, batch.captions, strict=True):
            assert caption == ("one" if unit(5, draw, "caption") < 0.5 else "two")
            chosen.append(caption == "two")
            starts.append(random_placement(view, frames=30, fps=8.0, seed=5, draw=draw, flip=False).start)
    assert abs(np.corrcoef(chosen, starts)[0, 1]) < 0.25


def test_a_state_of_other_data_is_told(tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture) -> None:
    keys = [f"k{n}" for n in range(12)]
    whole = make_stills(tmp_path / "whole.tar", write_tar, keys)
    halves = [make_stills(tmp_path / f"{n}.tar", write_tar, keys[6 * n : 6 * n + 6]) for n in (0, 1)]
    renamed = make_stills(tmp_path / "renamed.tar", write_tar, [f"q{n}" for n in range(12)])
    config = DataConfig(shards=str(whole), views=(STILL,), global_batch=4)
    state = take(config, steps=1)[-1][1].state
    for shards, told in (((str(whole),), False), (tuple(map(str, halves)), True), ((str(renamed),), True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            take(dataclasses.replace(config, shards=shards), steps=1, state=state)
        assert ("differ from the checkpoint" in caplog.text) == told, shards


def test_imbalance_is_that_of_what_each_process_gets(tmp_path: Path, write_tar: WriteTar) -> None:
    members = {}
    for n in range(40):
        side = 16 * (1 + n % 4)
        members[f"k{n:02d}.png"] = encode_image(np.zeros((side, side, 3), dtype=np.uint8))
        members[f"k{n:02d}.txt"] = b"x"
    tar = write_tar(tmp_path / "x.tar", members)
    index_tar(tar)
    batching = PackedConfig(tokens=20, packs=8, token=(4, 16, 16), max_side=64)
    config = DataConfig(shards=str(tar), batching=batching)
    worlds = [take(config, steps=6, global_rank=rank, world_size=4, accumulation=2) for rank in range(4)]
    for steps in zip(*worlds, strict=True):
        costs = [
            sum(len(g) * (g.shape.height // 16) * (g.shape.width // 16) for pack in batches for g in pack.groups)
            for batches, _ in steps
        ]
        found = max(costs) / (sum(costs) / 4) - 1
        assert [info.metrics["data/rank_imbalance"] for _, info in steps] == [pytest.approx(found)] * 4


def test_limited_passes_are_spread_over_the_data(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = make_stills(tmp_path / "x.tar", write_tar, [f"k{n:02d}" for n in range(30)])
    config = DataConfig(shards=str(tar), views=(STILL,))
    seen = [key for batch in evaluation_batches(config, batch_size=4, max_samples=5) for key in batch.keys if key]
    assert seen == ["k00", "k06", "k12", "k18", "k24"]


def test_the_digest_sees_every_size() -> None:
    row = Entry("k", "video", 64, 48, 9, 8.0, (3,))
    others = [
        dataclasses.replace(row, **{name: value})  # type: ignore[arg-type]
        for name, value in (("key", "q"), ("kind", "image"), ("width", 62), ("height", 46), ("frames", 8))
    ]
    assert len({Entries.of([entry]).digest for entry in (row, *others)}) == 6
