"""Kill random processes of a run at random moments, many times, and compare with the run that nobody touched."""

from __future__ import annotations

import functools
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ltd import storage
from tools.proofs import _runs
from tools.proofs._chaos_worker import Note, read_note
from tools.proofs.table import Cell, Proof

NAME = "chaos"
PROCESSES = 2
STEPS, EVERY = 300, 5
#: What must be reached.
LEAST_KILLS, LEAST_IN_SAVES = 20, 5
LAYOUT = ("parallel.zero=2",)
OVERRIDES = ("ema.decays=[0.9,0.99]", "evaluation.every=50")
LAUNCHER = ("--max-restarts", "1000", "--monitor-interval", "0.1")
_LOST = re.compile(r"^error: .*?process (\d+) \([^)]*\).*? in (`\w+`(?: of step \d+)?)", re.MULTILINE)


@dataclass(frozen=True)
class Plan:
    """When to kill whom, drawn before the run."""

    #: ``step``: some steps after the restart; ``save``: as soon as a checkpoint is being written; ``start``: before
    #: training goes on.
    moment: Literal["step", "save", "start"]
    #: Process; None is all of them and the launcher, which is then started anew.
    rank: int | None
    #: Steps of progress before, or saves that are let pass.
    patience: int
    #: Seconds after that.
    delay_s: float


@dataclass(frozen=True)
class Kill:
    """One kill as it happened."""

    rank: int | None
    #: What the process was in; of all processes, the first one.
    phase: str
    #: Step the process was in; None before it trained.
    step: int | None
    #: Whether a checkpoint was being written by the time of the kill and still was not whole when the process was dead.
    in_save: bool
    #: Step of the checkpoint that training went on from; 0 is from the start.
    resumed_at: int
    #: Process and phase that a survivor named; None if the launcher ended it before it could.
    named: str | None


@dataclass
class Comparison:
    """What the killed run has in common with the untouched one."""

    kills: list[Kill] = field(default_factory=list)
    num_rows: int = 0
    different_rows: list[int] = field(default_factory=list)
    different_shards: list[str] = field(default_factory=list)
    num_shards: int = 0
    groups: list[str] = field(default_factory=list)
    keys_hashes: tuple[str, str] = ("", "")

    @property
    def in_saves(self) -> int:
        """Count the kills while a checkpoint was being written."""
        return sum(kill.in_save for kill in self.kills)


def draw_plans(*, steps: int, saves: int, starts: int, everything: int, seed: int = 0) -> list[Plan]:
    """Draw a schedule.

    Args:
        steps: Kills of one process some steps after a restart.
        saves: Kills of one process in a save.
        starts: Kills of one process before training goes on.
        everything: Kills of all processes and the launcher.
        seed: Seed.

    Returns:
        The plans, in random order.
    """
    source = random.Random(seed)
    one = functools.partial(source.randrange, PROCESSES)
    plans = [Plan("step", one(), source.randint(0, 20), source.random() * 0.1) for _ in range(steps)]
    plans += [Plan("save", one(), source.randint(0, 1), source.random() * 0.01) for _ in range(saves)]
    plans += [Plan("start", one(), 0, source.random() * 10) for _ in range(starts)]
    plans += [Plan("step", None, source.randint(0, 20), source.random() * 0.1) for _ in range(everything)]
    source.shuffle(plans)
    return plans


class Driver:
    """Watch a run from outside and kill its processes by plan.

    Args:
        start: Starts the run.
        run_dir: Its directory.
        notes: Folder of its processes' notes.
    """

    def __init__(self, start: Callable[[], _runs.Launched], run_dir: Path, notes: Path) -> None:
        self.start, self.run_dir, self.notes = start, run_dir, notes
        self.run = start()
        self.workers: dict[int, int] = {}

    def kill(self, plan: Plan) -> Kill:
        """Wait for the plan's moment, kill, and wait until the launcher has started new processes.

        Args:
            plan: The plan.

        Returns:
            What happened.

        Raises:
            RuntimeError: If the run ended before the moment came.
        """
        self._wait_for_workers()
        saving = self._await(plan)
        printed = self.run.log.stat().st_size
        rank = plan.rank or 0
        pid = self.workers[rank]
        if plan.rank is None:
            self.run.kill()
        else:
            _runs.send(pid, signal.SIGKILL)
            _runs.wait_for(lambda: _runs.is_dead(pid), self.run, "the end of a killed process", pause_s=0.0005)
        unfinished = saving is not None and saving.is_dir()
        note = read_note(self.notes, rank) or Note(0, 0, "")
        if plan.rank is not None:
            survivors = self.workers.values()
            _runs.wait_for(lambda: all(map(_runs.is_dead, survivors)), self.run, "the end of the survivors")
        newest = storage.latest_checkpoint(self.run_dir)
        resumed_at = 0 if newest is None else storage.checkpoint_step(newest)
        phase, step = (note.phase, note.step) if note.pid == pid else ("import", 0)
        lost = _LOST.search(self.run.output(printed))
        named = f"process {lost[1]} in {lost[2]}" if lost else None
        if plan.rank is None:
            self.run = self.start()
        # Before the first step, what an earlier kill left may still be there.
        return Kill(plan.rank, phase, step or None, unfinished and step > 0, resumed_at, named)

    def _wait_for_workers(self) -> None:
        def all_there() -> bool:
            self.workers = self.run.workers()
            return len(self.workers) == PROCESSES

        _runs.wait_for(all_there, self.run, "a start of all processes", pause_s=0.05)

    def _await(self, plan: Plan) -> Path | None:
        """Wait for the moment; returns the checkpoint that is being written then."""
        if plan.moment == "start":
            time.sleep(plan.delay_s)
            return self._saving()
        _runs.wait_for(lambda: self._step() > 0, self.run, "a first step", pause_s=0.01)
        first = self._step()
        if plan.moment == "step":
            _runs.wait_for(lambda: self._step() >= first + plan.patience, self.run, "a step", pause_s=0.001)
            time.sleep(plan.delay_s)
            return self._saving()
        passed: list[Path | None] = [None]
        while True:
            _runs.wait_for(lambda: self._saving() not in passed, self.run, "a save", pause_s=0.0005)
            time.sleep(plan.delay_s)
            saving = self._saving()
            if saving is not None and len(passed) > plan.patience:
                return saving
            passed.append(saving)

    def _step(self) -> int:
        """Look up the step of the slowest process; 0 while one is not in training."""
        notes = [read_note(self.notes, rank) for rank in range(PROCESSES)]
        steps = [note.step for note in notes if note is not None and note.pid in self.workers.values()]
        return min(steps) if len(steps) == PROCESSES else 0

    def _saving(self) -> Path | None:
        folder = self.run_dir / "checkpoints"
        return next(iter(folder.glob("step-*.incomplete")), None) if folder.is_dir() else None


def train_untouched(folder: Path, *, steps: int = STEPS, every: int = EVERY) -> list[str]:
    """Make data and train once in ``folder / "whole"``.

    Args:
        folder: Scratch folder.
        steps: Steps of the run.
        every: Steps between checkpoints.

    Returns:
        Overrides of the run, apart from its layout.
    """
    overrides = [*OVERRIDES, f"steps={steps}", f"checkpoint.every={every}", *_runs.make_data(folder / "toy")]
    arguments = [_runs.DEBUG_CONFIG, f"run_dir={folder / 'whole'}", *LAYOUT, *overrides]
    _runs.start(PROCESSES, arguments, folder / "whole.txt").wait()
    return overrides


def compare(plans: Sequence[Plan], folder: Path, overrides: Sequence[str], *, steps: int = STEPS) -> Comparison:
    """Train again, with kills under a launcher that restarts, and compare.

    Args:
        plans: The kills.
        folder: Scratch folder of ``train_untouched``.
        overrides: What it gave.
        steps: Steps of the run.

    Returns:
        The comparison.

    Raises:
        RuntimeError: If the run ended before all kills were done, or failed.
    """
    whole, killed, notes = folder / "whole", folder / "killed", folder / "notes"
    notes.mkdir()

    def start() -> _runs.Launched:
        return _runs.start(
            PROCESSES,
            [str(notes), _runs.DEBUG_CONFIG, f"run_dir={killed}", *LAYOUT, *overrides],
            folder / "killed.txt",
            program=("-m", "tools.proofs._chaos_worker"),
            launcher=LAUNCHER,
        )

    driver = Driver(start, killed, notes)
    try:
        kills = [driver.kill(plan) for plan in plans]
        driver.run.wait()
    finally:
        driver.run.kill()
    changed, num_shards = _runs.different_shards(whole, killed, steps)
    return Comparison(
        kills,
        len(_runs.rows(killed)),
        _runs.different_rows(whole, killed),
        changed,
        num_shards,
        sorted(storage.Reader(storage.checkpoint_path(killed, steps)).groups()),
        (_runs.rows(whole)[-1]["data/keys_hash"], _runs.rows(killed)[-1]["data/keys_hash"]),
    )


def misses_of(found: Comparison, *, steps: int, kills: int, in_saves: int) -> list[str]:
    """List what was not reached.

    Args:
        found: The comparison.
        steps: Steps that the run must have.
        kills: Kills that there must be.
        in_saves: Kills that must have met a save.

    Returns:
        One line per miss.
    """
    checks = {
        f"{len(found.kills)} kills, needed {kills}": len(found.kills) >= kills,
        f"{found.in_saves} kills in saves, needed {in_saves}": found.in_saves >= in_saves,
        f"{found.num_rows} rows, needed {steps}": found.num_rows == steps,
        f"rows that differ: steps {found.different_rows}": not found.different_rows,
        f"shards that differ: {found.different_shards}": found.num_shards > 0 and not found.different_shards,
        f"last key hashes {found.keys_hashes}": found.keys_hashes[0] == found.keys_hashes[1],
    }
    return [text for text, held in checks.items() if not held]


def measure() -> Proof:
    """Kill a run of 300 steps two dozen times and compare."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = train_untouched(Path(folder))
        found = compare(draw_plans(steps=12, saves=8, starts=3, everything=2), Path(folder), overrides)
    table: list[Sequence[Cell]] = [
        (
            number,
            "all" if kill.rank is None else str(kill.rank),
            kill.phase,
            kill.step,
            kill.in_save,
            kill.resumed_at,
            kill.named,
        )
        for number, kill in enumerate(found.kills, start=1)
    ]
    named = [kill for kill in found.kills if kill.named is not None and kill.rank is not None]
    right = sum(f"process {kill.rank} " in str(kill.named) for kill in named)
    notes = f"""
{STEPS} steps on {PROCESSES} processes (ZeRO-2, fp32, AdamW, two averages), a checkpoint every {EVERY} written in the
background, under `torchrun --max-restarts`. A driver outside the run sends SIGKILL to one process, chosen at random, at
a moment chosen at random: some steps after a restart, as soon as a save is seen, or seconds after the start. *All* is
both processes and the launcher, which is then started again by the same command.

**{len(found.kills)} kills, {found.in_saves} of them during a save**: `step-*.incomplete` was there before the kill, and
still there, not renamed, once the process was dead. *Phase* and *step* are what the killed process had entered last, by
a note in mapped memory (*import*: it had not begun to build the run); a save runs beside the phases. *The survivor
named* what its error said: the right process in {right} of {len(named)}; the place it names is the one of the last
heartbeat, up to a second old. Nothing where the launcher ended it first.

Compared with the untouched run: {found.num_rows} rows of `metrics.jsonl` (losses, gradient norms, learning rates,
held-out figures, key hashes; not the clocks), {len(found.different_rows)} differ; {found.num_shards} shards of the last
checkpoint ({", ".join(f"`{group}`" for group in found.groups)}), {len(found.different_shards)} differ in any byte;
key hash of the last step:

    untouched {found.keys_hashes[0]}
    killed    {found.keys_hashes[1]}
"""
    columns = ("kill", "process", "phase", "step", "during a save", "resumed at", "the survivor named")
    misses = misses_of(found, steps=STEPS, kills=LEAST_KILLS, in_saves=LEAST_IN_SAVES)
    return Proof("Killed at random moments, a run ends as if nothing had happened", columns, table, misses, notes)
