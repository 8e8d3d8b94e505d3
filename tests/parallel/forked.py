"""Worlds of a few gloo processes, forked from one that has imported torch: a launch costs milliseconds, not seconds.

The rendezvous store lives in a process of its own, as torchrun's agent keeps it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

_PR_SET_PDEATHSIG = 1


@dataclass
class World:
    """Running processes of one case, and the one that hosts their store."""

    folder: Path
    store: int
    pids: list[int] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)


def fork(body: Callable[[], None], log: Path) -> int:
    """Run a function in a child whose stderr is a file; exit code 1 and a traceback if it raises.

    The child is killed when its parent ends: one that hangs outlives no tests.
    """
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr, force=True)
        body()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def prepare(folder: Path) -> World:
    """Start the store of a world; returns before it is there, so that those of many worlds start together."""
    folder.mkdir(parents=True)
    return World(folder, fork(lambda: _host_store(folder / "port"), folder / "store"))


def launch(world: World, body: Callable[[int], None], *, world_size: int, attempts: int = 1) -> None:
    """Start the processes of a world; each writes ``log<rank>``.

    Args:
        world: Has a store so far.
        body: What each process does, by rank.
        world_size: Number of processes.
        attempts: With more than one, a process that fails is started again, against the same store.
    """
    while not (world.folder / "port").exists():
        time.sleep(0.01)
    port = (world.folder / "port").read_text()

    def run(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "STORE_PID": str(world.store),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        code = 0
        for attempt in range(attempts):
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
            if attempts == 1:
                body(rank)
                return
            child = fork(lambda: body(rank), world.folder / f"log{rank}-{attempt}")
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == 0:
                return
        sys.exit(code)

    world.began = time.monotonic()
    for rank in range(world_size):
        world.pids.append(fork(lambda rank=rank: run(rank), world.folder / f"log{rank}"))


def collect(worlds: Iterable[World], *, grace_s: float = 5.0, limit_s: float = 40.0) -> list[list[tuple[int, float]]]:
    """Wait for the processes of worlds that run side by side, and end their stores.

    Args:
        worlds: Their stores are ended too.
        grace_s: As a launcher does: seconds after the first failure of a world at which the rest of it is killed.
        limit_s: Seconds after which a world is killed anyway.

    Returns:
        By world and rank: exit code (negative for a signal) and seconds since the start of the world.
    """
    worlds = list(worlds)
    left = {(index, rank) for index, world in enumerate(worlds) for rank in range(len(world.pids))}
    ends = [[(0, 0.0)] * len(world.pids) for world in worlds]
    deadlines = [world.began + limit_s for world in worlds]
    while left:
        for index, rank in sorted(left):
            world, now = worlds[index], time.monotonic()
            late = now > deadlines[index]
            if late:
                os.kill(world.pids[rank], signal.SIGKILL)
            found, status = os.waitpid(world.pids[rank], 0 if late else os.WNOHANG)
            if found:
                left.remove((index, rank))
                ends[index][rank] = (os.waitstatus_to_exitcode(status), now - world.began)
                if status:
                    deadlines[index] = min(deadlines[index], now + grace_s)
        time.sleep(0.02)
    for world in worlds:
        os.kill(world.store, signal.SIGKILL)
        os.waitpid(world.store, 0)
    return ends


def _host_store(port: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.with_suffix(".new").write_text(str(store.port))
    port.with_suffix(".new").rename(port)
    time.sleep(300)
