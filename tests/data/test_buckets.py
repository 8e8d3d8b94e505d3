"""Buckets from the data's statistics: the least crop, equal cost, nothing lost without a word."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data.batching import BucketsConfig, PackedConfig, arrange_packs
from ltd.data.buckets import arrange_buckets, candidate_sizes, choose_aspects, crop_loss
from ltd.data.entries import Entries, Entry


def make_entries(*groups: tuple[int, int, int, int, float]) -> Entries:
    """Make (count, width, height, frames, fps) of each."""
    rows = [
        Entry(f"k{number}_{i}", "video" if frames > 1 else "image", width, height, frames, fps, (3,))
        for number, (count, width, height, frames, fps) in enumerate(groups)
        for i in range(count)
    ]
    return Entries.of(rows)


def test_candidates_are_whole_tokens_of_about_the_area() -> None:
    sizes = candidate_sizes(256, (4, 16, 16))
    assert (sizes % 16 == 0).all()
    areas = sizes.prod(axis=1) / 256**2
    assert areas.min() >= 0.75 and areas.max() <= 1.1
    assert [256, 256] in sizes.tolist() and [192, 352] in sizes.tolist()
    ratios = sizes[:, 1] / sizes[:, 0]
    assert (np.diff(ratios) > 0).all() and ratios[0] <= 0.3 and ratios[-1] >= 3.5
    assert [16, 16] in candidate_sizes(20, (4, 16, 16)).tolist()  # the nearest square, whatever its area


def test_no_sample_is_enlarged_more_than_allowed() -> None:
    entries = make_entries((20, 512, 128, 1, 0.0), (30, 256, 256, 1, 0.0))
    config = BucketsConfig(tokens=8 * 300, multiple=4, sides=(64, 128, 256), max_aspects=1)
    found = arrange_buckets(config, entries)
    for view, ids in zip(found.views, found.ids, strict=True):
        columns = entries.columns
        scale = np.maximum(view.height / columns["height"][ids], view.width / columns["width"][ids])
        assert scale.max() <= 1
    # The wide ones have the area of 256 squared, but not the height of the one bucket there is.
    assert {(view.height, view.width, len(ids)) for view, ids in zip(found.views, found.ids, strict=True)} >= {
        (256, 256, 30),
        (64, 256, 20),
    }
    assert found.ids and sum(len(ids) for ids in found.ids) == 50
    generous = arrange_buckets(BucketsConfig(tokens=8 * 300, multiple=4, max_aspects=1, max_upscale=3.0), entries)
    assert [len(ids) for ids in generous.ids] == [50]
    alone = arrange_buckets(BucketsConfig(tokens=8 * 300, multiple=4, max_aspects=1), entries)
    assert alone.left_out == {"enlarged more than 1 times, or too few for one batch, at 256 pixels square": 20}


def test_chosen_aspects_are_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    aspects = np.exp(rng.normal(0.3, 0.4, 300))
    candidates = np.array([0.5, 0.75, 1.0, 1.33, 1.78, 2.4, 3.0])

    def loss(chosen: tuple[int, ...]) -> float:
        return float(crop_loss(aspects[:, None], candidates[list(chosen)][None]).min(axis=1).mean())

    for count in (1, 2, 3, 4):
        found = loss(tuple(choose_aspects(aspects, candidates, count)))
        best = min(loss(chosen) for chosen in combinations(range(7), count))
        assert found <= best + 2e-3  # the search sees a histogram of 400 bins


def test_samples_go_to_the_longest_and_largest_they_fill() -> None:
    entries = make_entries(
        (40, 640, 360, 60, 24.0), (40, 640, 360, 20, 24.0), (80, 320, 320, 1, 0.0), (8, 100, 100, 1, 0.0),
        (3, 640, 360, 5, 24.0),
    )  # fmt: skip
    config = BucketsConfig(tokens=8 * 2048, multiple=4, sides=(128, 256), frames=(1, 17, 33))
    found = arrange_buckets(config, entries)
    sizes = {(view.num_frames, len(ids)) for view, ids in zip(found.views, found.ids, strict=True)}
    assert sizes == {(33, 40), (17, 40), (1, 80)}
    assert found.left_out == {"shorter than 17 frames": 3, "smaller than 128 pixels square": 8}
    for view, tokens, units in zip(found.views, found.tokens, found.units, strict=True):
        assert tokens == (1 + (view.num_frames - 1) // 4) * (view.height // 16) * (view.width // 16)
        full = config.tokens // (4 * tokens) * 4
        assert units == min(full, len(found.ids[found.views.index(view)]) // 4 * 4) and units * tokens <= config.tokens


def test_groups_that_fill_no_batch_are_handed_down() -> None:
    entries = make_entries((5, 640, 640, 60, 24.0), (81, 640, 640, 20, 24.0), (80, 640, 640, 1, 0.0))
    config = BucketsConfig(tokens=8 * 2560, multiple=8, sides=(256,), frames=(1, 17, 33))
    found = arrange_buckets(config, entries)
    assert {(view.num_frames, len(ids)) for view, ids in zip(found.views, found.ids, strict=True)} == {
        (17, 86),
        (1, 80),
    }
    whole = arrange_buckets(config, entries, fill=False)
    assert {(v.num_frames, len(ids)) for v, ids in zip(whole.views, whole.ids, strict=True)} == {
        (33, 5), (17, 81), (1, 80)
    }  # fmt: skip


def test_frame_rate_decides_the_length() -> None:
    entries = make_entries((20, 256, 256, 40, 48.0), (20, 256, 256, 40, 24.0))
    config = BucketsConfig(tokens=4 * 2560, multiple=2, frames=(17, 33), fps=24.0)
    found = arrange_buckets(config, entries)
    by_frames = {view.num_frames: ids.tolist() for view, ids in zip(found.views, found.ids, strict=True)}
    assert by_frames == {33: list(range(20, 40)), 17: list(range(20))}  # 48 fps: every second frame, 20 of them


def test_a_budget_below_one_batch_is_refused_with_the_number() -> None:
    entries = make_entries((20, 256, 256, 1, 0.0))
    with pytest.raises(ConfigError, match=r"data.batching.tokens: got 1000, but a batch of 8 .* has \d+ tokens"):
        arrange_buckets(BucketsConfig(tokens=1000), entries)


def test_packed_samples_keep_their_size_up_to_the_limit() -> None:
    entries = make_entries(
        (2, 300, 200, 1, 0.0),
        (3, 1024, 1024, 1, 0.0),
        (4, 128, 64, 30, 24.0),
        (1, 64, 64, 4, 24.0),
        (1, 56, 56, 1, 0.0),
    )
    found = arrange_packs(PackedConfig(tokens=512, packs=1, max_frames=17), entries)
    sizes = {str(view.shape): len(ids) for view, ids in zip(found.views, found.ids, strict=True)}
    assert sizes == {"1x192x288": 2, "1x256x256": 3, "17x64x128": 4, "1x48x48": 1}
    assert found.left_out == {"shorter than 5 frames": 1}
    assert dict(zip(sizes, found.tokens, strict=True)) == {
        "1x192x288": 216,
        "1x256x256": 256,
        "17x64x128": 160,
        "1x48x48": 9,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "data.batching.tokens: got 0"),
        ({"frames": (16,)}, r"data.batching.frames: got \[16\], needed lengths of 1 \+ k \* 4"),
        ({"sides": (8,)}, r"data.batching.sides: got \[8\]"),
        ({"max_upscale": 0.5}, "data.batching.max_upscale: got 0.5"),
        ({"token": (0, 16, 16)}, "data.batching.token"),
    ],
)
def test_ranges(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BucketsConfig(**{"tokens": 4096, **fields})  # type: ignore[arg-type]
