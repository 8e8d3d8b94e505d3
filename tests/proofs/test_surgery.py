"""docs/proofs/surgery.md, and that it can miss."""

from __future__ import annotations

import pytest
import torch

from ltd.denoisers import resize
from tools.proofs import surgery


def test_every_limit_holds_and_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    held = surgery.measure()
    assert not held.misses and len(held.rows) == len(surgery.CASES) + 4

    genuine = resize.resize_output
    monkeypatch.setattr("ltd.denoisers.surgery.resize_output", lambda *args: genuine(*args) * 1.0001)
    misses = surgery.measure().misses
    assert {miss.partition(":")[0] for miss in misses} >= {"4 -> 16 channels", "patch of 2 frames, average"}
    assert not any(miss.startswith("3 -> 5 blocks") for miss in misses)


@pytest.mark.parametrize("place", [-1, -2])
def test_copied_weights_of_another_split_would_be_seen(place: int) -> None:
    case = surgery.CASES[place]
    near, _, _ = surgery.compare(case, torch.float64)
    copied, _, _ = surgery.compare(case, torch.float64, copy=True)
    assert near < surgery.NEAR[0] < copied
