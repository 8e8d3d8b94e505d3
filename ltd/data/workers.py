"""Threads that load samples ahead, with a time-out per sample.

Decoders, the resize filter and file reads run outside Python's lock, so threads scale; they need no pickling, cannot
outlive the process and are never made anew between epochs. Results are taken in the order of submission, so any number
of threads gives the same batches.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

#: Seconds that the end of the process waits for decoders: a thread that is torn out of one brings the process down.
_EXIT_S = 5.0
_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


class SampleTimeoutError(TimeoutError):
    """A job ran longer than its time-out."""


class Job(Generic[T]):
    """Result to come of one submitted function."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.started_s: float | None = None
        self.abandoned = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        self.done = False

    def outcome(self) -> T:
        """Return what the function returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]

    def fail(self, error: BaseException) -> None:
        """End the job without running its function."""
        with self.changed:
            self.error, self.done = error, True
            self.changed.notify_all()

    def run(self) -> None:
        """Run the function and keep what it returns or raises."""
        with self.changed:
            self.started_s = time.monotonic()
            self.changed.notify_all()
        try:
            self.result = self.work()
        except Exception as error:
            self.error = error
        with self.changed:
            self.done = True
            self.changed.notify_all()


class WorkerPool:
    """A fixed number of daemon threads; a stuck one is replaced.

    Args:
        num_threads: Threads.
        timeout_s: Seconds that one job may run.
    """

    def __init__(self, num_threads: int, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._num_threads = num_threads
        self.closed = False
        self._threads: list[threading.Thread] = []
        for _ in range(num_threads):
            self._start_thread()
        _POOLS.add(self)

    def _start_thread(self) -> None:
        # Daemon threads: a decoder stuck in native code must not keep the process from ending.
        thread = threading.Thread(target=self._work, name="ltd-data", daemon=True)
        self._threads = [old for old in self._threads if old.is_alive()] + [thread]
        thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self.closed:
                job.fail(RuntimeError("the loader is closed"))
                continue
            job.run()
            if job.abandoned:
                return

    def submit(self, work: Callable[[], T]) -> Job[T]:
        """Queue a function.

        Args:
            work: Function of no arguments.

        Returns:
            Its job; hand it to ``wait``.

        Raises:
            RuntimeError: If the pool is closed.
        """
        if self.closed:
            raise RuntimeError("the loader is closed")
        job = Job(work)
        self._jobs.put(job)
        return job

    def wait(self, job: Job[T]) -> T:
        """Wait for a job.

        Args:
            job: The job.

        Returns:
            What the function returned; what it raised is raised.

        Raises:
            SampleTimeoutError: If it has run longer than the time-out; its thread is replaced and left to end alone.
        """
        with job.changed:
            while not job.done:
                if job.started_s is None:
                    job.changed.wait()
                    continue
                left = job.started_s + self.timeout_s - time.monotonic()
                if left <= 0:
                    job.abandoned = True
                    self._start_thread()
                    raise SampleTimeoutError(f"not loaded within {self.timeout_s:g} s")
                job.changed.wait(left)
        return job.outcome()

    def close(self) -> None:
        """Let the threads end once they have done the job they are at; jobs that wait are not begun."""
        self.closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job.fail(RuntimeError("the loader is closed"))
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the threads of a closed pool.

        Args:
            timeout_s: Seconds to wait at most, for all of them.
        """
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


@atexit.register
def _end() -> None:
    pools = list(_POOLS)
    for pool in pools:
        pool.close()
    for pool in pools:
        pool.join(_EXIT_S / len(pools))
