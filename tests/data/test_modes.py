"""The loader's modes: mixed data sets, replacement, buckets, packs, weighted captions; the same on any world."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data import (
    BucketsConfig,
    DataConfig,
    DatasetConfig,
    MicroBatch,
    PackedBatch,
    PackedConfig,
    StepInfo,
    ViewConfig,
    build_loader,
    evaluation_batches,
)
from ltd.data.index import index_tar
from ltd.data.sources import choose_caption
from ltd.data.write import encode_image, encode_video

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]
STILL = ViewConfig(num_frames=1, height=16, width=16)
SIZES = ((48, 32), (32, 48), (32, 32), (64, 32), (32, 64), (48, 48))


@pytest.fixture
def tars(tmp_path: Path, write_tar: WriteTar) -> list[Path]:
    """Four tars of ten stills of six sizes and four clips of three lengths each; every picture has its own shade."""
    found = []
    for shard in range(4):
        members: dict[str, bytes] = {}
        for n in range(10):
            number = shard * 10 + n
            height, width = SIZES[number % len(SIZES)]
            members[f"i{number:03d}.png"] = encode_image(np.full((height, width, 3), 5 * number + 5, dtype=np.uint8))
            members[f"i{number:03d}.txt"] = f"still {number}".encode()
        for n in range(4):
            number = shard * 4 + n
            frames = np.full((6 + 4 * (number % 3), 32, 48, 3), 10 * number + 5, dtype=np.uint8)
            members[f"v{number:03d}.mp4"] = encode_video(frames, 8)
            members[f"v{number:03d}.txt"] = f"clip {number}".encode()
        tar = write_tar(tmp_path / f"{shard}.tar", members)
        index_tar(tar)
        found.append(tar)
    return found


def take(config: DataConfig, *, steps: int, **world: Any) -> list[tuple[list[MicroBatch], StepInfo]]:
    arguments = {"seed": 3, "global_rank": 0, "world_size": 1, **world}
    with build_loader(config, **arguments) as loader:
        return list(itertools.islice(loader, steps))


def keys_of(runs: list[list[tuple[list[MicroBatch], StepInfo]]]) -> list[dict[int, str]]:
    """Put what all ranks saw into global order: per step draw -> key."""
    steps: dict[int, dict[int, str]] = {}
    for run in runs:
        for batches, info in run:
            for batch in batches:
                steps.setdefault(info.step, {}).update(zip(batch.draws, batch.keys, strict=True))
    return [dict(sorted(steps[step].items())) for step in sorted(steps)]


BUCKETS = BucketsConfig(tokens=64, token=(4, 16, 16), multiple=4, sides=(32,), frames=(1, 5, 9), max_aspects=2)
PACKED = PackedConfig(tokens=30, token=(4, 16, 16), packs=4, max_side=64, max_frames=13)


@pytest.mark.parametrize("batching", [BUCKETS, PACKED], ids=lambda b: b.kind)
def test_buckets_and_packs_are_the_same_however_they_are_dealt(tars: list[Path], batching: Any) -> None:
    config = DataConfig(shards=tuple(map(str, tars)), batching=batching)
    plain = take(config, steps=12)
    for world, accumulation, workers in ((2, 1, 2), (4, 1, 0), (2, 2, 0)):
        dealt = DataConfig(shards=tuple(map(str, tars)), batching=batching, num_workers=workers)
        runs = [take(dealt, steps=12, global_rank=r, world_size=world, accumulation=accumulation) for r in range(world)]
        assert keys_of(runs) == keys_of([plain])
        assert all(run[-1][1].state == plain[-1][1].state for run in runs)
        assert all(
            a[1].metrics["data/samples"] == b[1].metrics["data/samples"] for a, b in zip(runs[0], plain, strict=True)
        )
    state = plain[4][1].state
    rest = [take(config, steps=7, global_rank=r, world_size=2, state=state) for r in range(2)]
    assert keys_of(rest) == keys_of([plain])[5:]


def test_every_rank_of_a_bucket_step_has_the_same_cost(tars: list[Path]) -> None:
    config = DataConfig(shards=tuple(map(str, tars)), batching=BUCKETS)
    runs = [take(config, steps=30, global_rank=r, world_size=4) for r in range(4)]
    shapes = set()
    for steps in zip(*runs, strict=True):
        assert len({(len(batches[0]), batches[0].shape) for batches, _ in steps}) == 1  # type: ignore[union-attr]
        info = steps[0][1]
        assert info.metrics["data/rank_imbalance"] == 0.0
        batch = steps[0][0][0]
        assert not isinstance(batch, PackedBatch)
        shape = batch.shape
        tokens = (1 + (shape.num_frames - 1) // 4) * (shape.height // 16) * (shape.width // 16)
        assert info.metrics["data/padding_share"] == pytest.approx(1 - 4 * len(batch) * tokens / 64)
        shapes.add(shape)
    assert len(shapes) >= 3
    largest = max(shapes, key=lambda s: (1 + (s.num_frames - 1) // 4) * s.height * s.width)
    first = runs[0][0][0][0]
    assert not isinstance(first, PackedBatch) and first.shape == largest


def test_buckets_take_every_sample_once_an_epoch(tars: list[Path]) -> None:
    config = DataConfig(shards=tuple(map(str, tars)), batching=BUCKETS)
    seen: dict[Any, list[str]] = {}
    for (batch,), _ in take(config, steps=60):
        assert not isinstance(batch, PackedBatch)
        seen.setdefault(batch.shape, []).extend(batch.keys)
    assert sum(len(set(keys)) for keys in seen.values()) == 40 + 16
    for keys in seen.values():
        size = len(set(keys))
        assert all(len(set(keys[i : i + size])) == size for i in range(0, len(keys) - size, size))


def test_packs_hold_whole_samples_of_all_sizes_within_the_budget(tars: list[Path]) -> None:
    config = DataConfig(shards=tuple(map(str, tars)), batching=PACKED)
    counts: Counter[str] = Counter()
    for (batch,), info in take(config, steps=20):
        assert isinstance(batch, PackedBatch)
        tokens = [
            (1 + (g.shape.num_frames - 1) // 4) * (g.shape.height // 16) * (g.shape.width // 16) * len(g)
            for g in batch.groups
        ]
        assert sum(tokens) <= 4 * 30
        assert info.metrics["data/padding_share"] == pytest.approx(1 - sum(tokens) / 120)
        assert 0 <= info.metrics["data/rank_imbalance"] < 0.5
        counts.update(batch.keys)
    assert set(counts) == {f"i{n:03d}" for n in range(40)} | {f"v{n:03d}" for n in range(16)}
    assert max(counts.values()) - min(counts.values()) <= 1  # exact epochs


def test_data_sets_mix_by_weight(tars: list[Path]) -> None:
    datasets = (
        DatasetConfig(shards=(str(tars[0]), str(tars[1])), weight=3.0, name="big"),
        DatasetConfig(shards=str(tars[2])),
    )
    config = DataConfig(datasets=datasets, views=(STILL,), global_batch=8)
    run = take(config, steps=120)
    numbers = [int(key[1:]) for batches, _ in run for batch in batches for key in batch.keys]
    big = [n for n in numbers if n < 20]
    assert abs(len(big) / len(numbers) - 0.75) < 0.06  # 4 standard deviations
    for part, size in ((big, 20), ([n for n in numbers if n >= 20], 10)):
        assert all(len(set(part[i : i + size])) == size for i in range(0, len(part) - size, size))
    metrics = run[-1][1].metrics
    assert metrics["data/epochs_big"] == len(big) / 20
    assert metrics["data/epochs_1"] == (len(numbers) - len(big)) / 10
    assert metrics["data/units_seen"] == 960
    halves = [take(config, steps=120, global_rank=r, world_size=2) for r in range(2)]
    assert keys_of(halves) == keys_of([run])


def test_replacement_repeats_and_misses_where_epochs_do_not(tars: list[Path]) -> None:
    config = DataConfig(shards=tuple(map(str, tars)), views=(STILL,), global_batch=8, mode="replacement")
    run = take(config, steps=10)
    counts = Counter(key for batches, _ in run for batch in batches for key in batch.keys)
    assert max(counts.values()) > 3 and len(counts) < 40  # 80 independent draws of 40
    assert run[-1][1].metrics["data/epochs_drawn"] == 2.0
    exact = take(DataConfig(shards=tuple(map(str, tars)), views=(STILL,), global_batch=8), steps=10)
    assert set(Counter(key for b, _ in exact for batch in b for key in batch.keys).values()) == {2}
    assert exact[4][1].metrics["data/epochs"] == 1.0


def test_captions_are_drawn_by_weight_whoever_asks(tmp_path: Path, write_tar: WriteTar) -> None:
    captions = json.dumps([["often", 3.0], ["seldom", 1.0]]).encode()
    picture = encode_image(np.zeros((16, 16, 3), dtype=np.uint8))
    tar = write_tar(
        tmp_path / "x.tar", {"a.png": picture, "a.captions.json": captions, "b.png": picture, "b.txt": b"b"}
    )
    index_tar(tar)
    config = DataConfig(shards=str(tar), views=(STILL,), global_batch=2)
    run = take(config, steps=300)
    drawn = {draw: text for b, _ in run for batch in b for draw, text in zip(batch.draws, batch.captions, strict=True)}
    assert abs(Counter(drawn.values())["often"] / 300 - 0.75) < 0.1  # 4 standard deviations
    ranks = [take(config, steps=300, global_rank=r, world_size=2) for r in range(2)]
    for one in ranks:
        for batches, _ in one:
            assert all(drawn[batches[0].draws[0]] == text for text in batches[0].captions)  # type: ignore[union-attr]
    (held,) = evaluation_batches(config, batch_size=2)
    assert held.captions == ("often", "b")  # held-out passes take the first


def test_weighted_choice_covers_the_edges() -> None:
    pairs = [("a", 1.0), ("b", 1e-9), ("c", 1.0)]
    assert [choose_caption(pairs, u) for u in (0.0, 0.49, 0.51, 1 - 2**-53)] == ["a", "a", "c", "c"]
    assert choose_caption([], 0.3) == ""


def test_held_out_data_pass_through_buckets_and_packs_too(tars: list[Path]) -> None:
    for batching in (BUCKETS, PACKED):
        config = DataConfig(shards=str(tars[0]), batching=batching)
        keys = Counter(key for batch in evaluation_batches(config, batch_size=4) for key in batch.keys if key)
        assert set(keys.values()) == {1} and len(keys) == 14


def test_packs_that_cannot_fill_a_step_are_refused_with_the_numbers(tars: list[Path]) -> None:
    config = DataConfig(shards=str(tars[0]), batching=PackedConfig(tokens=400, packs=4, max_side=64, max_frames=13))
    with pytest.raises(ConfigError, match=r"data.batching.packs: got 4, but all samples fill only 1 packs of 400"):
        take(config, steps=1)
    small = DataConfig(shards=str(tars[0]), batching=PackedConfig(tokens=5, packs=4, max_side=64, max_frames=13))
    with pytest.raises(ConfigError, match=r"data.batching.tokens: got 5, but the largest sample has 2\d tokens"):
        take(small, steps=1)


def test_a_world_that_does_not_divide_names_the_field(tars: list[Path]) -> None:
    for batching, field in ((BUCKETS, "data.batching.multiple"), (PACKED, "data.batching.packs")):
        with pytest.raises(ConfigError, match=rf"{field}: got \d+, needed a multiple of 3 = 3 processes"):
            take(DataConfig(shards=tuple(map(str, tars)), batching=batching), steps=1, world_size=3)


def test_data_sets_and_shards_together_are_refused(tars: list[Path]) -> None:
    with pytest.raises(ConfigError, match="data.datasets: got data.shards too"):
        DataConfig(shards=str(tars[0]), datasets=(DatasetConfig(shards=str(tars[1])),))
