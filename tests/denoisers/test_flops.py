"""Operations of the denoiser family against torch's counter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ltd.denoisers import Conditioning, DitInputs, count_flops
from ltd.parallel import ParallelConfig, activation
from tests.parallel.family_check import FAMILY, inputs, member, packs
from tools.proofs._flop_counter import counted
from tools.proofs.flops import PUBLISHED, compare, per_frame

CASES = [(name, packed) for name in FAMILY for packed in (False, True) if not packed or packs(name)]
#: The issue asks for 1 %; the formulas leave nothing out.
EXACT = 1e-9


def loss(model: Any, given: tuple[Any, ...]) -> Tensor:
    return torch.stack([row.square().mean() for row in model(*given)]).sum()


@pytest.mark.parametrize(("name", "packed"), CASES)
def test_member_counts_as_torch_does(name: str, packed: bool) -> None:
    model, given = member(name, torch.float32), inputs(name, packed, torch.float32)
    flops = count_flops(model.config, DitInputs.of(given[0], given[2]))
    first, ours, step, our_step = compare(lambda: loss(model, given), flops.all, model)
    assert ours == pytest.approx(first, rel=EXACT)
    assert our_step == pytest.approx(step, rel=EXACT)


def test_times_of_frames() -> None:
    for name, _, first, ours, step, our_step in per_frame():
        assert (ours, our_step) == (pytest.approx(first, rel=EXACT), pytest.approx(step, rel=EXACT)), name


def test_conditions_that_are_not_given() -> None:
    for name in ("numbers", "image", "joint"):
        model = member(name, torch.float32)
        x, t, _ = inputs(name, False, torch.float32)
        ours = count_flops(model.config, DitInputs.of(x, Conditioning())).all
        assert ours.forward == pytest.approx(counted(lambda m=model, a=x, b=t: m(a, b)), rel=EXACT), name


@pytest.mark.parametrize(("kind", "every"), [("full", 1), ("full", 2), ("selective", 1)])
def test_recomputed_blocks(kind: Any, every: int) -> None:
    model, given = member("registers", torch.float32), inputs("registers", False, torch.float32)
    flops = count_flops(model.config, DitInputs.of(given[0], given[2]))
    plain = counted(lambda: loss(model, given).backward())
    config = ParallelConfig(
        engine="torch", activation_checkpointing=kind, activation_checkpointing_every=every, precision="fp32"
    )
    activation.checkpoint_blocks(model, config)
    again = counted(lambda: loss(model, given).backward()) - plain
    ours = flops.recomputed(every, keep_attention=kind == "selective")
    # A recomputation stops where all that the backward pass needs is there: at the last product of a block.
    assert again <= ours <= again + sum(_last_product(model) for _ in model.blocks[::every])
    assert flops.recomputed(0) == 0


def _last_product(model: Any) -> float:
    return 2.0 * 2 * (9 + 3) * model.config.mlp_hidden * model.config.width


def test_counts_stay_on_the_device_and_agree_with_plain_ones() -> None:
    for name in ("joint", "numbers", "layer norms"):
        model = member(name, torch.float32)
        x, _, cond = inputs(name, True, torch.float32)
        found = DitInputs.of(x, cond)
        assert isinstance(found.text, Tensor) and cond.text_mask is not None
        plain = dataclasses.replace(found, text=tuple(int(n) for n in cond.text_mask.sum(1)))
        ours, theirs = count_flops(model.config, found), count_flops(model.config, plain)
        assert isinstance(ours.all.forward, Tensor)
        assert float(ours.all.training) == theirs.all.training and float(ours.text) == theirs.text


def test_published_figures_of_dit() -> None:
    from tools.proofs.flops import published

    assert len(PUBLISHED) == 4
    for name, _, theirs, ours, *_ in published():
        assert ours == pytest.approx(theirs, rel=0.01), name
