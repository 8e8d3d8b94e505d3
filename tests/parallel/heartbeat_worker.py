"""Runs that go wrong in every way the heartbeat knows, all side by side; writes what each process said and when."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ltd.command import command_line
from ltd.config import ConfigError
from ltd.parallel import Layout, ParallelConfig
from ltd.parallel.heartbeat import Heartbeat, is_lost_peer
from tests.parallel import forked

SLOW_S, TIMEOUT_S, STEPS = 2.0, 6.0, 3

Action = Callable[[int, str, int], None]


def train(act: Action, *, joined: bool = True) -> None:
    """Take steps of phases as the loop does; ``act`` is called in each, before the collective that ends it."""
    layout = Layout.from_environment(ParallelConfig(slow_s=SLOW_S, timeout_s=TIMEOUT_S))
    try:
        with Heartbeat(layout, slow_s=SLOW_S, timeout_s=TIMEOUT_S) as beat:
            try:
                for step in range(1, STEPS + 1):
                    for phase in ("data", "forward", "backward", "optimizer"):
                        beat.enter(phase, step)
                        act(layout.global_rank, phase, step)
                        if joined and phase != "forward":
                            layout.sum_(torch.ones(4))
            except RuntimeError as error:
                if not is_lost_peer(error):
                    raise
                sys.stderr.write(f"explained: {beat.explain()}\n")
                raise
    finally:
        layout.close()


def at(rank: int, phase: str, step: int, action: Callable[[], object]) -> Action:
    """Act on one rank in one phase of one step."""
    return lambda *place: None if place != (rank, phase, step) else (action(), None)[1]


def stop_itself() -> None:
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_itself() -> None:
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(28, "No space left on device", "metrics.jsonl")


def refuse() -> None:
    """Raise a user's error on all processes, a second apart, as a command does."""

    def act(rank: int, phase: str, step: int) -> None:
        time.sleep(float(rank))
        raise ConfigError(f"optim.lr: must be positive, found by process {rank}")

    with command_line():
        train(act)


def hang_once() -> None:
    # The second attempt stands still for longer than a last word leaves it.
    time.sleep(60 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 4.5)


def freeze_store() -> None:
    time.sleep(1.0)
    os.kill(int(os.environ["STORE_PID"]), signal.SIGSTOP)
    time.sleep(60)


def sleep(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def cases() -> dict[str, tuple[int, Callable[[int], None]]]:
    """World size and what each process does, by case."""
    slow = at(1, "data", 2, sleep(SLOW_S + 2.0))
    finish = at(0, "optimizer", STEPS, sleep(TIMEOUT_S + 1.5))
    return {
        "slow": (2, lambda rank: train(slow)),
        "hung": (3, lambda rank: train(at(1, "data", 2, sleep(60)))),
        "killed": (3, lambda rank: train(at(1, "backward", 2, kill_itself))),
        "failed": (2, lambda rank: train(at(0, "optimizer", 2, fail))),
        # The other computes on: no collective tells it.
        "failed-apart": (2, lambda rank: train(_both(at(0, "data", 2, fail), at(1, "data", 2, sleep(60))))),
        "frozen": (2, lambda rank: train(at(1, "backward", 2, stop_itself))),
        "main-frozen": (2, lambda rank: train(at(0, "backward", 2, stop_itself))),
        "refused": (2, lambda rank: refuse()),
        "finished": (2, lambda rank: train(finish, joined=False)),
        "exited": (2, lambda rank: train(_both(finish, at(1, "optimizer", STEPS, sys.exit)), joined=False)),
        "store": (2, lambda rank: train(at(1, "data", 2, freeze_store))),
        "again": (2, lambda rank: train(at(1, "data", 2, hang_once))),
        # Longer than the time-out, by all: nobody waits for that long.
        "long": (2, lambda rank: train(_work_long)),
        "led": (3, lambda rank: _lead(_work_in_steps)),
        "led-hung": (3, lambda rank: _lead(_hang_after_a_step)),
        "crossed": (2, lambda rank: _cross()),
    }


def _both(first: Action, second: Action) -> Action:
    return lambda *place: (first(*place), second(*place), None)[2]


def _work_long(rank: int, phase: str, step: int) -> None:
    if (phase, step) == ("forward", 2):
        time.sleep(TIMEOUT_S + (1.0 if rank else 2.5))


def _lead(work: Callable[[Callable[[], None]], float]) -> None:
    """Let the main process work for longer than the time-out while the others wait."""
    layout = Layout.from_environment(ParallelConfig(slow_s=SLOW_S, timeout_s=TIMEOUT_S))
    with Heartbeat(layout, slow_s=SLOW_S, timeout_s=TIMEOUT_S) as beat:
        beat.enter("evaluate", 7)
        sys.stderr.write(f"found {layout.lead(work, beat.again)}\n")
    layout.close()


def _work_in_steps(step: Callable[[], None]) -> float:
    for _ in range(13):
        time.sleep(1.0)
        step()
    return 0.25


def _hang_after_a_step(step: Callable[[], None]) -> float:
    step()
    time.sleep(60)
    return 0.25


def _cross() -> None:
    """Wait in collectives that do not meet: one process gathers within its group of one more than the other sums."""
    layout = Layout.from_environment(ParallelConfig(slow_s=SLOW_S, timeout_s=TIMEOUT_S, sequence=2))
    with Heartbeat(layout, slow_s=SLOW_S, timeout_s=TIMEOUT_S) as beat:
        beat.enter("save", 7)
        if layout.global_rank == 0:
            layout.sum_(torch.ones(4))
        else:
            layout.gather_sequence(torch.ones(4))


def main(out: Path, folder: Path) -> None:
    worlds = {name: forked.prepare(folder / name) for name in cases()}
    for name, (size, body) in cases().items():
        forked.launch(worlds[name], body, world_size=size, attempts=2 if name == "again" else 1)
    found = {
        name: {"ends": ends, "logs": {path.name: path.read_text() for path in sorted((folder / name).glob("log*"))}}
        for (name, ends) in zip(worlds, forked.collect(worlds.values()), strict=True)
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
