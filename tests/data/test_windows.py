from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ltd.data import ViewConfig
from ltd.data.index import Index, open_index
from ltd.data.latents import RULES
from ltd.data.windows import enumerate_windows, window_starts
from tests.data.latent_cases import VIEWS


@pytest.fixture
def index(toy: Path) -> Index:
    return open_index(str(toy))


def test_the_named_window_rule_is_what_the_code_does() -> None:
    """Whoever changes where windows lie changes RULES["windows"], so that caches made before are refused."""
    starts = [window_starts(29, 5, count=count, step=step) for count in (None, 1, 3) for step in (None, 4, 9)]
    assert RULES["windows"] == "evenly spread, centred"
    assert starts == [
        [2, 7, 12, 17, 22],
        [0, 4, 8, 12, 16, 20, 24],
        [3, 12, 21],
        *[[12]] * 3,
        [4, 12, 20],
        [4, 12, 20],
        [3, 12, 21],
    ]


def test_each_sample_is_cut_to_the_view_it_is_given_to(index: Index) -> None:
    samples = [np.array([4, 2]), np.array([15])]
    windows = enumerate_windows(index, VIEWS, samples=samples, windows_per_clip=1)
    entries = [index.entries[place] for place in (4, 2, 15)]
    assert [(w.entry, w.view) for w in windows] == list(zip(entries, (VIEWS[0], VIEWS[0], VIEWS[1]), strict=True))


def test_windows_as_columns_are_the_windows_one_by_one(index: Index) -> None:
    views = (ViewConfig(num_frames=3, height=24, width=32, fps=4.0), *VIEWS)
    windows = enumerate_windows(index, views, windows_per_clip=2, window_step=3, flip=True)
    expected = []
    for view in views:
        for entry in (e for e in index.entries if e.kind == view.kind):
            for start in window_starts(entry.frames, view.span(entry.fps), count=2, step=3):
                expected += [(entry, view, start, flip) for flip in (False, True)]
    found = [(w.entry, w.view, w.placement.start, w.placement.flip) for w in windows]
    assert found == expected
    parts = list(windows[3:].by_view())
    assert sorted(w.position for part in parts for w in part) == list(range(3, len(windows)))
    assert all(len({window.view for window in part}) == 1 for part in parts)
