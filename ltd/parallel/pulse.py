"""What processes say of themselves, and what that says of the run: who is lost, who is behind, who waits.

Pure functions of what was said; knows no store and no thread.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from ltd.parallel.layout import name_processes, name_ranks

#: Files in whose functions a process waits for the others.
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
#: Where DeepSpeed waits for collectives that it began earlier.
_ENGINE_WAITS = "deepspeed/runtime/"
#: Directory that holds this package, to shorten file names with.
_ROOT = Path(__file__).resolve().parents[2]
#: Processes that a message describes one by one.
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """What a process said of itself."""

    #: Publications so far: a process that lives says more.
    beats: int
    #: Phases entered and collectives of the layout begun so far: of processes that wait for each other, the slowest has
    #: the fewest.
    entered: int
    collectives: int
    phase: str
    step: int
    #: Seconds in the phase when it was said.
    seconds: float
    #: Seconds since the last progress; where training waits in a collective of the layout, those that it waits.
    still_s: float
    #: Whether training was inside a collective.
    waits: bool
    #: Function, file and line where training was.
    where: str
    host: str
    local_rank: int
    pid: int
    #: Whether the process has left the run: it will say nothing more.
    ended: bool = False

    @property
    def progress(self) -> tuple[int, int]:
        """Give what only grows as training goes on, alike on all processes."""
        return self.entered, self.collectives

    @property
    def place(self) -> str:
        """Name the phase and its step."""
        return f"`{self.phase}` of step {self.step}" if self.step else f"`{self.phase}`"

    @property
    def process(self) -> str:
        """Name the host, the rank on it and the process id."""
        return f"host {self.host}, local rank {self.local_rank}, pid {self.pid}"


@dataclass(frozen=True)
class Verdict:
    """Who holds the run up."""

    #: ``lost``: some say nothing any more; ``behind``: some are not where the others wait; ``crossed``: all are inside
    #: collectives, which do not meet; ``busy``: nobody waits for anybody.
    kind: Literal["lost", "behind", "crossed", "busy"]
    ranks: list[int]
    message: str
    #: Seconds that the longest waiting process has waited.
    waited_s: float = 0.0


def judge(pulses: Mapping[int, Pulse], silent: Collection[int]) -> Verdict:
    """Decide who holds the run up.

    Args:
        pulses: What each process said last.
        silent: Processes that said nothing new for some seconds, or never anything.

    Returns:
        The processes and a sentence that names them.
    """
    lost = sorted(rank for rank in silent if rank not in pulses or not pulses[rank].ended)
    if lost:
        seen = [_describe_lost(rank, pulses.get(rank)) for rank in lost[:_SHOWN]]
        return Verdict("lost", lost, "lost (dead, frozen or cut off): " + "; ".join(seen) + _more(lost))
    running = {rank: pulse for rank, pulse in pulses.items() if not pulse.ended}
    awake = {rank: pulse for rank, pulse in running.items() if not pulse.waits}
    candidates = awake or running
    least = min((pulse.progress for pulse in candidates.values()), default=(0, 0))
    behind = sorted(rank for rank, pulse in candidates.items() if pulse.progress == least)
    others = {rank: pulse for rank, pulse in running.items() if rank not in behind}
    if others:
        names = [_describe_behind(rank, pulses[rank]) for rank in behind[:_SHOWN]]
        message = "; ".join(names) + _more(behind) + f"; waiting: {_places(others)}"
        return Verdict("behind", behind, message, max(pulse.still_s for pulse in others.values()))
    gone = sorted(pulses.keys() - running.keys())
    ended = f"; {name_processes(gone)} left the run" if gone else ""
    if awake or not running:
        return Verdict("busy", behind, f"no process waits for another: {_places(running)}{ended}")
    shown = f"all wait in collectives that do not meet: {_places(running, where=True)}{ended}"
    return Verdict("crossed", behind, shown, min(pulse.still_s for pulse in running.values()))


def locate(thread_id: int) -> tuple[str, bool]:
    """Find out where a thread of this process is.

    Args:
        thread_id: What ``threading.get_ident`` gave in that thread.

    Returns:
        Its innermost function of this package (or of any, if there is none) with file and line; whether it is inside a
        collective.
    """
    frame: FrameType | None = sys._current_frames().get(thread_id)
    innermost, own = frame, None
    waits = frame is not None and _ENGINE_WAITS in frame.f_code.co_filename
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or name.endswith(_COLLECTIVES)
        if own is None and Path(name).is_relative_to(_ROOT / "ltd"):
            own = frame
        frame = frame.f_back
    found = own or innermost
    if found is None:
        return "", waits
    path = Path(found.f_code.co_filename)
    shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name
    return f"{found.f_code.co_name}, {shown}:{found.f_lineno}", waits


def _describe_lost(rank: int, pulse: Pulse | None) -> str:
    if pulse is None:
        return f"process {rank}, which never said anything"
    return f"process {rank} ({pulse.process}), last seen in {pulse.place}"


def _describe_behind(rank: int, pulse: Pulse) -> str:
    at = f" ({pulse.where})" if pulse.where else ""
    return f"process {rank} ({pulse.process}) has been in {pulse.place} for {pulse.seconds:.0f} s{at}"


def _more(ranks: list[int]) -> str:
    rest = ranks[_SHOWN:]
    return f"; and {len(rest)} more ({name_ranks(rest)})" if rest else ""


def _places(pulses: Mapping[int, Pulse], *, where: bool = False) -> str:
    """Group processes by where they are; the file and line only where it tells them apart."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(pulses):
        pulse = pulses[rank]
        groups.setdefault(pulse.place + (f" ({pulse.where})" if where else ""), []).append(rank)
    return ", ".join(f"{name_processes(ranks)} in {place}" for place, ranks in groups.items())
