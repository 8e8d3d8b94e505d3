"""Kill a run with SIGKILL, resume it, and compare with the run that nobody touched: bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltd import storage
from tools.proofs.table import Proof

NAME = "resume"
ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 300.0
#: What a repeat may change: wall-clock figures.
_CLOCKS = ("time/", "perf/")


@dataclass(frozen=True)
class Case:
    """One run to kill."""

    name: str
    config: str
    processes: int
    overrides: tuple[str, ...] = ()


CASES = (
    Case("denoiser, ZeRO-2, fp32", "configs/debug/denoiser.yaml", 2, ("parallel.zero=2",)),
    Case("denoiser, ZeRO-3, bf16", "configs/debug/denoiser.yaml", 2, ("parallel.zero=3", "parallel.precision=bf16")),
    Case("autoencoder, one process", "configs/debug/autoencoder.yaml", 1),
)


@dataclass(frozen=True)
class Comparison:
    """What the killed and resumed run has in common with the untouched one."""

    killed_after: int
    resumed_at: int
    rows: int
    different_rows: list[int]
    #: Shard files of the last checkpoint whose bytes differ, of how many.
    different_shards: list[str]
    num_shards: int
    groups: list[str]


def compare(case: Case, folder: Path, *, steps: int = 60, every: int = 10, kill_after: int = 37) -> Comparison:
    """Run a case twice, once killed and resumed, and compare.

    Args:
        case: Configuration and number of processes.
        folder: Scratch folder.
        steps: Steps of the run.
        every: Steps between checkpoints.
        kill_after: All processes are killed as soon as the row of this step is written.

    Returns:
        The comparison.
    """
    whole, killed, log = folder / "whole", folder / "killed", folder / "output.txt"
    common = [*case.overrides, f"steps={steps}", f"checkpoint.every={every}", f"data.shards={folder / 'toy' / 'train'}"]
    common += [f"evaluation.shards={folder / 'toy' / 'heldout'}"]
    _make_data(folder / "toy")
    _wait(_start(case, [f"run_dir={whole}", *common], log), log)
    _kill_after(_start(case, [f"run_dir={killed}", *common], log), killed, kill_after, log)
    reached = _rows(killed)[-1]["step"]
    newest = storage.latest_checkpoint(killed)
    assert newest is not None
    resumed_at = storage.read_manifest(newest)["step"]
    _wait(_start(case, [f"run_dir={killed}", *common], log), log)
    first, second = _rows(whole), _rows(killed)
    different = [a["step"] for a, b in zip(first, second, strict=True) if _timeless(a) != _timeless(b)]
    shards = sorted(path.name for path in storage.checkpoint_path(whole, steps).glob("*.safetensors"))
    changed = [
        name
        for name in shards
        if storage.sha256_file(storage.checkpoint_path(whole, steps) / name)
        != storage.sha256_file(storage.checkpoint_path(killed, steps) / name)
    ]
    groups = sorted(storage.Reader(storage.checkpoint_path(killed, steps)).groups())
    return Comparison(reached, resumed_at, len(second), different, changed, len(shards), groups)


def measure() -> Proof:
    """Kill 60 steps of every case at step 37 and compare."""
    rows, misses = [], []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(case, Path(folder))
        rows.append(
            [
                case.name,
                case.processes,
                found.killed_after,
                found.resumed_at,
                found.rows,
                len(found.different_rows),
                f"{len(found.different_shards)} of {found.num_shards}",
                ", ".join(found.groups),
            ]
        )
        if found.different_rows or found.different_shards or found.rows != 60 or found.resumed_at != 30:
            misses.append(f"{case.name}: {found}")
    columns = ["run", "processes", "killed after", "resumed at", "rows", "rows that differ", "shards that differ"]
    notes = (
        "60 steps with a checkpoint every 10; all processes get SIGKILL when the row of step 37 appears; the same "
        "command then resumes. Compared with the untouched run: every row of `metrics.jsonl` (losses, gradient norms, "
        "learning rates, held-out figures, key hashes; not the clocks), and every byte of the last checkpoint's shards "
        "(the groups listed)."
    )
    return Proof(
        "A killed run continues as if nothing had happened", [*columns, "groups compared"], rows, misses, notes
    )


def _make_data(folder: Path) -> None:
    from ltd.data.synthetic import make_toy_shards

    for split, count, seed in (("train", 32, 0), ("heldout", 8, 1)):
        make_toy_shards(
            folder / split, num_videos=count, num_images=count, num_frames=9, height=32, width=32, seed=seed
        )


def _start(case: Case, overrides: list[str], log: Path) -> subprocess.Popen[bytes]:
    launcher = [sys.executable]
    if case.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
    command = [*launcher, "train.py", case.config, *overrides]
    with log.open("wb") as file:  # a pipe that nobody reads would block the run
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait(timeout=_TIMEOUT_S):
        raise RuntimeError(f"exit code {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")


def _kill_after(process: subprocess.Popen[bytes], run_dir: Path, step: int, log: Path) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    mark = f'"step": {step},'
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").is_file() and mark in (run_dir / "metrics.jsonl").read_text():
            os.killpg(process.pid, signal.SIGKILL)
            _kill_children(run_dir)
            process.wait()
            return
        time.sleep(0.002)
    raise RuntimeError(f"step {step} was never reached:\n{log.read_text(errors='replace')[-3000:]}")


def _kill_children(run_dir: Path) -> None:
    """Kill the workers, which the launcher starts in sessions of their own."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            if f"run_dir={run_dir}" in command and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(_CLOCKS)}
