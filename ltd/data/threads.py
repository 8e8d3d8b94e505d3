"""Work shared out over threads: results in any order, the first failure ends it all. Knows nothing of the work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

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
