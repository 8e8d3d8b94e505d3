from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data.batching import frame_steps
from ltd.data.order import PackOrder, SampleOrder, Strand
from ltd.data.packing import fill_packs
from ltd.data.plan import Plan, StepKind, ViewConfig, chain_keys, random_placement


def make_strand(ids: range, *, number: int = 0, seed: int = 0) -> Strand:
    return Strand(np.array(ids), np.array([i % 3 for i in ids], dtype=np.int32), seed, ("set", number), 2, False)


def make_plan(seed: int = 0, weights: tuple[float, float] = (1.0, 3.0)) -> Plan:
    kinds = [
        StepKind(
            (SampleOrder(make_strand(ids, seed=seed), part=view),), (1.0,), 4, weights[view], 10 * (view + 1), view
        )
        for view, ids in enumerate((range(100, 107), range(200, 211)))
    ]
    return Plan(kinds, seed=seed)


def test_each_view_runs_through_exact_epochs() -> None:
    plan = make_plan()
    drawn: dict[int, list[int]] = {0: [], 1: []}
    for step in range(400):
        batch = plan.step(step)
        drawn[batch.views[0]] += batch.entries
    for view, ids in enumerate((range(100, 107), range(200, 211))):
        epochs = [drawn[view][i : i + len(ids)] for i in range(0, len(drawn[view]) - len(ids), len(ids))]
        assert len(epochs) > 20
        assert all(sorted(epoch) == list(ids) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2  # a new order each time


def test_a_step_is_a_function_of_seed_and_data_alone() -> None:
    forward = [make_plan().step(step) for step in range(60)]
    plan = make_plan()
    assert [plan.step(step) for step in reversed(range(60))] == forward[::-1]
    assert [make_plan(seed=1).step(step).entries for step in range(60)] != [batch.entries for batch in forward]


def test_random_access_counts_earlier_steps_across_blocks() -> None:
    walked, plan = np.zeros(2, dtype=int), make_plan()
    for step in range(4096 * 2 + 5):
        view, before = plan._schedule.before(step)
        assert (before == walked).all()
        walked[view] += 1
    assert make_plan().step(4096 * 2 + 3) == plan.step(4096 * 2 + 3)


def test_the_kind_of_the_largest_samples_runs_first_whatever_the_seed() -> None:
    assert {make_plan(seed=seed, weights=(30.0, 1.0)).step(0).views[0] for seed in range(20)} == {1}
    assert {make_plan(seed=seed, weights=(30.0, 1.0)).step(1).views[0] for seed in range(20)} >= {0}


def test_views_are_drawn_by_weight() -> None:
    views = Counter(make_plan().step(step).views[0] for step in range(4000))
    assert abs(views[1] / 4000 - 0.75) < 0.03  # 4 standard deviations


def test_draws_number_the_slots_of_all_steps() -> None:
    assert make_plan().step(7).draws == (28, 29, 30, 31)


def test_data_sets_mix_by_weight_each_in_exact_epochs() -> None:
    strands = [make_strand(range(40), number=0), make_strand(range(1000, 1015), number=1)]
    orders = tuple(SampleOrder(strand, part=0) for strand in strands)
    plan = Plan([StepKind(orders, (1.0, 4.0), 10, 1.0, 1, 0)], seed=0)
    drawn = [i for step in range(900) for i in plan.step(step).entries]
    parts = [[i for i in drawn if i < 1000], [i for i in drawn if i >= 1000]]
    assert abs(len(parts[1]) / len(drawn) - 0.8) < 0.02  # 4 standard deviations
    for ids, size in zip(parts, (40, 15), strict=True):
        epochs = [ids[i : i + size] for i in range(0, len(ids) - size, size)]
        assert all(sorted(epoch) == sorted(set(ids)) for epoch in epochs)
    progress = plan.progress(900)
    assert [units for units, _ in progress] == [len(parts[0]), len(parts[1])]
    assert progress[1][1] == len(parts[1]) / 15
    again = Plan([StepKind(orders, (1.0, 4.0), 10, 1.0, 1, 0)], seed=0)
    assert again.step(890) == plan.step(890)  # far steps without the ones before


def test_packs_are_dealt_whole() -> None:
    strand = make_strand(range(20))
    classes = np.array([0] * 12 + [1] * 8)
    order = PackOrder(strand, classes, *fill_packs([3, 7], [12, 8], 10))
    plan = Plan([StepKind((order,), (1.0,), 2, 1.0, 7, classes)], seed=0)
    batch = plan.step(3)
    assert len(batch.ends) == 2 and batch.ends[-1] == len(batch.entries) == len(batch.views)
    assert [*batch.unit_range(0, 1), *batch.unit_range(1, 2)] == list(range(len(batch.entries)))
    assert batch.views == tuple(classes[list(batch.entries)])
    draws = [draw for step in range(30) for draw in plan.step(step).draws]
    assert len(set(draws)) == len(draws)


def test_windows_reach_both_ends_and_never_beyond() -> None:
    view = ViewConfig(num_frames=3, height=8, width=8, fps=12)  # of 24 fps: every second frame, 5 frames wide
    places = [random_placement(view, frames=9, fps=24.0, seed=0, draw=draw, flip=True) for draw in range(300)]
    assert {place.start for place in places} == {0, 1, 2, 3, 4}
    assert {place.step for place in places} == {2}
    assert 0.35 < sum(place.flip for place in places) / 300 < 0.65
    assert not any(random_placement(view, frames=9, fps=24.0, seed=0, draw=d, flip=False).flip for d in range(50))
    assert places[17] == random_placement(view, frames=9, fps=24.0, seed=0, draw=17, flip=True)


def test_key_chain_depends_on_order_and_history() -> None:
    one = chain_keys("", ["a", "b"])
    assert chain_keys("", ["b", "a"]) != one
    assert chain_keys(one, ["c"]) != chain_keys("", ["c"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 0}, "num_frames: got 0"),
        ({"height": -1}, "height: got -1"),
        ({"fps": 0.0}, "fps: got 0.0"),
        ({"weight": 0.0}, "weight: got 0.0"),
    ],
)
def test_view_ranges(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViewConfig(**{"num_frames": 1, "height": 8, "width": 8, **fields})  # type: ignore[arg-type]


def test_frame_steps_of_many_samples_are_those_of_each() -> None:
    fps = np.concatenate([[0.0, 12.0, 24.0, 36.0, 60.0], np.random.default_rng(0).uniform(1, 120, 300)])
    for wanted in (None, 8.0, 24.0, 25.0):
        view = ViewConfig(num_frames=5, height=8, width=8, fps=wanted)
        assert frame_steps(fps, wanted).tolist() == [view.frame_step(rate) for rate in fps.tolist()]
