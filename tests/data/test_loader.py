from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ltd.config import ConfigError
from ltd.data import Batch, DataConfig, StepInfo, ViewConfig, build_loader
from ltd.data import media as media_module
from ltd.data.index import index_tar
from ltd.data.write import encode_image, encode_video

CLIPS = ViewConfig(num_frames=5, height=24, width=32)
STILLS = ViewConfig(num_frames=1, height=24, width=32)
STEPS = 12
WriteTar = Callable[[Path, Mapping[str, bytes]], Path]


def make_config(folder: Path, **fields: Any) -> DataConfig:
    return DataConfig(**{"shards": str(folder), "global_batch": 8, "views": (CLIPS, STILLS), "flip": True, **fields})


def take(config: DataConfig, *, steps: int = STEPS, **world: Any) -> list[tuple[list[Batch], StepInfo]]:
    arguments = {"seed": 3, "global_rank": 0, "world_size": 1, **world}
    with build_loader(config, **arguments) as loader:
        return list(itertools.islice(loader, steps))


def rows(runs: list[list[tuple[list[Batch], StepInfo]]]) -> dict[int, dict[int, tuple[str, int]]]:
    """Put what all ranks saw into global order: step -> draw -> (key, sum of pixels)."""
    seen: dict[int, dict[int, tuple[str, int]]] = {}
    for run in runs:
        for batches, info in run:
            for batch in batches:
                assert batch.pixels is not None
                sums = batch.pixels.long().sum(dim=(1, 2, 3, 4)).tolist()
                for key, draw, total in zip(batch.keys, batch.draws, sums, strict=True):
                    assert draw not in seen.setdefault(info.step, {})
                    seen[info.step][draw] = (key, total)
    return seen


@pytest.mark.parametrize(
    ("world", "workers", "accumulation"), [(1, 2, 1), (2, 0, 1), (2, 2, 2), (4, 0, 2), (4, 2, 1), (1, 0, 4)]
)
def test_the_global_sequence_is_the_same_however_it_is_dealt(
    toy: Path, world: int, workers: int, accumulation: int
) -> None:
    plain = take(make_config(toy))
    config = make_config(toy, num_workers=workers)
    runs = [take(config, global_rank=r, world_size=world, accumulation=accumulation) for r in range(world)]
    assert rows(runs) == rows([plain])
    for run in runs:
        assert [info.keys_hash for _, info in run] == [info.keys_hash for _, info in plain]
        assert [info.state for _, info in run] == [info.state for _, info in plain]
        assert all(len(batches) == accumulation for batches, _ in run)


def test_micro_batches_take_their_global_positions(toy: Path) -> None:
    run = take(make_config(toy), steps=1, global_rank=1, world_size=2, accumulation=2)
    assert [batch.draws for batch in run[0][0]] == [(2, 3), (6, 7)]


def test_every_sample_once_per_epoch_over_ranks_and_workers(toy: Path) -> None:
    config = make_config(toy, views=(CLIPS,), global_batch=4, num_workers=2)
    runs = [take(config, steps=13, global_rank=r, world_size=4) for r in range(4)]
    seen = rows(runs)
    keys = [seen[step][draw][0] for step in sorted(seen) for draw in sorted(seen[step])]
    assert len(keys) == 4 * 13
    for epoch in range(4):  # 13 clips: an epoch ends inside a batch
        assert sorted(keys[epoch * 13 : epoch * 13 + 13]) == [f"toy{n:06d}" for n in range(13)]


@pytest.mark.parametrize("cut", [1, 7])
def test_resuming_equals_never_stopping_also_on_another_world(toy: Path, cut: int) -> None:
    whole = take(make_config(toy))
    state = take(make_config(toy, num_workers=2), steps=cut)[-1][1].state
    assert state == whole[cut - 1][1].state
    rest = [take(make_config(toy), steps=STEPS - cut, global_rank=r, world_size=2, state=dict(state)) for r in range(2)]
    assert rows(rest) == rows([whole[cut:]])
    assert rest[0][-1][1].state == whole[-1][1].state


def test_iterating_again_goes_on(toy: Path) -> None:
    with build_loader(make_config(toy), seed=3, global_rank=0, world_size=1) as loader:
        steps = [info.step for _, info in itertools.islice(loader, 2)] + [
            info.step for _, info in itertools.islice(loader, 2)
        ]
    assert steps == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader))


def test_changed_data_are_told_on_resume(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = take(make_config(toy), steps=1)[-1][1].state
    with caplog.at_level(logging.WARNING):
        take(make_config(toy), steps=1, state=state)
        assert "differ from the checkpoint" not in caplog.text
        take(make_config(toy, global_batch=4), steps=1, state=state)
        assert "differ from the checkpoint" in caplog.text


def test_batches_hold_what_they_say(toy: Path) -> None:
    for (batch,), _ in take(make_config(toy)):
        view = CLIPS if batch.kinds[0] == "video" else STILLS
        assert batch.shape == view.shape
        assert batch.pixels is not None and batch.pixels.dtype == torch.uint8
        assert batch.fps.tolist() == [8.0 if view is CLIPS else 0.0] * 8
        assert batch.weight.tolist() == [1.0] * 8
        assert all(("moving" in caption) == (view is CLIPS) for caption in batch.captions)
        moved = batch.to("cpu")
        assert moved.keys == batch.keys and torch.equal(moved.pixels, batch.pixels)  # type: ignore[arg-type]


def test_frames_skipped_for_a_slower_view_change_the_rate(toy: Path) -> None:
    slow = dataclasses.replace(CLIPS, fps=4.0)  # of 8: 9 source frames
    ((batch,), _) = take(make_config(toy, views=(slow,)), steps=1)[0]
    assert batch.fps.tolist() == [4.0] * 8


@pytest.fixture
def damaged(tmp_path: Path, write_tar: WriteTar) -> Path:
    """Eight clips; two break after they were indexed, one says it has no caption, one is too short for 5 frames."""
    rng = np.random.default_rng(0)
    members: dict[str, bytes] = {}
    for number in range(8):
        frames = rng.integers(0, 255, (3 if number == 7 else 8, 32, 40, 3), dtype=np.uint8)
        members[f"s{number}.mp4"] = encode_video(frames, 8)
        members[f"s{number}.txt"] = b"" if number == 6 else b"noise"
    tar = write_tar(tmp_path / "train.tar", members)
    entries, _ = index_tar(tar)
    data = bytearray(tar.read_bytes())
    offset, size = entries[1].members["mp4"]
    data[offset : offset + size] = b"\xff" * size
    offset, size = entries[2].members["txt"]
    data[offset : offset + size] = b"\xff" * size
    tar.write_bytes(bytes(data))
    return tar


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_keeps_its_slot_at_weight_zero(
    damaged: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(damaged, views=(CLIPS,), global_batch=6, num_workers=workers)
    with caplog.at_level(logging.INFO):
        run = take(config, steps=2)
    assert "6 of 7 samples, 6 a step (left out: 1 shorter than 5 frames)" in caplog.text
    for (batch,), info in run:
        assert sorted(batch.keys) == [f"s{n}" for n in range(6)]
        weights = dict(zip(batch.keys, batch.weight.tolist(), strict=True))
        assert weights == {f"s{n}": float(n not in (1, 2)) for n in range(6)}
        assert batch.pixels is not None
        assert all(bool(batch.pixels[i].any()) == (batch.weight[i] == 1) for i in range(6))
        found = Counter((record.key, record.cause) for record in info.bad)
        expected = {("s1", "undecodable"): 1, ("s2", "caption_not_utf8"): 1}
        if info.step == 0:  # what the index left out is reported once
            expected[("s6", "no_caption")] = 1
        assert found == expected
        assert {record.shard for record in info.bad} == {str(damaged)}
        assert {record.draw for record in info.bad if record.key == "s1"} == {batch.draws[batch.keys.index("s1")]}


def test_too_many_bad_samples_stop_with_the_numbers(damaged: Path) -> None:
    config = make_config(damaged, views=(CLIPS,), global_batch=6, max_bad_fraction=0.25, bad_window=20)
    told = [info.too_many_bad for _, info in take(config, steps=3)]
    assert told[:2] == [None, None]
    assert re.search(r"data.max_bad_fraction: got 6 bad samples among the last 18 .*needed at most 5", str(told[2]))
    lenient = take(dataclasses.replace(config, max_bad_fraction=0.4), steps=30)
    assert all(info.too_many_bad is None for _, info in lenient)


def test_a_view_without_samples_is_named_and_never_drawn(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    absent = ViewConfig(num_frames=99, height=24, width=32, weight=50.0)
    alone = take(make_config(toy, views=(CLIPS,)), steps=4)
    both = take(make_config(toy, views=(CLIPS, absent)), steps=4)
    assert "data.views[1] 99x24x32 is empty: none of the 24 samples fits" in caplog.text
    assert [batches[0].keys for batches, _ in both] == [batches[0].keys for batches, _ in alone]


def test_a_sample_that_hangs_times_out(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, hung = media_module.decode_cut, []

    def read(data: bytes, entry: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if entry.key == "toy000003" and not hung:
            hung.append(entry.key)
            time.sleep(1.5)
        return real(data, entry, *args, **kwargs)

    monkeypatch.setattr(media_module, "decode_cut", read)
    config = make_config(toy, views=(CLIPS,), global_batch=13, timeout_s=0.7)
    first, second = take(config, steps=2)
    assert [(record.key, record.cause) for record in first[1].bad] == [("toy000003", "timeout")]
    assert first[0][0].weight.sum() == 12
    assert second[0][0].weight.sum() == 13


def test_prefetch_is_bounded_in_bytes(toy: Path) -> None:
    big = make_config(toy, views=(ViewConfig(num_frames=5, height=512, width=512),), num_workers=2, prefetch=8)
    with build_loader(big, seed=0, global_rank=0, world_size=1) as loader:
        next(iter(loader))
        loader._fill_queue()
        assert len(loader._queue) == 9  # 9 x 30 MiB fit into 512 MiB
    small = dataclasses.replace(big, prefetch_mb=70)
    with build_loader(small, seed=0, global_rank=0, world_size=1) as loader:
        loader._fill_queue()
        assert len(loader._queue) == 3  # the third one reaches the limit


@pytest.mark.parametrize(
    ("fields", "world", "message"),
    [
        ({}, {"world_size": 3}, r"data.global_batch: got 8, needed a multiple of 3 = 3 processes .*nearest: 6 or 9"),
        ({}, {"accumulation": 5}, r"x 5 \(parallel.accumulation\); the nearest: 5 or 10"),
        ({"shards": None}, {}, "data.shards: got nothing"),
        ({"shards": "nowhere"}, {}, "data.shards: got 'nowhere': no such path"),
        (
            {"views": (dataclasses.replace(CLIPS, num_frames=13),)},
            {},
            r"data.views\[0\]: got 13x24x32, but none of the 24",
        ),
        (
            {"views": (CLIPS,), "global_batch": 14},
            {},
            r"is 14 samples, but data.views\[0\] \(5x24x32\) has only 13 samples",
        ),
    ],
)
def test_impossible_requests(toy: Path, fields: dict[str, Any], world: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take(make_config(toy, **fields), steps=1, **world)


def test_data_without_captions_are_refused_unless_allowed(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = write_tar(
        tmp_path / "x.tar", {f"{n}.png": encode_image(np.zeros((24, 32, 3), dtype=np.uint8)) for n in range(2)}
    )
    index_tar(tar)
    config = make_config(tar, views=(STILLS,), global_batch=2)
    with pytest.raises(
        ConfigError, match=r"none of the 2 samples of data.shards has a caption; .*caption_required=false"
    ):
        take(config, steps=1)
    ((batch,), _) = take(dataclasses.replace(config, caption_required=False), steps=1)[0]
    assert batch.captions == ("", "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_batch": 0}, "data.global_batch: got 0"),
        ({"num_workers": -1}, "data.num_workers: got -1"),
        ({"timeout_s": 0.0}, "data.timeout_s: got 0.0"),
        ({"max_bad_fraction": 1.5}, "data.max_bad_fraction: got 1.5"),
        ({"views": ()}, "data.views: got none"),
    ],
)
def test_ranges(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**fields)


def test_a_process_ends_at_once_with_loading_under_way(toy: Path) -> None:
    code = f"""
from ltd.data import DataConfig, ViewConfig, build_loader
view = ViewConfig(num_frames=5, height=256, width=256)
config = DataConfig(shards={str(toy)!r}, views=(view,), num_workers=2, prefetch=50, global_batch=13)
next(iter(build_loader(config, seed=0, global_rank=0, world_size=1)))
raise SystemExit(3)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == 3


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    """Every loader that a test closed must let its threads end."""
    import threading

    before = set(threading.enumerate())  # another file's tests may have left some in this process
    yield
    deadline = time.monotonic() + 3
    while any(thread.name == "ltd-data" for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline, "loading threads outlive their loader"
        time.sleep(0.02)
