"""Nearest codes, gradients through them, and the order of candidates, against brute force and explicit matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ltd.autoencoders.codebook import (
    JITTER,
    Candidates,
    nearest_codes,
    repeat_with_jitter,
    rotate_through,
    straight_through,
)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pull(through: Tensor, vectors: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad((through * upstream).sum(), vectors)[0]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.double(), b.double(), dim=1)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("max_distances", [1, 40, 2**24])
def test_nearest_codes_equal_brute_force_in_any_parts(offset: float, max_distances: int) -> None:
    vectors, codes = _randn(37, 5) + offset, _randn(13, 5, seed=1) + offset
    expected = (vectors.double()[:, None] - codes.double()[None]).square().sum(2).argmin(1)
    assert torch.equal(nearest_codes(vectors, codes, max_distances), expected)


def test_straight_through_gives_the_codes_and_the_identity_as_gradient() -> None:
    vectors, codes, upstream = _randn(6, 4).requires_grad_(), _randn(6, 4, seed=1) * 1e-3, _randn(6, 4, seed=2)
    through = straight_through(vectors, codes)
    assert torch.equal(through, codes)
    assert torch.equal(_pull(through, vectors, upstream), upstream)


def test_rotation_gives_the_codes_and_keeps_angle_and_relative_length_of_the_gradient() -> None:
    vectors, codes, upstream = _randn(64, 5).requires_grad_(), _randn(64, 5, seed=1), _randn(64, 5, seed=2)
    through = rotate_through(vectors, codes)
    assert torch.equal(through, codes)
    gradient = _pull(through, vectors, upstream)
    torch.testing.assert_close(_cosine(gradient, vectors), _cosine(upstream, codes), rtol=0, atol=1e-4)
    scale = codes.norm(dim=1) / vectors.norm(dim=1)
    torch.testing.assert_close(gradient.norm(dim=1), upstream.norm(dim=1) * scale, rtol=1e-4, atol=0)


def test_rotation_is_the_one_of_the_plane_that_holds_both() -> None:
    vectors, codes, upstream = _randn(8, 5).requires_grad_(), _randn(8, 5, seed=1), _randn(8, 5, seed=2)
    gradient = _pull(rotate_through(vectors, codes), vectors, upstream)
    for e, q, g, got in zip(vectors.detach().double(), codes.double(), upstream.double(), gradient, strict=True):
        e_hat, q_hat = e / e.norm(), q / q.norm()
        r = (e_hat + q_hat) / (e_hat + q_hat).norm()
        matrix = torch.eye(5, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(q_hat, e_hat)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(matrix @ e * (q.norm() / e.norm()), q, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got.double(), matrix.T @ g * (q.norm() / e.norm()), rtol=1e-4, atol=1e-5)
        across = torch.linalg.qr(torch.stack([e, q]).T, mode="complete").Q[:, 2:]  # what is outside the plane stays
        torch.testing.assert_close(matrix @ across, across, rtol=0, atol=1e-12)


def test_rotation_by_nothing_is_straight_through_scaled() -> None:
    vectors, upstream = _randn(6, 4).requires_grad_(), _randn(6, 4, seed=2)
    gradient = _pull(rotate_through(vectors, 3 * vectors.detach()), vectors, upstream)
    torch.testing.assert_close(gradient, 3 * upstream, rtol=1e-5, atol=1e-5)


def test_rotation_falls_back_where_it_is_not_defined() -> None:
    vectors = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, 2.0], [1.0, 0.0]], requires_grad=True)
    nearly_opposite = [-math.cos(1e-5), math.sin(1e-5)]
    codes = torch.tensor([[-1.0, -2.0], [-7.0, -14.0], [3.0, 1.0], [0.0, 0.0], nearly_opposite])
    upstream = _randn(5, 2, seed=2)
    through = rotate_through(vectors, codes)
    assert torch.equal(through, codes)
    assert torch.equal(_pull(through, vectors, upstream), upstream)


def _candidates(draws: list[int], priority: list[list[float]]) -> Candidates:
    vectors = torch.tensor([[draw * 10.0 + p] for draw in draws for p in range(len(priority[0]))])
    return Candidates.of(vectors, torch.tensor(priority), torch.tensor(draws))


def test_candidates_take_turns_by_priority_then_draw_then_position() -> None:
    found = _candidates([7, 3], [[0.5, 0.5, 0.1], [0.9, 0.5, 0.5]]).first(6)
    assert found.vectors.flatten().tolist() == [72, 31, 32, 70, 71, 30]
    assert _candidates([7, 3], [[0.5, 0.5, 0.1], [0.9, 0.5, 0.5]]).first(2).vectors.flatten().tolist() == [72, 31]


def test_draws_beyond_fp32_are_told_apart() -> None:
    found = _candidates([2**40 + 1, 2**40], [[0.5], [0.5]]).first(2)
    assert found.keys[:, 1].tolist() == [2**40, 2**40 + 1]


@pytest.mark.parametrize("count", [1, 3, 6])
def test_gathered_takes_the_first_of_all_processes_and_no_padding(count: int) -> None:
    mine, other = _candidates([1], [[0.3, 0.0, 0.6]]), _candidates([2], [[0.5]])
    rows: list[Tensor] = []
    other.gathered(count, lambda x: rows.append(x) or x)  # type: ignore[func-returns-value]
    assert all(len(x) == count for x in rows)
    theirs = iter(rows)
    found = mine.gathered(count, lambda x: torch.cat([next(theirs), x]))
    assert found.flatten().tolist() == [11.0, 10.0, 20.0, 12.0][:count]


def test_repeats_lie_close_to_their_vector_and_are_the_same_every_time() -> None:
    vectors = torch.tensor([[0.0, 100.0], [2.0, 500.0], [4.0, 900.0]])
    codes = repeat_with_jitter(vectors, 8)
    assert torch.equal(codes[:3], vectors)
    assert torch.equal(codes, repeat_with_jitter(vectors, 8))
    off = (codes[3:] - vectors[[0, 1, 2, 0, 1]]) / vectors.std(0, correction=0)
    assert off.abs().min() > 0 and off.abs().max() < 4 * JITTER
    assert off.abs().amax(0).min() > JITTER / 4
    assert torch.equal(repeat_with_jitter(vectors, 3), vectors)
