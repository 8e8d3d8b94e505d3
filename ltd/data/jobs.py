"""Work shared out over threads or processes: the first failure ends it all. Knows nothing of the work."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ltd.config import ConfigError

T = TypeVar("T")
R = TypeVar("R")


def run_in_threads(jobs: Iterable[T], work: Callable[[T], Iterable[R]], *, num_threads: int) -> Iterator[R]:
    """Do jobs in threads; decoders, encoders and file reads run outside Python's lock.

    Args:
        jobs: What to do, the longest first.
        work: Does one job and yields its results.
        num_threads: Jobs worked on at once, >= 1.

    Yields:
        Results in the order in which they are ready; an exception of ``work`` is raised here.
    """
    waiting: queue.SimpleQueue[T] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    # Bounded, so that a slow consumer holds back the workers rather than fill the memory.
    ready: queue.Queue[tuple[R | None, BaseException | None, bool]] = queue.Queue(maxsize=64)
    stop = threading.Event()

    def deliver(item: tuple[R | None, BaseException | None, bool]) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=1.0)
            except queue.Full:
                continue

    def loop() -> None:
        try:
            while not stop.is_set():
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    break
                for result in work(job):
                    deliver((result, None, False))
                    if stop.is_set():
                        return
        except BaseException as error:
            return deliver((None, error, False))
        deliver((None, None, True))

    running = min(num_threads, waiting.qsize())
    for _ in range(running):
        threading.Thread(target=loop, name="ltd-job", daemon=True).start()
    try:
        while running:
            result, error, ended = ready.get()
            if error is not None:
                raise error
            if ended:
                running -= 1
            else:
                yield result  # type: ignore[misc]
    finally:
        stop.set()


def run_in_processes(jobs: Sequence[T], work: Callable[[T], R], *, num_processes: int) -> Iterator[R]:
    """Do jobs in processes: worth the seconds they take to start where Python's lock would hold threads up.

    Args:
        jobs: What to do; can be pickled.
        work: Does one job; a function of a module, whose results can be pickled.
        num_processes: Jobs worked on at once, >= 1.

    Yields:
        Results in the order of the jobs; an exception of ``work`` is raised here.

    Raises:
        ConfigError: If a process dies.
    """
    count = min(num_processes, len(jobs))
    context = multiprocessing.get_context("spawn")  # a fork would inherit the locks of other threads
    try:
        with ProcessPoolExecutor(count, mp_context=context, initializer=_belong_to_parent) as pool:
            yield from pool.map(work, jobs)
    except BrokenProcessPool as error:
        raise ConfigError(
            f"workers: got {count}, but one of the processes died, perhaps for lack of memory; needed fewer"
        ) from error


def _belong_to_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it is killed: this process would wait for jobs for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
