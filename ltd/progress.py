"""Progress of long work: a bar with rate and time left on a terminal, a plain log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LINE_EVERY_S = 10.0


class Progress:
    """Count finished units of work and show rate and time left.

    Args:
        total: Units to do in all.
        description: What is being done.
        unit: Name of one unit.
        done: Units that an earlier run already did; they do not enter the rate.
        enabled: Whether this process shows anything (one process of a group does).
    """

    def __init__(self, total: int, description: str, *, unit: str = "it", done: int = 0, enabled: bool = True) -> None:
        self.total, self.description, self.unit, self.done = total, description, unit, done
        self._first, self._start = done, time.monotonic()
        self._last_line = self._start
        on_terminal = enabled and sys.stderr.isatty()
        self._plain = enabled and not on_terminal
        self._bar = tqdm(
            total=total, initial=done, desc=description, unit=unit, disable=not on_terminal, dynamic_ncols=True
        )

    def update(self, count: int = 1, note: str = "") -> None:
        """Count finished units.

        Args:
            count: Units finished since the last call.
            note: Short text shown behind the bar, such as the current loss.
        """
        self.done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._plain and (now - self._last_line >= _LINE_EVERY_S or self.done == self.total):
            self._last_line = now
            logger.info("%s", self.line(now - self._start, note))

    def line(self, elapsed_s: float, note: str = "") -> str:
        """Describe the state in one line: done of total, rate, time left.

        Args:
            elapsed_s: Seconds since the work started.
            note: Text for the end of the line.

        Returns:
            The line.
        """
        rate = (self.done - self._first) / max(elapsed_s, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        clock = f"{int(left) // 60}:{int(left) % 60:02d} left" if left != float("inf") else "time left unknown"
        text = f"{self.description}: {self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {clock}"
        return f"{text}, {note}" if note else text

    def close(self) -> None:
        """Take the bar off the terminal's current line."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def track(items: Iterable[T], description: str, *, total: int, unit: str = "it", enabled: bool = True) -> Iterator[T]:
    """Yield items and show progress.

    Args:
        items: What to go through.
        description: What is being done.
        total: Number of items.
        unit: Name of one item.
        enabled: Whether this process shows anything.

    Yields:
        The items.
    """
    with Progress(total, description, unit=unit, enabled=enabled) as progress:
        for item in items:
            yield item
            progress.update()
