"""Saving in the background on two processes: what is saved, who hears of failures, what is left on disk."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel import launched

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saver")
    return launched.launch("saver_worker", 2, folder / "out.json", str(folder))


def get(results: dict[str, Any], name: str) -> dict[str, Any]:
    return launched.get(results, f"check_{name}")


def test_training_goes_on_while_the_state_at_the_call_is_written(results: dict[str, Any]) -> None:
    found = get(results, "background")
    assert found["early"], "nothing is committed while one process still writes"
    assert found["latest"] == "step-00000001" and found["names"] == ["step-00000001"]
    assert found["loaded"] == 5.0
    assert found["manifest"] == {"step": 1, "data": {"position": 4}, "world_size": 2, "ema": []}
    assert 0 < found["blocked_s"] < 5 and found["write_s"] > 0
    assert found["threads"] <= 2


def test_a_save_waits_for_the_one_before(results: dict[str, Any]) -> None:
    found = get(results, "next_save_waits")
    assert found["blocked_s"] > 0.2
    assert found["names"] == ["step-00000003"] and found["loaded"] == 3.0


def test_all_processes_hear_of_a_failed_write_and_can_save_later(results: dict[str, Any]) -> None:
    found = get(results, "failed_write")
    for step, name in ((2, "loop"), (3, "wait"), (4, "next")):
        assert len(found["messages"][name]) == 2
        for message in found["messages"][name]:
            assert message.startswith("StorageWriteError: ") and f"step-0000000{step} was not written" in message
            assert "process 1: " in message and "123 bytes" in message and "process 0" not in message
    assert found["left"] == ["step-00000001"]
    assert found["after"] == ["step-00000001", "step-00000009"]


def test_all_processes_hear_that_the_commit_failed(results: dict[str, Any]) -> None:
    found = get(results, "failed_commit")
    assert all("rank_00001.json" in text for text in found["unseen"])
    for messages, step in ((found["messages"], 2), (found["unseen"], 2), (found["starts"], 3)):
        assert all(f"step-0000000{step} was not written" in text and "process 0: " in text for text in messages)
    assert found["left"] == ["step-00000001"]


def test_processes_at_different_steps_are_told_so(results: dict[str, Any]) -> None:
    found = get(results, "different_steps")
    for message in found["messages"]:
        assert "must save the same step, got process 0: 10, process 1: 11" in message
    assert found["left"] == []


def test_damage_that_one_process_meets_stops_both_with_one_message(results: dict[str, Any]) -> None:
    found = get(results, "damage")
    first, second = found["messages"]
    assert first == second and first.startswith("StorageError: ")
    assert "rank_00001.safetensors: checksum" in first and "resume=" in first and first.endswith("check_damage@1")
    assert found["loaded"] == 0.0


def test_leftovers_of_killed_saves_are_removed(results: dict[str, Any]) -> None:
    found = get(results, "leftovers")
    assert found["left"] == ["step-00000001"]
    assert len(found["files"]) == 5 and "stray.json" not in found["files"]


def test_other_decays_start_or_are_dropped_with_a_warning(results: dict[str, Any]) -> None:
    found = get(results, "other_decays")
    assert found["ema"] == ["ema_0.9", "ema_0.5"]
    assert "holds no ema_0.99; it starts from the loaded weights" in found["told"][0]
    assert "ema_0.9 of " in found["told"][1] and "is dropped" in found["told"][1]
    assert max(found["kept"]) == 0.0 and max(found["started"]) == 0.0
