"""Counts of layers against torch's counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltd.nn.flops import Flops, attention, convolution, linear, total
from tools.proofs._flop_counter import counted


@pytest.mark.parametrize("leaf", [True, False])
def test_linear(leaf: bool) -> None:
    layer, x = nn.Linear(6, 10), torch.randn(4, 6, requires_grad=not leaf)
    ours = linear(4, 6, 10, leaf=leaf)
    assert ours.forward == counted(lambda: layer(x)) == 2 * 4 * 6 * 10
    assert ours.training == counted(lambda: layer(x).sum().backward())


@pytest.mark.parametrize(("leaf", "fixed"), [(False, False), (True, False), (False, True)])
def test_convolution(leaf: bool, fixed: bool) -> None:
    layer = nn.Conv3d(3, 5, (1, 3, 3), padding=(0, 1, 1)).requires_grad_(not fixed)
    x = torch.randn(2, 3, 2, 4, 6, requires_grad=not leaf)
    ours = convolution(2 * 2 * 4 * 6, 3, 5, (1, 3, 3), leaf=leaf, fixed=fixed)
    assert ours.forward == counted(lambda: layer(x))
    assert ours.training == counted(lambda: layer(x).sum().backward())


def test_attention_makes_its_scores_again_in_the_backward_pass() -> None:
    q, k = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 7))
    ours = attention(5, 7, 16)
    assert ours.forward == ours.attention == counted(lambda: F.scaled_dot_product_attention(q, k, k))
    step = counted(lambda: F.scaled_dot_product_attention(q, k, k).sum().backward())
    assert ours.training + ours.scores_again == step


def test_sums_and_counts_that_only_a_device_knows() -> None:
    rows = torch.tensor(3.0, dtype=torch.float64)
    made = total([linear(rows, 4, 8) * 2, attention(rows, rows, 4)])
    plain = linear(3, 4, 8) * 2 + attention(3, 3, 4)
    assert isinstance(made.forward, torch.Tensor)
    assert Flops(float(made.forward), float(made.backward), float(made.attention)) == plain
    assert total([]) == Flops()
