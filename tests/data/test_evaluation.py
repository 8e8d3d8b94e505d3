from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ltd.config import ConfigError
from ltd.data import Batch, DataConfig, ViewConfig, evaluation_batches
from ltd.data.index import open_index
from ltd.data.windows import enumerate_windows, load_window, window_starts

CLIPS = ViewConfig(num_frames=5, height=24, width=32)
STILLS = ViewConfig(num_frames=1, height=24, width=32)


def run(toy: Path, **fields: Any) -> list[Batch]:
    return list(evaluation_batches(DataConfig(shards=str(toy), views=(CLIPS, STILLS)), **{"batch_size": 4, **fields}))


def by_draw(batches: list[Batch]) -> dict[int, tuple[str, int]]:
    return {
        draw: (key, int(pixels.long().sum()))
        for batch in batches
        for key, draw, pixels, weight in zip(batch.keys, batch.draws, batch.pixels, batch.weight, strict=True)  # type: ignore[arg-type]
        if weight > 0
    }


@pytest.mark.parametrize(("world", "batch_size"), [(2, 4), (3, 2), (4, 16)])
def test_every_sample_once_whatever_the_world(toy: Path, world: int, batch_size: int) -> None:
    plain = by_draw(run(toy))
    assert len(plain) == 24 and len({key for key, _ in plain.values()}) == 24
    runs = [run(toy, global_rank=r, world_size=world, batch_size=batch_size) for r in range(world)]
    joined: dict[int, tuple[str, int]] = {}
    for batches in runs:
        mine = by_draw(batches)
        assert not joined.keys() & mine.keys()
        joined |= mine
        assert [b.pixels.shape for b in batches] == [b.pixels.shape for b in runs[0]]  # type: ignore[union-attr]
    assert joined == plain


def test_windows_are_spread_and_limited(toy: Path) -> None:
    assert len(by_draw(run(toy, windows_per_clip=2))) == 13 * 2 + 11
    limited = run(toy, max_samples=3)
    assert sum(int(batch.weight.sum()) for batch in limited) == 6


def test_data_that_fit_no_view_are_refused(toy: Path) -> None:
    config = DataConfig(shards=str(toy), views=(dataclasses.replace(CLIPS, num_frames=99),))
    with pytest.raises(ConfigError, match=r"data.views\[0\]: got 99x24x32, but none of the 24 samples fits"):
        list(evaluation_batches(config, batch_size=2))
    both = dataclasses.replace(config, views=(*config.views, STILLS))
    assert len(by_draw(list(evaluation_batches(both, batch_size=2)))) == 11


@pytest.mark.parametrize(
    ("arguments", "starts"),
    [
        ({"frames": 4, "span": 5}, []),
        ({"frames": 5, "span": 5}, [0]),
        ({"frames": 12, "span": 5}, [1, 6]),
        ({"frames": 12, "span": 5, "count": 1}, [4]),
        ({"frames": 12, "span": 5, "step": 2}, [0, 2, 4, 6]),
        ({"frames": 13, "span": 5, "step": 2, "count": 2}, [2, 6]),
        ({"frames": 12, "span": 5, "count": 9}, [1, 6]),
    ],
)
def test_window_starts(arguments: dict[str, int], starts: list[int]) -> None:
    assert window_starts(arguments.pop("frames"), arguments.pop("span"), **arguments) == starts


def test_windows_are_listed_and_read(toy: Path) -> None:
    index = open_index(str(toy))
    windows = enumerate_windows(index, [CLIPS, STILLS], flip=True)
    assert len(windows) == 2 * (13 * 2 + 11)
    assert [window.position for window in windows] == list(range(len(windows)))
    assert len({window.key for window in windows}) == len(windows)
    plain, mirrored = (load_window(index, windows[n])[0] for n in (0, 1))
    assert plain.shape == (5, 24, 32, 3)
    assert torch.equal(torch.from_numpy(plain).flip(2), torch.from_numpy(mirrored))
    assert windows[0].fps == 8.0
