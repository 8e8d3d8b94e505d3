"""Histograms of shards: which bin a value is in, and that parts add up to the whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ltd.parallel import histograms
from ltd.parallel.histograms import bin_edges, count_bins


def test_edges_are_symmetric_and_a_quarter_of_a_decade_apart() -> None:
    edges = bin_edges()
    assert edges == sorted(set(edges)) and edges == [-edge for edge in reversed(edges)]
    positive = [edge for edge in edges if edge > 0]
    assert (positive[0], positive[-1], len(positive)) == (1e-12, 1e4, 65)
    assert all(b / a == pytest.approx(10**0.25) for a, b in itertools.pairwise(positive))


def test_a_value_lies_at_or_above_its_bins_lower_edge() -> None:
    edges = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 1.5, math.nan, math.inf, -math.inf])
    assert count_bins(values, edges).tolist() == [1, 2, 2, 2]
    # Values beyond the ends are not lost.
    assert count_bins(torch.tensor([-9.0, 2.0, 9.0]), edges).tolist() == [1, 0, 0, 2]
    assert count_bins(torch.zeros(0), edges).tolist() == [0, 0, 0, 0]


def test_zeros_of_either_sign_are_in_the_middle_bin() -> None:
    edges = torch.tensor(bin_edges(), dtype=torch.float64)
    found = count_bins(torch.tensor([0.0, -0.0, 1e-13, -1e-13]), edges)
    assert found[len(found) // 2] == found.sum() == 4


def test_chunks_add_up_in_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    edges = torch.tensor(bin_edges(), dtype=torch.float64)
    whole = count_bins(values, edges)
    monkeypatch.setattr(histograms, "_CHUNK", 10)
    assert torch.equal(count_bins(values, edges), whole) and whole.sum() == 77
    assert torch.equal(torch.stack([count_bins(row, edges) for row in values]).sum(dim=0), whole)
