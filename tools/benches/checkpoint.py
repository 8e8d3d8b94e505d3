"""Saving and loading a sharded training state against torch's distributed checkpoint (DCP), on two processes.

One state, the same memory for all: weights, two moments and one average of a transformer, each tensor in halves. All
saves flush their files to disk; ours also writes checksums and renames, and its loads verify every byte. Time blocked
is how long training stands still for a save that goes on in the background. The slowest process counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from tools.benches.table import Row

KIND = "checkpoint"
NAME = "checkpoint"
LAYOUT = "two processes, every tensor in halves"
SHAPES = "7 transformer blocks of width 512: weights, two moments and an average, fp32"
TINY_SHAPES = "1 transformer block of width 32: weights, two moments and an average, fp32"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "bench"
#: What is asked for: the peer's default over ours.
TARGETS = {
    "save, on disk": ("DCP save", 1.5),
    "load, page cache warm": ("DCP load", 3.0),
    "load, page cache dropped": ("DCP load", 3.0),
    "save, time blocked": ("DCP async_save", 5.0),
}
_TIMEOUT_S = 1800.0


def measure(repeats: int, *, tiny: bool = False) -> list[Row]:
    """Time saves and loads.

    Args:
        repeats: Rounds of each.
        tiny: The smallest sizes, to see that it runs.

    Returns:
        Rows per 1,000 MB of state.
    """
    with _scratch() as folder:
        out = Path(folder) / "times.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [
            "-m",
            "tools.benches._checkpoint_worker",
            str(out),
            folder,
            str(repeats),
            "tiny" if tiny else "full",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        found = json.loads(out.read_text())
    megabytes = found["megabytes"]
    return [
        Row(
            work=f"{work} ({megabytes:.0f} MB)",
            system=system if system == "ltd" else f"torch {torch.__version__}, {system}",
            wall_s=[wall_s / megabytes * 1000 for wall_s, _ in times],
            cpu_s=[cpu_s / megabytes * 1000 for _, cpu_s in times],
            ours=system == "ltd",
        )
        for work, systems in found["times"].items()
        for system, times in systems.items()
    ]


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """Make a folder for one run, and remove it and those of runs that were killed.

    It lies beside the repository's runs and not among the system's temporary files, which are often kept in memory: it
    is the disk that is measured.
    """
    for left in FOLDER.glob("checkpoint-*"):
        if not psutil.pid_exists(int(left.name.removeprefix("checkpoint-"))):
            shutil.rmtree(left)
    folder = FOLDER / f"checkpoint-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder)


def summary(rows: list[Row]) -> list[str]:
    """Compare the medians of paired ratios with what is asked for.

    Args:
        rows: What ``measure`` gave.

    Returns:
        Lines of a Markdown list.
    """
    lines = ["- An item is a megabyte of state, so 1,000 items are 1,000 MB over both processes."]
    for work, (peer, target) in TARGETS.items():
        same = [row for row in rows if row.work.startswith(work)]
        ours = next(row for row in same if row.ours)
        other = next(row for row in same if row.system.endswith(peer))
        ratio = statistics.median(b / a for a, b in zip(ours.wall_s, other.wall_s, strict=True))
        verdict = "reached" if ratio >= target else "MISSED"
        lines.append(f"- {work}: {ratio:.2f} times as fast as {peer}; asked for {target:g}: {verdict}")
    return lines
