"""Random streams: a row depends on its draw and stream only."""

from __future__ import annotations

import torch

from ltd.rng import DrawRandom, derive_seed


def test_rows_do_not_depend_on_the_batch() -> None:
    whole = DrawRandom(7, range(6)).normal((3, 2), "noise")
    parts = torch.cat([DrawRandom(7, [4, 5]).normal((3, 2), "noise"), DrawRandom(7, [0]).normal((3, 2), "noise")])
    assert torch.equal(parts, whole[[4, 5, 0]])


def test_streams_seeds_and_draws_differ() -> None:
    base = DrawRandom(7, [1]).normal((1000,), "noise")[0]
    others = [DrawRandom(7, [1]).normal((1000,), "time")[0], DrawRandom(8, [1]).normal((1000,), "noise")[0]]
    others.append(DrawRandom(7, [2]).normal((1000,), "noise")[0])
    assert all(abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) < 0.15 for other in others)


def test_global_generator_is_untouched() -> None:
    state = torch.random.get_rng_state()
    DrawRandom(1, [0]).uniform((), "x")
    assert torch.equal(state, torch.random.get_rng_state())


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(1, "a") == 6104050150092007499
