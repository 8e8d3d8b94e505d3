from __future__ import annotations

from collections import Counter

import pytest

from ltd.config import ConfigError
from ltd.data.plan import Plan, ViewConfig, chain_keys, random_placement


def make_plan(seed: int = 0) -> Plan:
    return Plan([range(100, 107), range(200, 211)], [1.0, 3.0], global_batch=4, seed=seed)


def test_each_view_runs_through_exact_epochs() -> None:
    plan = make_plan()
    drawn: dict[int, list[int]] = {0: [], 1: []}
    for step in range(400):
        batch = plan.step(step)
        drawn[batch.view] += batch.entries
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
    walked, plan = [0, 0], make_plan()
    for step in range(4096 * 2 + 5):
        view, before = plan._steps_before(step)
        assert before == walked[view]
        walked[view] += 1
    assert make_plan().step(4096 * 2 + 3) == plan.step(4096 * 2 + 3)


def test_views_are_drawn_by_weight() -> None:
    views = Counter(make_plan().step(step).view for step in range(4000))
    assert abs(views[1] / 4000 - 0.75) < 0.03  # 4 standard deviations


def test_draws_number_the_slots_of_all_steps() -> None:
    assert make_plan().step(7).draws == (28, 29, 30, 31)


def test_fewer_samples_than_a_batch_are_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"data.global_batch: got 4, but data.views\[1\] has only 3 samples"):
        Plan([range(9), range(3)], [1, 1], global_batch=4, seed=0)


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
