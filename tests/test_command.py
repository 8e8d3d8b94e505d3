"""Exit codes: a user's mistake is one line, a bug keeps its traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ltd.command import command_line, naming
from ltd.config import ConfigError
from ltd.storage import StorageError, StorageWriteError

ROOT = Path(__file__).resolve().parents[1]


class Fatal(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("a"), 2), (StorageError("a"), 2), (StorageWriteError("a"), 1), (Fatal("a"), 1)],
)
def test_known_errors_end_with_one_line(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, command_line(Fatal):
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == "error: a\n"


def test_anything_else_is_a_bug_and_stays_one() -> None:
    with pytest.raises(ValueError, match="bug"), command_line(Fatal):
        raise ValueError("bug")
    with pytest.raises(Fatal), command_line():
        raise Fatal


_TORN = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import torch
from ltd.command import leave

def multiply():
    factor = torch.ones(300, 300)
    while True:
        factor @ factor

def last():
    time.sleep(0.3)
    print("thread")

for _ in range(3):
    threading.Thread(target=multiply, daemon=True).start()
ThreadPoolExecutor(1).submit(last)
threading.Thread(target=last).start()
atexit.register(lambda: print("atexit"))
print("main")
leave(3)
"""


def test_leaving_ends_orderly_and_tears_no_thread_out_of_native_code() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TORN], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "main\nthread\nthread\natexit\n", "")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("data.shards: got '/a/data.shards': no such path", "--shards: got '/a/data.shards': no such path"),
        ("data.views[0]: got 9; change data.views or data.shards.", "--size: got 9; change --size or --shards."),
        ("data.shards_of: a field of another name", "data.shards_of: a field of another name"),
        ("data.shards.more: a field inside", "data.shards.more: a field inside"),
    ],
)
def test_mistakes_name_the_options_that_were_typed(said, wanted):
    with pytest.raises(ConfigError) as caught, naming({"data.shards": "--shards", "data.views": "--size"}):
        raise ConfigError(said)
    assert str(caught.value) == wanted
