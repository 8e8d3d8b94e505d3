"""Who is named when a run stands still: the rule on written-down states, and the whole on processes that go wrong."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ltd.parallel import Layout, ParallelConfig
from ltd.parallel.heartbeat import Heartbeat, is_lost_peer
from ltd.parallel.layout import name_ranks
from ltd.parallel.pulse import Pulse, judge, locate
from tests.parallel.heartbeat_worker import TIMEOUT_S

ROOT = Path(__file__).resolve().parents[2]


def pulse(entered: int, *, waits: bool = False, collectives: int = 0, **changes: Any) -> Pulse:
    phase = ("data", "forward", "backward")[entered % 3]
    said = {
        "beats": 1,
        "step": 5,
        "seconds": 61.0,
        "still_s": 40.0,
        "where": "read, ltd/data/fetch.py:8",
        "host": "a",
        "phase": phase,
    }
    rank = {"local_rank": 0, "pid": 9, "entered": entered, "waits": waits, "collectives": collectives}
    return Pulse(**{**said, **rank, **changes})


def test_the_one_with_the_fewest_phases_is_behind() -> None:
    found = judge({rank: pulse(2, waits=True) for rank in (0, 1, 2, 4, 5)} | {3: pulse(0, host="gpu-7")}, ())
    assert (found.kind, found.ranks) == ("behind", [3])
    assert found.message == (
        "process 3 (host gpu-7, local rank 0, pid 9) has been in `data` of step 5 for 61 s "
        "(read, ltd/data/fetch.py:8); waiting: processes 0-2, 4-5 in `backward` of step 5"
    )


def test_waiting_counts_from_when_the_others_came() -> None:
    """A phase that is long for all is no wait; the process that is last in it is waited for since the first left it."""
    late = {0: pulse(1, still_s=2.0, waits=True), 1: pulse(1, still_s=5.0, waits=True), 2: pulse(0, still_s=900.0)}
    assert judge(late, ()).waited_s == 5.0
    assert judge({0: pulse(0, still_s=900.0), 1: pulse(0, still_s=900.0)}, ()).waited_s == 0.0
    assert judge({0: pulse(0, waits=True, still_s=9.0), 1: pulse(0, waits=True, still_s=3.0)}, ()).waited_s == 3.0


def test_within_one_phase_collectives_tell() -> None:
    waiting = {rank: pulse(1, waits=True) for rank in (0, 2)}
    assert judge({**waiting, 1: pulse(1)}, ()).ranks == [1], "the one outside of a collective"
    began = {rank: pulse(1, collectives=8) for rank in (0, 2)}  # a device runs on: nobody is seen to wait
    assert judge({**began, 1: pulse(1, collectives=7)}, ()).ranks == [1], "the one that began fewer"


def test_silence_counts_before_slowness() -> None:
    found = judge({0: pulse(1, waits=True), 1: pulse(0), 2: pulse(1)}, {2, 3})
    assert (found.kind, found.ranks) == ("lost", [2, 3])
    assert "process 2 (host a, local rank 0, pid 9), last seen in `forward` of step 5" in found.message
    assert "process 3, which never said anything" in found.message
    many = judge({0: pulse(0)}, set(range(1, 2000)))
    assert "and 1995 more (5-1999)" in many.message and len(many.message) < 400


def test_who_left_is_neither_lost_nor_behind() -> None:
    pulses = {0: pulse(7), 1: pulse(3, ended=True)}
    assert judge(pulses, {1}).kind == "busy"


def test_nobody_is_named_where_nobody_waits_for_another() -> None:
    assert judge({0: pulse(3), 1: pulse(3)}, ()).kind == "busy"
    crossed = judge({0: pulse(3, waits=True, where="sum_"), 1: pulse(3, waits=True, where="gather")}, ())
    assert crossed.kind == "crossed"
    assert "process 0 in `data` of step 5 (sum_), process 1 in `data` of step 5 (gather)" in crossed.message


def test_an_error_of_a_lost_peer_is_told_from_others() -> None:
    assert is_lost_peer(RuntimeError("[transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"))
    assert is_lost_peer(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(RuntimeError("data server http://media:80: Connection refused"))
    assert not is_lost_peer(ConnectionResetError(104, "Connection reset by peer"))
    assert not is_lost_peer(torch.OutOfMemoryError("CUDA out of memory"))


def test_ranks_in_short() -> None:
    assert name_ranks([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"


def test_a_thread_is_located() -> None:
    where, waits = locate(threading.get_ident())
    assert where.startswith("locate, ltd/parallel/pulse.py:") and not waits
    assert locate(0) == ("", False)


def test_collectives_are_counted() -> None:
    layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)
    layout.sum_(torch.ones(1))
    layout.sum_(torch.ones(1))
    assert layout.collectives == 2


def test_one_process_is_warned_and_never_ended(caplog: pytest.LogCaptureFixture) -> None:
    layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)
    with (
        caplog.at_level(logging.INFO, logger="ltd.parallel.heartbeat"),
        Heartbeat(layout, slow_s=0.2, timeout_s=0.4) as beat,
    ):
        beat.enter("data", 3)
        time.sleep(1.0)
    assert len(caplog.records) == 1 and "`data` of step 3" in caplog.text


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("heartbeat")
    out = folder / "out.json"
    command = [sys.executable, "-m", "tests.parallel.heartbeat_worker", str(out), str(folder / "worlds")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # torch looks up its peer's name as it connects; a name service that does not answer costs 5 s otherwise.
    environment["RES_OPTIONS"] = "timeout:1 attempts:1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(out.read_text())


def codes(case: dict[str, Any]) -> list[int]:
    return [code for code, _ in case["ends"]]


def lines(case: dict[str, Any], rank: int, start: str, attempt: str = "") -> list[str]:
    return [line for line in case["logs"][f"log{rank}{attempt}"].splitlines() if line.startswith(start)]


def alarms(case: dict[str, Any], rank: int) -> list[str]:
    """What the process logged; torch's own lines, as of a name service that does not answer, begin otherwise."""
    return lines(case, rank, "WARNING") + lines(case, rank, "ERROR") + lines(case, rank, "Traceback")


dist = pytest.mark.dist
slow = pytest.mark.slow


@dist
@slow
def test_slow_process_is_named_once_and_training_goes_on(cases: dict[str, Any]) -> None:
    case = cases["slow"]
    assert codes(case) == [0, 0]
    (warning,) = lines(case, 0, "WARNING")
    assert "process 1 (" in warning and "has been in `data` of step 2" in warning and "heartbeat_worker.py" in warning
    assert "waiting: process 0 in `data` of step 2" in warning
    assert not lines(case, 1, "WARNING")


@dist
@slow
def test_hang_ends_every_process_with_the_name(cases: dict[str, Any]) -> None:
    case = cases["hung"]
    assert codes(case) == [1, 1, 1]
    for rank, (_, seconds) in enumerate(case["ends"]):
        (error,) = lines(case, rank, "ERROR")
        assert "parallel.timeout_s = 6 s" in error
        assert "process 1 (" in error and "has been in `data` of step 2" in error
        assert TIMEOUT_S <= seconds < TIMEOUT_S + 8


@dist
@slow
def test_killed_process_is_named_by_all_others(cases: dict[str, Any]) -> None:
    case = cases["killed"]
    assert codes(case) == [1, -9, 1]
    for rank in (0, 2):
        (explained,) = lines(case, rank, "explained: ")
        assert "lost" in explained and "process 1 (" in explained and "`backward` of step 2" in explained
        assert "process 0" not in explained and "process 2" not in explained


@dist
@slow
@pytest.mark.parametrize(("name", "start"), [("failed", "explained: "), ("failed-apart", "ERROR")])
def test_last_word_reaches_the_others(cases: dict[str, Any], name: str, start: str) -> None:
    case = cases[name]
    assert codes(case) == [1, 1]
    (said,) = lines(case, 1, start)
    phase = "optimizer" if name == "failed" else "data"
    assert f"ended in `{phase}` of step 2 with OSError" in said and "No space left on device: 'metrics.jsonl'" in said
    assert case["ends"][1][1] < TIMEOUT_S + case["ends"][0][1], "at once, not at the time-out"


@dist
@slow
def test_frozen_process_is_named(cases: dict[str, Any]) -> None:
    case = cases["frozen"]
    assert codes(case) == [1, -9]
    (error,) = lines(case, 0, "ERROR")
    assert "lost (dead, frozen or cut off): process 1 (" in error and "`backward` of step 2" in error


@dist
@slow
def test_frozen_main_process_is_named_by_another(cases: dict[str, Any]) -> None:
    case = cases["main-frozen"]
    assert codes(case) == [-9, 1]
    (error,) = lines(case, 1, "ERROR")
    assert "lost (dead, frozen or cut off): process 0 (" in error and "`backward` of step 2" in error


@dist
@slow
def test_an_error_of_all_leaves_each_its_own_message(cases: dict[str, Any]) -> None:
    case = cases["refused"]
    assert codes(case) == [2, 2]
    for rank in (0, 1):
        assert lines(case, rank, "error:") == [f"error: optim.lr: must be positive, found by process {rank}"]
        assert not alarms(case, rank)


@dist
@slow
@pytest.mark.parametrize("name", ["finished", "exited"])
def test_no_alarm_where_processes_finish_apart(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert codes(case) == [0, 0]
    assert case["ends"][0][1] - case["ends"][1][1] > TIMEOUT_S / 2
    assert not alarms(case, 0) and not alarms(case, 1)


@dist
@slow
def test_long_phase_of_all_is_no_hang(cases: dict[str, Any]) -> None:
    case = cases["long"]
    assert codes(case) == [0, 0]
    assert case["ends"][0][1] > TIMEOUT_S
    assert not alarms(case, 0) and not alarms(case, 1)


@dist
@slow
def test_long_work_of_the_main_process_is_no_hang_as_long_as_it_steps(cases: dict[str, Any]) -> None:
    case = cases["led"]
    assert codes(case) == [0, 0, 0]
    assert case["ends"][0][1] > 2 * TIMEOUT_S, "longer than the others' patience, which is some seconds more"
    for rank in range(3):
        assert lines(case, rank, "found") == ["found 0.25"] and not alarms(case, rank)


@dist
@slow
def test_main_process_that_hangs_in_such_work_is_named(cases: dict[str, Any]) -> None:
    case = cases["led-hung"]
    assert codes(case) == [1, 1, 1]
    (error,) = lines(case, 0, "ERROR")
    assert "process 0 (" in error and "`evaluate` of step 7" in error and "lead, ltd/parallel/layout.py" in error
    assert "waiting: processes 1-2" in error


@dist
@slow
def test_silent_store_is_named(cases: dict[str, Any]) -> None:
    case = cases["store"]
    assert codes(case) == [1, 1]
    for rank in (0, 1):
        (error,) = lines(case, rank, "ERROR")
        assert "the rendezvous store at 127.0.0.1:" in error and "does not answer" in error


@dist
@slow
def test_collectives_that_do_not_meet_are_located(cases: dict[str, Any]) -> None:
    (error,) = lines(cases["crossed"], 0, "ERROR")
    assert "process 0 in `save` of step 7 (sum_, ltd/parallel/layout.py:" in error
    assert "process 1 in `save` of step 7 (gather_sequence, ltd/parallel/layout.py:" in error


@dist
@slow
def test_restart_hears_nothing_of_the_attempt_before(cases: dict[str, Any]) -> None:
    case = cases["again"]
    assert codes(case) == [0, 0]
    assert lines(case, 0, "ERROR", "-0")
    assert not lines(case, 0, "ERROR", "-1") and not lines(case, 1, "ERROR", "-1")
