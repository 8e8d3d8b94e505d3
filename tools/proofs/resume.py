"""Kill a run with SIGKILL, resume it, and compare with the run that nobody touched: bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ltd import storage
from tools.proofs import _runs
from tools.proofs.table import Cell, Proof

NAME = "resume"


@dataclass(frozen=True)
class Case:
    """One run to kill."""

    name: str
    config: str
    processes: int
    overrides: tuple[str, ...] = ()


_PACKED = "configs/debug/denoiser_packed.yaml"
CASES = (
    Case("denoiser, ZeRO-2, two averages", _runs.DEBUG_CONFIG, 2, ("parallel.zero=2", "ema.decays=[0.9,0.99]")),
    Case("denoiser, ZeRO-3, bf16", _runs.DEBUG_CONFIG, 2, ("parallel.zero=3", "parallel.precision=bf16")),
    Case(
        "denoiser, packed, ZeRO-3, sequence 2, selective",
        _PACKED,
        2,
        ("parallel.zero=3", "parallel.sequence=2", "parallel.activation_checkpointing=selective"),
    ),
    Case("denoiser, ZeRO-2, offloaded", _runs.DEBUG_CONFIG, 2, ("parallel.zero=2", "parallel.offload=optimizer")),
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
    common = [*case.overrides, f"steps={steps}", f"checkpoint.every={every}", *_runs.make_data(folder / "toy")]

    def start(run_dir: Path) -> _runs.Launched:
        return _runs.start(case.processes, [case.config, f"run_dir={run_dir}", *common], log)

    start(whole).wait()
    run = start(killed)
    _runs.wait_for(lambda: _runs.has_row(killed, kill_after), run, f"step {kill_after}")
    run.kill()
    reached = _runs.rows(killed)[-1]["step"]
    newest = storage.latest_checkpoint(killed)
    assert newest is not None
    resumed_at = storage.checkpoint_step(newest)
    start(killed).wait()
    changed, num_shards = _runs.different_shards(whole, killed, steps)
    groups = sorted(storage.Reader(storage.checkpoint_path(killed, steps)).groups())
    different = _runs.different_rows(whole, killed)
    return Comparison(reached, resumed_at, len(_runs.rows(killed)), different, changed, num_shards, groups)


def measure() -> Proof:
    """Kill 60 steps of every case at step 37 and compare."""
    rows: list[Sequence[Cell]] = []
    misses = []
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
