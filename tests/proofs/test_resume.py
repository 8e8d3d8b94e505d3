"""Runs on two processes that are killed, started again and moved to other layouts equal the untouched one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.proofs import chaos, elastic

pytestmark = [pytest.mark.slow, pytest.mark.dist]

STEPS = 24


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, chaos.train_untouched(folder, steps=STEPS, every=6)


def test_killed_run_ends_bit_for_bit(untouched: tuple[Path, list[str]]) -> None:
    folder, overrides = untouched
    plans = [
        chaos.Plan("save", rank=1, patience=1, delay_s=0.001),
        chaos.Plan("step", rank=None, patience=3, delay_s=0.02),
    ]
    found = chaos.compare(plans, folder, overrides, steps=STEPS)
    assert chaos.misses_of(found, steps=STEPS, kills=2, in_saves=1) == []
    assert found.kills[0].named is not None and found.kills[0].named.startswith("process 1 in ")
    assert found.kills[0].resumed_at == 6
    assert {"master", "exp_avg", "exp_avg_sq", "ema_0.9", "ema_0.99"} == set(found.groups)


def test_run_moves_to_other_layouts(untouched: tuple[Path, list[str]]) -> None:
    folder, overrides = untouched
    found = elastic.compare((elastic.LEGS[2], elastic.LEGS[3]), folder, overrides, steps=STEPS)
    assert elastic.misses_of(found) == []
    assert [part.first_step for part in found.parts] == [1, found.parts[0].last_step + 1]
    assert max(found.groups.values()) < 1e-4
