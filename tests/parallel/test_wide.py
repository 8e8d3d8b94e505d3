"""Sequence parallelism on four gloo processes: what ``wide_worker.py`` measured in one launch, check by check."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.launched import get, launch
from tests.parallel.wide_worker import CONDITIONED, PACKED

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch("wide_worker", 4, tmp_path_factory.mktemp("wide") / "out.json")


def test_any_heads_and_tokens_equal_the_whole(results: dict[str, Any]) -> None:
    found = get(results, "sequence")
    assert len(found["differences"]) == 6 * 4 * 3
    assert {name: error for name, error in found["differences"].items() if not error < 1e-5} == {}
    assert found["bf16"] < 0.1
    assert found["exchanged"]
    for counts in found["collectives"]:
        assert (counts["all_to_all"], counts["gather"]) == (2, 1)
    # What leaves the first member, in rows of its 2 of 8 tokens, of one head of 6: q, then k and v, then the output.
    rows = [0 + 2 * 3 + 0, 1 + 2 * (1 + 2) + 1, 2 + 2 * (1 + 2 + 2) + 2]
    assert [counts["sent"] for counts in found["collectives"]] == [2 * 6 * number for number in rows]


@pytest.mark.parametrize(("degree", "zero", "heads"), CONDITIONED)
def test_condition_of_every_token_with_text(results: dict[str, Any], degree: int, zero: int, heads: int) -> None:
    found = get(results, f"conditioned-{degree}-{zero}-{heads}")
    assert found["blocks"] == 2
    assert found["gradient"] < 1e-5 and found["output"] < 1e-5


@pytest.mark.parametrize(("degree", "zero", "heads"), PACKED)
def test_packs_equal_their_samples_one_by_one(results: dict[str, Any], degree: int, zero: int, heads: int) -> None:
    found = get(results, f"packed-{degree}-{zero}-{heads}")
    assert len(found) == 8
    assert max(found.values()) < 1e-5, found
