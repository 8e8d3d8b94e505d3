"""Progress lines: rate and time left are right, work done before does not count for the rate."""

from __future__ import annotations

import logging

import pytest

from ltd.progress import Progress, track


def test_line_states_rate_and_time_left() -> None:
    progress = Progress(100, "cache", unit="clips", done=20, enabled=False)
    progress.update(30)
    assert progress.line(elapsed_s=10.0) == "cache: 50/100 clips, 3 clips/s, 0:16 left"
    assert "time left unknown" in Progress(10, "x", enabled=False).line(1.0)


def test_last_item_is_always_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ltd.progress"):
        assert list(track(range(3), "read", total=3)) == [0, 1, 2]
    assert "read: 3/3" in caplog.text
