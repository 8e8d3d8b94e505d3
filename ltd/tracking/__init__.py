"""What a run leaves to read: metrics and bad samples as JSON lines, W&B when asked, and one report page.

Knows numbers, file names and steps; never a tensor's meaning, a process group or when something is logged.
"""

from __future__ import annotations

from ltd.tracking.journal import Journal, read_journal
from ltd.tracking.tracker import Tracker, TrackingConfig

__all__ = ["Journal", "Tracker", "TrackingConfig", "read_journal"]
