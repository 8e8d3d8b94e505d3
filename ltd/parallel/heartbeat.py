"""Who is alive, where each process is, and whom the others wait for; beside the collectives, never through them.

A thread of each process tells the rendezvous store about once a second which phase of which step its training is in.
When training does not move, what the others said tells whom it waits for: ``slow_s`` names that process, ``timeout_s``
ends the run with its name. A process that ends by an error leaves a last word, and the others end with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ltd.parallel.config import ParallelConfig
from ltd.parallel.interface import ProcessLostError
from ltd.parallel.layout import Layout
from ltd.parallel.pulse import Pulse, Verdict, judge, locate

logger = logging.getLogger(__name__)

#: Longest time between two publications, in seconds; longer in a very large world, to spare the store.
_EVERY_S = 1.0
#: Publications per second that the store is asked to take.
_STORE_RATE = 2000
#: Publications that a process may miss before it counts as silent.
_MISSED = 4
#: Seconds without an answer after which the store counts as unreachable.
_STALE_S = 10.0
#: Seconds that a process that stands still has, after another's last word, to end by itself.
_GRACE_S = 10.0
#: Seconds to wait for a thread that says a last thing.
_PARTING_S = 3.0
_LAST_WORD = "last word"
#: What gloo says when a peer is gone or late.
_MARKS = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Connection refused")


class Heartbeat:
    """Watch over the processes of a run; entered by the thread that trains.

    Args:
        layout: This process's position.
        slow_s: Seconds that processes wait for another after which the main process names it.
        timeout_s: Seconds that processes wait for another after which all end.
    """

    def __init__(self, layout: Layout, *, slow_s: float, timeout_s: float) -> None:
        self.layout, self.slow_s, self.timeout_s = layout, slow_s, timeout_s
        self._now: tuple[int, str, int, float] = (0, "start", 0, time.monotonic())
        self._moved = ((0, 0), time.monotonic())
        self._training = threading.get_ident()
        every_s = max(min(_EVERY_S, slow_s / 4), layout.world_size / _STORE_RATE)
        self._every_s = every_s
        self._talk = _Talk(layout, self._pulse, every_s=every_s) if layout.world_size > 1 else None
        # The main process decides first and leaves its verdict; the others only if it does not, and not all at once.
        self._patience_s = timeout_s + (0 if layout.is_main else (_MISSED + 2) * every_s + layout.global_rank / 500)
        self._read_from_s = min(slow_s, timeout_s / 2) if layout.is_main else self._patience_s
        self._read_from_s -= (_MISSED + 2) * every_s
        self._warned, self._heard, self._heard_at = -1, -1, 0.0
        self._stop = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def enter(self, phase: str, step: int) -> None:
        """Note that training goes on with another phase; costs less than a microsecond.

        Args:
            phase: ``start``, ``data``, ``forward``, ``backward``, ``optimizer``, ``evaluate`` or ``save``; or what
                another job calls its own.
            step: Step it belongs to, from 1; 0 where there is none.
        """
        self._now = (self._now[0] + 1, phase, step, time.monotonic())

    def again(self) -> None:
        """Note progress inside a phase that is long; all processes note it equally often."""
        self.enter(self._now[1], self._now[2])

    def __enter__(self) -> Heartbeat:
        self._training = threading.get_ident()
        if self._talk is not None:
            self._talk.start()
        self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._talk is not None:
            self._talk.leave(self._last_word(error))

    def explain(self) -> str:
        """Say which process was lost, after a collective failed; looks for a few seconds.

        Returns:
            One or two sentences.
        """
        talk = self._talk
        if talk is None:
            return "there is no other process"
        deadline = time.monotonic() + 2 * _MISSED * self._every_s
        talk.keep_reading = True
        verdict = self._judge(talk)
        while verdict.kind != "lost" and not talk.word and not talk.unreachable(self.timeout_s):
            if time.monotonic() > deadline:
                return f"a collective failed, but all processes answer: {verdict.message}"
            time.sleep(self._every_s / 4)
            verdict = self._judge(talk)
        if verdict.kind == "lost" or talk.word:
            return verdict.message if verdict.kind == "lost" else talk.word
        return f"{_unreachable()}; this process was in {self._pulse().place}"

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            pulse, talk = self._pulse(), self._talk
            if talk is None:
                if pulse.seconds > self.slow_s:
                    self._warn(
                        f"no progress for {pulse.seconds:.0f} s: this process is in {pulse.place} ({pulse.where})"
                    )
                continue
            talk.reading = pulse.still_s > self._read_from_s
            if talk.word:
                self._end_after_word(talk.word, pulse.entered)
            if pulse.still_s > self._patience_s:
                self._end_if_waiting(talk, pulse)
            elif self.layout.is_main and pulse.still_s > self.slow_s:
                self._warn_if_waiting(talk)

    def _warn(self, message: str) -> None:
        """Warn once per stop of training."""
        entered = self._now[0]
        if self._warned != entered:
            self._warned = entered
            logger.warning("%s", message)

    def _warn_if_waiting(self, talk: _Talk) -> None:
        verdict = self._judge(talk)
        if talk.unreachable(self.timeout_s):
            self._warn(_unreachable())
        elif verdict.kind == "lost" or verdict.waited_s > self.slow_s:
            self._warn(verdict.message)

    def _end_after_word(self, word: str, entered: int) -> None:
        """End this process if it still stands where it stood some seconds ago, when another's last word was heard."""
        if self._heard != entered:
            self._heard, self._heard_at = entered, time.monotonic()
        elif time.monotonic() - self._heard_at > min(_GRACE_S, self.timeout_s / 2):
            _end(word)

    def _end_if_waiting(self, talk: _Talk, pulse: Pulse) -> None:
        limit = f"no progress for parallel.timeout_s = {self.timeout_s:g} s: "
        if talk.unreachable(self.timeout_s):
            _end(limit + f"{_unreachable()}; this process is in {pulse.place}")
        # In a phase that is long everywhere, a busy process may be silent for a while: that alone is no reason.
        verdict = self._judge(talk, silent_s=self.timeout_s / 6)
        waited = verdict.kind == "lost" or verdict.waited_s > self.timeout_s
        if not waited or self._stop.is_set() or self._now[0] != pulse.entered:
            return
        talk.leave(f"process {self.layout.global_rank} ended the run: {limit}{verdict.message}")
        _end(limit + verdict.message)

    def _judge(self, talk: _Talk, *, silent_s: float = 0.0) -> Verdict:
        return judge(talk.pulses(), talk.silent(max(silent_s, _MISSED * self._every_s)))

    def _pulse(self) -> Pulse:
        entered, phase, step, since = self._now
        where, waits = locate(self._training)
        now, progress = time.monotonic(), (entered, self.layout.collectives)
        if self._moved[0] != progress:
            self._moved = (progress, now)
        return Pulse(
            beats=0,
            entered=entered,
            collectives=progress[1],
            phase=phase,
            step=step,
            seconds=now - since,
            still_s=now - self._moved[1],
            waits=waits,
            where=where,
            host=socket.gethostname(),
            local_rank=self.layout.local_rank,
            pid=os.getpid(),
        )

    def _last_word(self, error: BaseException | None) -> str:
        """Say what this process ended with; nothing if by its own will, or only because another was lost."""
        if (
            error is None
            or isinstance(error, ProcessLostError)
            or is_lost_peer(error)
            or (isinstance(error, SystemExit) and not error.code)
        ):
            return ""
        first_line = (str(error).splitlines() or [""])[0][:1000]
        pulse = self._pulse()
        return (
            f"process {self.layout.global_rank} ({pulse.process}) ended in {pulse.place} with "
            f"{type(error).__name__}: {first_line}"
        )


class _Talk:
    """The one thread that talks to the store: it alone blocks when the store's host is cut off.

    Args:
        layout: Opens the store.
        describe: Gives this process's state.
        every_s: Seconds between two exchanges.
    """

    def __init__(self, layout: Layout, describe: Callable[[], Pulse], *, every_s: float) -> None:
        #: Whether the other processes' states are wanted, now or until the end.
        self.reading = self.keep_reading = False
        #: First last word of any process; empty while there is none.
        self.word = ""
        self._layout, self._describe, self._every_s = layout, describe, every_s
        self._beats, self._parting = 0, ""
        self._store: Any = None
        self._answered_at = time.monotonic()
        self._broken = False
        # By rank: what it said last, and when, on this host's clock, a read first showed it.
        self._heard: dict[int, tuple[Pulse, float]] = {}
        self._first_read_at: float | None = None
        self._last_read_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat store", daemon=True)

    def start(self) -> None:
        """Publish a first state and go on doing so."""
        # Connected by the caller: a slow name service holds it up here, where that is no silence.
        self._store = self._layout.open_store("heartbeat")
        self._exchange(ending=False)
        self._thread.start()

    def leave(self, word: str) -> None:
        """Publish that this process ends, with a last word if it is not empty, and stop."""
        self._parting = word
        self._stop.set()
        self._thread.join(timeout=_PARTING_S)

    def pulses(self) -> dict[int, Pulse]:
        """Look up what each process said last; this one says it now."""
        said = {rank: pulse for rank, (pulse, _) in self._heard.copy().items()}
        return said | {self._layout.global_rank: self._describe()}

    def silent(self, seconds: float) -> set[int]:
        """List the processes that said nothing new for so long before the last read, by this host's clock."""
        if self._first_read_at is None:
            return set()
        limit, heard = self._last_read_at - seconds, self._heard.copy()
        silent = {rank for rank, (_, first_seen_at) in heard.items() if first_seen_at < limit}
        if self._first_read_at < limit:
            silent |= set(range(self._layout.world_size)) - heard.keys()
        return silent - {self._layout.global_rank}

    def unreachable(self, timeout_s: float) -> bool:
        """Say whether the store has not answered for some seconds; fewer where the run's time-out is short."""
        return self._broken or time.monotonic() - self._answered_at > max(
            min(_STALE_S, timeout_s / 2), 2 * self._every_s
        )

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._every_s):
                self._exchange(ending=False)
            self._exchange(ending=True)
        except dist.DistError as error:
            # For good: the store went with its host, and connecting anew blocks for seconds and floods the log.
            logger.debug("heartbeat: %s", error)
            self._broken = True

    def _exchange(self, *, ending: bool) -> None:
        store = self._store
        if ending and self._parting:
            store.compare_set(_LAST_WORD, "", self._parting)  # the first one of a run stays
        self._beats += 1
        pulse = replace(self._describe(), beats=self._beats, ended=ending)
        store.set(str(self._layout.global_rank), json.dumps(asdict(pulse)))
        if not self.word and store.check([_LAST_WORD]):
            self.word = store.get(_LAST_WORD).decode()
        if self.reading or self.keep_reading:
            self._read(store)
        self._answered_at = time.monotonic()

    def _read(self, store: Any) -> None:
        keys = [str(rank) for rank in range(self._layout.world_size)]
        if not store.check(keys):  # some process has not come so far
            keys = [key for key in keys if store.check([key])]
        values, now = store.multi_get(keys), time.monotonic()
        for key, value in zip(keys, values, strict=True):
            pulse, known = Pulse(**json.loads(value)), self._heard.get(int(key))
            if known is None or known[0].beats != pulse.beats:
                self._heard[int(key)] = (pulse, now)
        self._last_read_at = now
        if self._first_read_at is None:
            self._first_read_at = now


@contextlib.contextmanager
def open_watched(config: ParallelConfig) -> Iterator[tuple[Layout, Heartbeat]]:
    """Join the process group and watch over it; only the main process keeps logging what is not an error.

    Args:
        config: The parallel section.

    Yields:
        The layout, closed at the end, and its heartbeat.

    Raises:
        ConfigError: If the world does not fit the configuration.
        ProcessLostError: If another process died or stopped answering; says which and where.
    """
    layout = Layout.from_environment(config)
    if not layout.is_main:
        logging.getLogger("ltd").setLevel(logging.ERROR)
    try:
        with Heartbeat(layout, slow_s=config.slow_s, timeout_s=config.timeout_s) as beat:
            try:
                yield layout, beat
            except RuntimeError as error:
                explain_loss(layout, beat, error)
                raise
    finally:
        layout.close()


def explain_loss(layout: Layout, beat: Heartbeat, error: RuntimeError) -> None:
    """Turn the error of a collective whose peer is gone into one that says which.

    Args:
        layout: Processes of the run.
        beat: Their heartbeat.
        error: What was raised; nothing happens if it is of another kind.

    Raises:
        ProcessLostError: If another process died or stopped answering.
    """
    if layout.world_size > 1 and is_lost_peer(error):
        raise ProcessLostError(beat.explain()) from error


def is_lost_peer(error: BaseException) -> bool:
    """Tell an error of a collective, because another process is gone or does not come, from any other."""
    text = str(error)
    # A data server may refuse a connection too: gloo names itself, or its transport's source file.
    of_gloo = type(error) is RuntimeError and ("gloo" in text.lower() or "transport/" in text)
    return isinstance(error, dist.DistError) or (of_gloo and any(mark in text for mark in _MARKS))


def _unreachable() -> str:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"the rendezvous store at {address} does not answer: process 0 or its host is dead, or cut off from this host"
    )


def _end(message: str) -> None:
    """End the process from the watching thread: the training thread hangs and cannot."""

    def log() -> None:
        logger.error("%s", message)
        for handler in logging.getLogger().handlers:
            handler.flush()

    logging_thread = threading.Thread(target=log, daemon=True)  # the training thread may hang with a handler's lock
    logging_thread.start()
    logging_thread.join(timeout=_PARTING_S)
    os._exit(1)
