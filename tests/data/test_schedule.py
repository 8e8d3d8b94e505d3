"""Which kind of step comes when, and what data sets, buckets and lanes make of it."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest

from ltd.data.batch import BadSample
from ltd.data.batching import Arrangement, BucketsConfig, PackedConfig, step_kinds
from ltd.data.config import DataConfig
from ltd.data.loader import BadWindow
from ltd.data.order import PackOrder, SampleOrder, Strand
from ltd.data.packing import fill_packs
from ltd.data.plan import Plan, StepKind, ViewConfig
from ltd.data.schedule import EpochSteps, WeightedSteps
from ltd.data.workers import WorkerPool

VIEWS = tuple(ViewConfig(num_frames=1, height=16 * n, width=16) for n in range(1, 11))


def make_plan(
    ids: list[np.ndarray], units: list[int], sets: list[tuple[int, int, float]], *, seed: int = 0, lanes: int = 4
) -> Plan:
    """Plan buckets of the ids given; ten samples a shard."""
    arrangement = Arrangement(VIEWS[: len(ids)], tuple(ids), tuple(range(1, len(ids) + 1)), tuple(units))

    def strand(part: np.ndarray, number: int) -> Strand:
        return Strand(part, (part // 10).astype(np.int32), seed, ("set", number), lanes, False)

    return Plan(step_kinds(BucketsConfig(tokens=1), arrangement, sets=sets, strand=strand), seed=seed, by_epoch=True)


def test_buckets_pass_their_epochs_together() -> None:
    ids = [np.arange(800 * n, 800 * n + 800) for n in range(10)]
    plan = make_plan(ids, [8] * 10, [(0, 8000, 1.0)])
    drawn: Counter[int] = Counter()
    for step in range(3000):
        drawn.update(plan.step(step).entries)
        if (step + 1) % 1000 == 0:
            assert set(drawn.values()) == {(step + 1) // 1000} and len(drawn) == 8000
            assert plan.progress(step + 1) == [(8 * (step + 1), (step + 1) / 1000)]


def test_remainders_of_an_epoch_are_carried_over() -> None:
    ids = [np.arange(0, 21), np.arange(21, 58), np.arange(58, 69)]
    plan, drawn = make_plan(ids, [4, 6, 8], [(0, 69, 1.0)]), Counter[int]()
    steps = int(sum(np.floor(40 * len(i) / u) for i, u in zip(ids, [4, 6, 8], strict=True)))
    for step in range(steps):
        drawn.update(plan.step(step).entries)
    assert {drawn[i] for i in range(69)} <= {39, 40}
    assert sum(drawn[i] == 39 for i in range(69)) < 4 + 6 + 8


def test_epoch_steps_are_random_access_shuffled_and_begin_as_told() -> None:
    schedule, counts, kinds = EpochSteps([3.5, 1.25, 7.0], [1, 2], seed=0), np.zeros(3, dtype=int), []
    for step in range(300):
        kind, before = schedule.before(step)
        assert (before == counts).all()
        counts[kind] += 1
        kinds.append(kind)
    assert kinds[:2] == [1, 2]
    assert [EpochSteps([3.5, 1.25, 7.0], [1, 2], seed=0).before(s)[0] for s in (299, 7, 150)] == [
        kinds[299], kinds[7], kinds[150]
    ]  # fmt: skip
    assert EpochSteps([3.5, 1.25, 7.0], [1, 2], seed=1).before(250)[0] in (0, 1, 2)
    assert [EpochSteps([3.5, 1.25, 7.0], [], seed=1).before(s)[0] for s in range(300)] != kinds
    epochs = [tuple(kinds[47 * e // 4 : 47 * (e + 1) // 4]) for e in range(20)]
    assert len(set(epochs)) > 15


def test_a_long_epoch_counts_over_blocks() -> None:
    schedule = EpochSteps([9000.0, 4000.0], [0], seed=0)
    kinds = [schedule.before(step)[0] for step in range(0, 13_000, 1)]
    assert np.bincount(kinds).tolist() == [9000, 4000]
    for step in (4095, 4096, 4097, 12_999, 13_001, 26_500):
        _, before = schedule.before(step)
        assert before.sum() == step
    assert (schedule.before(12_999)[1] == np.bincount(kinds[:12_999], minlength=2)).all()


def test_drawn_kinds_do_not_repeat_after_a_block() -> None:
    schedule = WeightedSteps([1.0, 1.0], [0], seed=0)
    kinds = np.array([schedule.before(step)[0] for step in range(3 * 4096)]).reshape(3, 4096)
    assert 0.45 < (kinds[0] == kinds[1]).mean() < 0.55 and 0.45 < (kinds[1] == kinds[2]).mean() < 0.55


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_weights_hold_over_disjoint_and_over_skewed_buckets(weights: tuple[float, float]) -> None:
    total = sum(weights)
    sets = [(0, 900, weights[0]), (900, 1000, weights[1])]
    disjoint = make_plan([np.arange(900), np.arange(900, 1000)], [10, 5], sets)
    drawn = np.concatenate([disjoint.step(step).entries for step in range(600)])
    assert abs((drawn >= 900).mean() - weights[1] / total) < 0.03
    sets = [(0, 500, weights[0]), (500, 1000, weights[1])]
    skewed = make_plan(
        [np.r_[0:490, 500:510], np.r_[490:500, 510:1000]], [10, 10], sets
    )  # each set has 490 in one bucket and 10 in the other
    counts = Counter(np.concatenate([skewed.step(step).entries for step in range(2000)]).tolist())
    for low, high, weight in sets:
        each = np.array([counts[i] for i in range(low, high)])
        assert abs(each.sum() / 20_000 - weight / total) < 0.03
        rare = each[490:] if low == 0 else each[:10]
        assert 0.7 < rare.mean() / each.mean() < 1.3, "a sample's rate does not depend on its bucket"


def test_weights_of_packed_data_sets_count_samples() -> None:
    ids = [np.arange(0, 400), np.arange(400, 500)]
    arrangement = Arrangement(VIEWS[:2], tuple(ids), (1, 8), (4, 4))
    batching = PackedConfig(tokens=16, packs=4)

    def strand(part: np.ndarray, number: int) -> Strand:
        return Strand(part, np.zeros(len(part), dtype=np.int32), 0, ("set", number), 1, False)

    sets = [(0, 400, 1.0), (400, 500, 1.0)]  # 16 samples a pack against 2
    plan = Plan(step_kinds(batching, arrangement, sets=sets, strand=strand), seed=0)
    drawn = np.concatenate([plan.step(step).entries for step in range(1500)])
    assert abs((drawn >= 400).mean() - 0.5) < 0.04


def test_data_sets_of_units_do_not_repeat_after_a_block() -> None:
    orders = tuple(
        SampleOrder(Strand(np.arange(5) + 10 * n, np.zeros(5, np.int32), 0, ("set", n), 1, False), part=0)
        for n in (0, 1)
    )
    plan = Plan([StepKind(orders, (1.0, 1.0), 4096, 1.0, 1, 0)], seed=0)
    assert 0.45 < (plan._block_sets(0, 0) == plan._block_sets(0, 1)).mean() < 0.55


def test_shards_and_packs_come_in_another_order_each_epoch() -> None:
    strand = Strand(np.arange(200), (np.arange(200) // 10).astype(np.int32), 0, ("set", 0), 1, False)
    order = SampleOrder(strand, part=0)
    shards = [tuple(dict.fromkeys((order.take(200 * epoch, 200).ids // 10).tolist())) for epoch in range(4)]
    assert len(set(shards)) == 4
    classes = np.repeat([0, 1], 100)
    packs = PackOrder(strand, classes, *fill_packs([3, 9], [100, 100], 20))
    sizes = [tuple(np.diff(packs.take(packs.num_units * e, packs.num_units).ends).tolist()) for e in range(4)]
    assert len(set(sizes)) == 4


def test_packs_mix_as_many_shards_as_there_are_lanes() -> None:
    def mixed(lanes: int) -> int:
        strand = Strand(np.arange(4000), (np.arange(4000) // 100).astype(np.int32), 0, ("set", 0), lanes, False)
        order = PackOrder(strand, np.zeros(4000, dtype=np.int64), *fill_packs([1], [4000], 8))
        return len(set((order.take(0, 12).ids // 100).tolist()))

    assert mixed(1) == 1 and mixed(32) >= 30


def test_a_step_lists_epoch_before_epoch_and_lane_before_lane() -> None:
    plan = make_plan([np.arange(50)], [20], [(0, 50, 1.0)], lanes=5)
    for step in range(10):
        batch = plan.step(step)
        assert list(batch.epochs) == sorted(batch.epochs)
    order = plan.kinds[0].orders[0]
    assert order is not None
    lanes = dict(zip(order.take(0, 20).ids.tolist(), order.take(0, 20).lanes.tolist(), strict=True))
    seen = [lanes[entry] for entry in plan.step(0).entries]
    assert seen == sorted(seen) and len(set(seen)) == 5


def test_the_step_of_the_most_tokens_comes_second() -> None:
    strand = Strand(np.arange(100), np.zeros(100, np.int32), 0, ("set", 0), 1, False)
    for by_epoch in (False, True):
        kinds = [
            StepKind((SampleOrder(strand, part=n),), (1.0,), units, 5.0, size, n)
            for n, (units, size) in enumerate([(4, 10), (2, 30), (64, 20)])
        ]
        plan = Plan(kinds, seed=3, by_epoch=by_epoch)
        assert [plan.step(step).views[0] for step in (0, 1)] == [1, 2]


def test_steps_larger_than_the_window_are_judged_by_their_share() -> None:
    bad = [BadSample(key="k", shard="s", cause="empty", message="") for _ in range(200)]
    window = BadWindow(DataConfig(shards="x", max_bad_fraction=0.05, bad_window=1000), 0)
    assert window.add(1940, bad[:60]) is None  # 3 %
    assert window.add(1880, bad[:120]) is not None  # 6 %
    steady = BadWindow(DataConfig(shards="x", max_bad_fraction=0.05, bad_window=1000), 0)
    assert all(steady.add(96, bad[:4]) is None for _ in range(50))  # 4 %
    assert steady.add(0, bad[:100]) is not None


def test_closing_ends_those_who_wait() -> None:
    pool = WorkerPool(1, timeout_s=60)
    started, release = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        release.wait(5)

    first = pool.submit(hold)
    started.wait(5)
    waiting = [pool.submit(lambda: None) for _ in range(3)]
    pool.close()
    for job in waiting:
        with pytest.raises(RuntimeError, match="closed"):
            pool.wait(job)
    release.set()
    pool.wait(first)
    pool.join(5)
