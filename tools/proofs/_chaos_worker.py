"""``train.py`` with a note of each process's phase that outlives a SIGKILL; the notes' folder is the first argument.

The heartbeat's own note is a second old at times, and nobody can ask a killed process. Every ``Heartbeat.enter`` also
writes into a file that is mapped into memory, which the kernel keeps.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

_FORMAT = struct.Struct("<qq16s")


@dataclass(frozen=True)
class Note:
    """Where a process was when it wrote last."""

    pid: int
    step: int
    phase: str


def read_note(folder: Path, rank: int) -> Note | None:
    """Read what a process noted last.

    Args:
        folder: Where the notes are.
        rank: Global rank of the process.

    Returns:
        The note; None before the first.
    """
    try:
        data = (folder / str(rank)).read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < _FORMAT.size:
        return None
    pid, step, phase = _FORMAT.unpack(data[: _FORMAT.size])
    return Note(pid, step, phase.rstrip(b"\0").decode()) if pid else None


def main() -> int:
    """Train, taking notes; the arguments after the folder are those of ``train.py``."""
    import train
    from ltd.parallel.heartbeat import Heartbeat

    file = Path(sys.argv[1], os.environ["RANK"])
    file.write_bytes(bytes(_FORMAT.size))
    with file.open("r+b") as opened:
        memory = mmap.mmap(opened.fileno(), _FORMAT.size)
    enter = Heartbeat.enter

    def noted(self: Heartbeat, phase: str, step: int) -> None:
        memory[:] = _FORMAT.pack(os.getpid(), step, phase.encode())
        enter(self, phase, step)

    Heartbeat.enter = noted  # type: ignore[method-assign]
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
