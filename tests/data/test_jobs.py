from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltd.config import ConfigError
from ltd.data.jobs import run_in_processes, run_in_threads


@pytest.mark.parametrize("num_threads", [1, 3, 20])
def test_every_result_of_every_job_comes_once(num_threads: int) -> None:
    def work(job: int) -> Iterator[tuple[int, int]]:
        yield from ((job, part) for part in range(job))

    found = list(run_in_threads(range(9), work, num_threads=num_threads))
    assert sorted(found) == [(job, part) for job in range(9) for part in range(job)]
    assert num_threads > 1 or found == sorted(found)


def test_jobs_run_at_once_and_no_more_than_asked() -> None:
    running, most, both = [0], [0], threading.Barrier(2, timeout=10)
    lock = threading.Lock()

    def work(job: int) -> Iterator[int]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        both.wait()  # ends only where two run at once
        with lock:
            running[0] -= 1
        yield job

    assert len(list(run_in_threads(range(6), work, num_threads=2))) == 6
    assert most == [2]


def test_the_first_failure_ends_the_others() -> None:
    started: list[int] = []

    def work(job: int) -> Iterator[int]:
        started.append(job)
        if job == 3:
            raise RuntimeError("job 3")
        yield from range(1000)

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="job 3"):
        list(run_in_threads(range(50), work, num_threads=2))
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before and len(started) < 10


def test_a_process_that_dies_is_a_plain_error() -> None:
    with pytest.raises(ConfigError, match="workers: got 1, but one of the processes died"):
        list(run_in_processes([3], os._exit, num_processes=1))


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = """
import os, sys, time
from ltd.data.jobs import run_in_processes
if __name__ == "__main__":
    for _ in run_in_processes([f"{sys.argv[1]}/pid", "/dev/null"], __import__("note").note, num_processes=1):
        time.sleep(100)
"""
    (tmp_path / "note.py").write_text("import os\ndef note(path):\n    open(path, 'a').write(str(os.getpid()))\n")
    (tmp_path / "job.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}"}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "job.py"), str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}")
    assert child.exists()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while child.exists() and "Z" not in (child / "stat").read_text().split() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or "Z" in (child / "stat").read_text().split()
