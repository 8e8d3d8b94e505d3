"""Who is alive, where each process is, and whom the others wait for; beside the collectives, never through them.

A thread of each process tells the rendezvous store once a second which phase of which step its training is in. A
process whose own training does not move reads what the others said: those that entered the fewest phases are the ones
waited for, and one whose thread says nothing new any more is dead or cut off. ``slow_s`` names it, ``timeout_s`` ends
the run with its name. A process that ends by an error leaves a last word, so that the others end with it at once.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ltd.parallel.layout import Layout, name_ranks

logger = logging.getLogger(__name__)

#: Seconds between two publications; longer in large worlds, so that the store has at most 500 to take per second.
_EVERY_S = 1.0
#: Seconds that one exchange with the store may take before it counts as unreachable.
_STORE_S = 10.0
#: What gloo says when a peer is gone or late.
_MARKS = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Connection refused")
#: Seconds that a process has, after another's last word, to end by itself.
_GRACE_S = 5.0


@dataclass(frozen=True)
class Pulse:
    """What a process said of itself."""

    #: Publications so far: a process that lives says more.
    beats: int
    #: Phases entered so far: of processes that wait for each other, the slowest has the fewest.
    entered: int
    phase: str
    step: int
    #: Seconds in the phase when it was said.
    seconds: float
    host: str
    local_rank: int
    pid: int

    @property
    def place(self) -> str:
        """Name the phase and its step."""
        return f"`{self.phase}` of step {self.step}" if self.step else f"`{self.phase}`"


class Heartbeat:
    """Watch over the processes of a run.

    Args:
        layout: This process's position.
        slow_s: Seconds without progress after which the main process names whom it waits for.
        timeout_s: Seconds without progress after which a process that waits for another ends the run.
    """

    def __init__(self, layout: Layout, *, slow_s: float, timeout_s: float) -> None:
        self.layout, self.slow_s, self.timeout_s = layout, slow_s, timeout_s
        self._every_s = max(_EVERY_S, layout.world_size / 500)
        self._beats, self._warned = 0, -1
        self._now: tuple[int, str, int, float] = (0, "start", 0, time.monotonic())
        self._stop = threading.Event()
        self._store: Any = layout.open_store("heartbeat")
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def enter(self, phase: str, step: int) -> None:
        """Note that training goes on with another phase; costs about a microsecond.

        Args:
            phase: ``start``, ``data``, ``forward``, ``backward``, ``optimizer``, ``evaluate`` or ``save``.
            step: Step it belongs to, from 1.
        """
        self._now = (self._now[0] + 1, phase, step, time.monotonic())

    def __enter__(self) -> Heartbeat:
        if self._store is not None:
            self._publish()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._store is not None:
            self._say_last_word(error)
        self._stop.set()
        self._thread.join(timeout=_STORE_S)

    def explain(self) -> str:
        """Say which process was lost, after a collective failed; looks for a few seconds.

        Returns:
            One or two sentences.
        """
        pulses, dead, word = self._look()
        if pulses is None:
            return self._unreachable()
        if word is not None and not dead:
            return word
        return describe(pulses, dead, self.layout.global_rank)

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            entered, phase, step, since = self._now
            idle_s = time.monotonic() - since
            if self._store is None:
                self._watch_alone(entered, phase, step, idle_s)
                continue
            reachable = self._within(self._publish)
            word = self._within(self._last_word) if reachable else None
            if word:
                self._end_after(word, entered)
            elif idle_s > self.timeout_s:
                self._end_if_waiting(entered)
            elif idle_s > self.slow_s and self.layout.is_main and self._warned != entered:
                self._warned = entered
                pulses, dead, _ = self._look()
                logger.warning("%s", self._unreachable() if pulses is None else describe(pulses, dead, 0))

    def _watch_alone(self, entered: int, phase: str, step: int, idle_s: float) -> None:
        if idle_s > self.slow_s and self._warned != entered:
            self._warned = entered
            logger.warning("no progress for %.0f s: training is in `%s` of step %d", idle_s, phase, step)

    def _end_after(self, word: str, entered: int) -> None:
        """End this process if it still hangs in a collective some seconds after another said its last word."""
        if not self._stop.wait(_GRACE_S) and self._now[0] == entered:
            _end(word)

    def _end_if_waiting(self, entered: int) -> None:
        pulses, dead, word = self._look()
        if self._stop.is_set() or self._now[0] != entered:
            return
        if pulses is None:
            _end(f"no progress for {self.timeout_s:g} s: {self._unreachable()}")
        elif word is not None:
            _end(word)
        elif dead or len({pulse.entered for pulse in pulses.values()}) > 1:
            _end(
                f"no progress for parallel.timeout_s = {self.timeout_s:g} s: "
                f"{describe(pulses, dead, self.layout.global_rank)}"
            )
        # All alive and in one phase: a long evaluation or compilation, or a collective that its own time-out ends.

    def _look(self) -> tuple[dict[int, Pulse] | None, set[int], str | None]:
        """Read all processes twice; None for the pulses where the store does not answer."""
        before = self._within(self._read)
        if before is None:
            return None, set(), None
        deadline = time.monotonic() + 3 * self._every_s
        while time.monotonic() < deadline:  # this process's own thread may be the one that is looking
            time.sleep(self._every_s / 2)
            self._within(self._publish)
        after = self._within(self._read)
        if after is None:
            return None, set(), None
        dead = {rank for rank, pulse in after.items() if rank in before and pulse.beats == before[rank].beats}
        # Where they were when training stood still: it may go on while this looks.
        return before, dead - {self.layout.global_rank}, self._within(self._last_word) or None

    def _publish(self) -> bool:
        entered, phase, step, since = self._now
        self._beats += 1
        seconds = time.monotonic() - since
        pulse = Pulse(
            self._beats, entered, phase, step, seconds, socket.gethostname(), self.layout.local_rank, os.getpid()
        )
        self._store.set(str(self.layout.global_rank), json.dumps(asdict(pulse)))
        return True

    def _read(self) -> dict[int, Pulse]:
        ranks = [rank for rank in range(self.layout.world_size) if self._store.check([str(rank)])]
        values = self._store.multi_get([str(rank) for rank in ranks])
        return {rank: Pulse(**json.loads(value)) for rank, value in zip(ranks, values, strict=True)}

    def _last_word(self) -> str:
        return self._store.get("last word").decode() if self._store.check(["last word"]) else ""

    def _say_last_word(self, error: BaseException) -> None:
        first_line = (str(error).splitlines() or [""])[0][:500]
        _, phase, step, _ = self._now
        pulse = Pulse(0, 0, phase, step, 0.0, socket.gethostname(), self.layout.local_rank, os.getpid())
        word = (
            f"process {self.layout.global_rank} ({_where(pulse)}) ended in {pulse.place} with "
            f"{type(error).__name__}: {first_line}"
        )
        self._within(lambda: self._store.compare_set("last word", "", word))

    def _within(self, action: Callable[[], Any]) -> Any:
        """Run an exchange with the store in a thread of its own: one whose host is cut off would block for ever."""
        result: list[Any] = []

        def run() -> None:
            try:
                result.append(action())
            except Exception as error:  # whatever the store's client raises, it did not answer
                logger.debug("heartbeat: %s", error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(_STORE_S)
        return result[0] if result else None

    def _unreachable(self) -> str:
        return (
            f"the rendezvous store at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} does not answer: "
            "that host, the one of process 0, is dead or cut off from here"
        )


def describe(pulses: Mapping[int, Pulse], dead: Iterable[int], global_rank: int) -> str:
    """Say who is dead or behind, where, and who waits.

    Args:
        pulses: What each process said last.
        dead: Processes that say nothing new.
        global_rank: This process, which is alive.

    Returns:
        One or two sentences.
    """
    dead = sorted(dead)
    if dead:
        shown = "; ".join(f"process {rank} ({_where(pulses[rank])}) in {pulses[rank].place}" for rank in dead[:4])
        more = f" and {len(dead) - 4} more ({name_ranks(dead[4:])})" if len(dead) > 4 else ""
        return f"lost (dead, frozen or cut off), last seen: {shown}{more}"
    least = min(pulse.entered for pulse in pulses.values())
    behind = sorted(rank for rank, pulse in pulses.items() if pulse.entered == least)
    if len(behind) == len(pulses):
        pulse = pulses[global_rank]
        return f"no process has made progress for {pulse.seconds:.0f} s: all are in {pulse.place}"
    shown = "; ".join(
        f"process {rank} ({_where(pulses[rank])}) has been in {pulses[rank].place} for {pulses[rank].seconds:.0f} s"
        for rank in behind[:4]
    )
    more = f" and {len(behind) - 4} more ({name_ranks(behind[4:])})" if len(behind) > 4 else ""
    waiting: dict[str, list[int]] = {}
    for rank in sorted(pulses.keys() - set(behind)):
        waiting.setdefault(pulses[rank].place, []).append(rank)
    waits = ", ".join(f"{name_ranks(ranks)} in {place}" for place, ranks in waiting.items())
    return f"{shown}{more}; waiting for it: {waits}"


def is_lost_peer(error: BaseException) -> bool:
    """Tell an error of a collective, because another process is gone or does not come, from any other."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(mark in text for mark in _MARKS)


def _where(pulse: Pulse) -> str:
    return f"host {pulse.host}, local rank {pulse.local_rank}, pid {pulse.pid}"


def _end(message: str) -> None:
    """End the process from the watching thread: the training thread hangs and cannot."""
    logger.error("%s", message)
    for handler in [*logger.handlers, *logging.getLogger().handlers]:
        handler.flush()
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(1)
