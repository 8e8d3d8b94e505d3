"""The order of one data set: exact epochs, lanes that read each shard in one go, packs, replacement."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from ltd.data.order import Drawn, PackOrder, SampleOrder, Strand
from ltd.data.packing import fill_packs


def make_strand(
    count: int = 103, shards: int = 7, *, lanes: int = 4, replacement: bool = False, seed: int = 0
) -> Strand:
    ids = np.arange(1000, 1000 + count)
    return Strand(ids, np.sort(np.arange(count) % shards).astype(np.int32), seed, ("set", 0), lanes, replacement)


def test_an_epoch_holds_every_sample_once_in_a_new_order() -> None:
    order = SampleOrder(make_strand(), part=0)
    epochs = [order.take(103 * number, 103) for number in range(4)]
    for number, drawn in enumerate(epochs):
        assert sorted(drawn.ids) == list(range(1000, 1103))
        assert set(drawn.epochs) == {number}
    assert len({tuple(drawn.ids) for drawn in epochs}) == 4


def test_any_cut_of_the_sequence_gives_the_same_samples() -> None:
    order, whole = SampleOrder(make_strand(), part=0), SampleOrder(make_strand(), part=0).take(0, 500).ids
    cuts = [0, 1, 40, 102, 103, 104, 260, 500]
    pieces = [order.take(low, high - low).ids for low, high in itertools.pairwise(cuts)]
    assert (np.concatenate(pieces) == whole).all()
    assert (SampleOrder(make_strand(seed=1), part=0).take(0, 500).ids != whole).any()


def test_a_lane_reads_one_shard_after_the_other() -> None:
    strand = make_strand(count=400, shards=20, lanes=4)
    drawn = SampleOrder(strand, part=0).take(0, 400)
    visits: Counter[int] = Counter()
    for lane in range(4):
        shards = strand.shards[drawn.ids[drawn.lanes == lane] - 1000]
        changes = np.flatnonzero(np.diff(shards)) + 1
        visits.update(int(run[0]) for run in np.split(shards, changes))
    # Every shard is read in one run, but for those that lie on the border of two lanes.
    assert set(visits) == set(range(20))
    assert sum(visits.values()) <= 20 + 3
    assert all(abs(int((drawn.lanes == lane).sum()) - 100) <= 1 for lane in range(4))


def test_a_batch_mixes_as_many_shards_as_there_are_lanes() -> None:
    strand = make_strand(count=400, shards=20, lanes=4)
    drawn = SampleOrder(strand, part=0).take(80, 8)
    assert len(set(strand.shards[drawn.ids - 1000])) == 4


def test_samples_are_shuffled_within_a_shard() -> None:
    drawn = SampleOrder(make_strand(count=400, shards=1, lanes=1), part=0).take(0, 400).ids - 1000
    assert abs(np.corrcoef(drawn, np.arange(400))[0, 1]) < 0.15
    assert abs(int(drawn[0]) - int(drawn[1])) > 0


def test_replacement_draws_independently_and_without_end() -> None:
    order = SampleOrder(make_strand(count=1000, shards=10, replacement=True), part=0)
    drawn = Counter(order.take(0, 5000).ids.tolist())
    # Five rounds with replacement miss each sample with probability exp(-5).
    assert 1000 * 0.98 < len(drawn) < 1000
    counts = np.array([drawn[i] for i in range(1000, 2000)])
    assert abs(counts.var() / 5 - 1) < 0.2  # Poisson: variance equals mean


def test_parts_of_one_set_take_the_shards_in_the_same_order() -> None:
    strand = make_strand(count=200, shards=10, lanes=1)
    a, b = (strand.shards[SampleOrder(strand, part=part).take(0, 200).ids - 1000] for part in (0, 1))
    assert list(dict.fromkeys(a)) == list(dict.fromkeys(b))
    first, second = (SampleOrder(strand, part=part).take(0, 200).ids for part in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("replacement", [False, True])
def test_packs_stay_within_the_budget_and_hold_every_sample_once(replacement: bool) -> None:
    tokens = [5, 16, 40]
    classes = np.array([0] * 50 + [1] * 30 + [2] * 23)
    packs, ends = fill_packs(tokens, [50, 30, 23], 64)
    order = PackOrder(make_strand(replacement=replacement), classes, packs, ends)
    for epoch in range(3):
        drawn = order.take(order.num_units * epoch, order.num_units)
        sizes = np.array(tokens)[classes[drawn.ids - 1000]]
        loads = np.add.reduceat(sizes, np.concatenate([[0], drawn.ends[:-1]]))
        assert loads.max() <= 64
        assert Counter(sizes.tolist()) == {5: 50, 16: 30, 40: 23}
        assert replacement or sorted(drawn.ids) == list(range(1000, 1103))
    assert (order.take(0, 5).ids != order.take(order.num_units, 5).ids[: len(order.take(0, 5).ids)]).any()
    halves = [order.take(3, 9), order.take(12, 11)]
    assert (Drawn.join(halves).ids == order.take(3, 20).ids).all()
    assert (Drawn.join(halves).ends == order.take(3, 20).ends).all()


def test_packs_are_nearly_full() -> None:
    rng = np.random.default_rng(0)
    tokens, counts = [28, 112, 196, 256, 560, 1024], rng.integers(1000, 200_000, 6).tolist()
    packs, ends = fill_packs(tokens, counts, 4096)
    loads = np.add.reduceat(np.array(tokens)[packs], np.concatenate([[0], ends[:-1]]))
    assert loads.max() <= 4096
    assert loads.sum() / (len(loads) * 4096) > 0.98
    assert np.bincount(packs).tolist() == counts
