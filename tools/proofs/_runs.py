"""Training runs in processes of their own: start them, find and kill their processes, compare what they left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltd import storage

ROOT = Path(__file__).resolve().parents[2]
DEBUG_CONFIG = "configs/debug/denoiser.yaml"
_TIMEOUT_S = 300.0
#: What a repeat may change: wall-clock figures.
_CLOCKS = ("time/", "perf/")


@dataclass(frozen=True)
class Launched:
    """A training run that was started."""

    process: subprocess.Popen[bytes]
    #: File with everything that its processes printed.
    log: Path

    def output(self, start: int = 0) -> str:
        """Read what was printed, from a byte on."""
        return self.log.read_bytes()[start:].decode(errors="replace")

    def check_alive(self) -> None:
        """Raise RuntimeError with the end of the output if the run has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"ended with {self.process.returncode}:\n{self.output()[-3000:]}")

    def wait(self, timeout_s: float = _TIMEOUT_S) -> None:
        """Wait for the end of the run.

        Args:
            timeout_s: Seconds until it is killed.

        Raises:
            RuntimeError: If it fails; with the end of its output.
        """
        try:
            self.process.wait(timeout=timeout_s)
        finally:
            self.kill()
        if self.process.returncode:
            raise RuntimeError(f"ended with {self.process.returncode}:\n{self.output()[-3000:]}")

    def terminate(self) -> None:
        """Ask the processes that train to stop, as a scheduler does, with SIGTERM."""
        for pid in self.workers().values() or [self.process.pid]:
            send(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the launcher and its workers, wherever they are."""
        workers = self.workers() if self.process.poll() is None else {}
        for pid in (self.process.pid, *workers.values()):
            if pid != self.process.pid or self.process.poll() is None:
                send(pid, signal.SIGKILL)
        self.process.wait()

    def workers(self) -> dict[int, int]:
        """Find the processes that train: the launcher's living children by global rank, or a process without one."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) != self.process.pid or state in "ZX":
                    continue
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # ended meanwhile
            rank = next((item for item in variables if item.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank[5:])] = int(entry.name)
        return found


def start(
    processes: int,
    arguments: Sequence[str],
    log: Path,
    *,
    program: Sequence[str] = ("train.py",),
    launcher: Sequence[str] = (),
) -> Launched:
    """Start a training run.

    Args:
        processes: Workers under torchrun; one process is started without it.
        arguments: Configuration file and overrides.
        log: File that takes its output; what is there stays.
        program: What is started instead of ``train.py``.
        launcher: Options of torchrun.

    Returns:
        The run.
    """
    command = [sys.executable]
    if processes > 1 or launcher:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *launcher]
    command += [*program, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as file:  # a pipe that nobody reads would block the run
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Launched(process, log)


def wait_for(condition: Callable[[], bool], run: Launched, what: str, *, pause_s: float = 0.002) -> None:
    """Look until something holds.

    Args:
        condition: What must hold.
        run: Run that must be alive until then.
        what: Name for the message.
        pause_s: Seconds between two looks.

    Raises:
        RuntimeError: If the run ends before, or it takes too long; with the end of the run's output.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        run.check_alive()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} was never reached:\n{run.output()[-3000:]}")
        time.sleep(pause_s)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def is_dead(pid: int) -> bool:
    """Say whether a process has ended, also one that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def make_data(folder: Path) -> list[str]:
    """Make the synthetic shards of the debug configurations.

    Args:
        folder: Where to.

    Returns:
        The overrides that name them.
    """
    from ltd.data.synthetic import make_toy_shards

    for split, count, seed in (("train", 32, 0), ("heldout", 8, 1)):
        make_toy_shards(
            folder / split, num_videos=count, num_images=count, num_frames=9, height=32, width=32, seed=seed
        )
    return [f"data.shards={folder / 'train'}", f"evaluation.shards={folder / 'heldout'}"]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Read the whole rows of ``metrics.jsonl``."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def has_row(run_dir: Path, step: int) -> bool:
    """Say whether the row of a step is written."""
    file = run_dir / "metrics.jsonl"
    return file.is_file() and f'"step": {step},' in file.read_text()


def different_rows(a: Path, b: Path, *, aside: tuple[str, ...] = ()) -> list[int]:
    """List the steps whose rows differ between two runs, or which only one has.

    Args:
        a: A run.
        b: Another.
        aside: Beginnings of the names that are not compared, besides clocks.

    Returns:
        The steps, in order.
    """
    first, second = ({row["step"]: _without(row, _CLOCKS + aside) for row in rows(run_dir)} for run_dir in (a, b))
    return sorted(step for step in first.keys() | second.keys() if first.get(step) != second.get(step))


def different_shards(a: Path, b: Path, step: int) -> tuple[list[str], int]:
    """Compare the bytes of two runs' checkpoints of a step.

    Args:
        a: A run.
        b: Another.
        step: The checkpoint's.

    Returns:
        Shard files that differ or that only one has, and how many there are.
    """
    folders = [storage.checkpoint_path(run_dir, step) for run_dir in (a, b)]
    names = sorted({path.name for folder in folders for path in folder.glob("*.safetensors")})
    digests = [
        [storage.sha256_file(folder / name) if (folder / name).is_file() else None for name in names]
        for folder in folders
    ]
    return [name for name, x, y in zip(names, *digests, strict=True) if x != y], len(names)


def _without(row: dict[str, Any], aside: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(aside)}
