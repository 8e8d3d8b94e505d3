"""Fork a run at a checkpoint, and fork the fork: both against the trunk, bit for bit; and cool-downs from one trunk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ltd import storage
from tools.proofs import _runs
from tools.proofs.table import Cell, Proof

NAME = "fork"

_STEPS, _FIRST, _SECOND, _EVERY = 30, 10, 20, 10


@dataclass(frozen=True)
class Case:
    """One trunk to fork."""

    name: str
    config: str
    processes: int
    overrides: tuple[str, ...] = ()


CASES = (
    Case("denoiser, one process", _runs.DEBUG_CONFIG, 1),
    Case("denoiser, ZeRO-2, two averages", _runs.DEBUG_CONFIG, 2, ("parallel.zero=2", "ema.decays=[0.9,0.99]")),
    Case(
        "denoiser, packed, ZeRO-3, sequence 2",
        "configs/debug/denoiser_packed.yaml",
        2,
        ("parallel.zero=3", "parallel.sequence=2"),
    ),
    Case("autoencoder, one process", "configs/debug/autoencoder.yaml", 1),
)


@dataclass(frozen=True)
class Comparison:
    """What a fork has in common with the trunk from its first step on."""

    rows: int
    different_rows: list[int]
    different_shards: list[str]
    num_shards: int
    #: Run and step of each ancestor, oldest first.
    lineage: list[str]


def compare(trunk: Path, fork: Path, since: int, steps: int) -> Comparison:
    """Compare a fork with its trunk.

    Args:
        trunk: Run directory.
        fork: Another.
        since: Step that the fork began after.
        steps: Steps of both.

    Returns:
        The comparison of rows ``since + 1`` to ``steps``, and of the last checkpoints' bytes.
    """
    different = [step for step in _runs.different_rows(trunk, fork) if step > since]
    changed, num_shards = _runs.different_shards(trunk, fork, steps)
    entries = storage.read_manifest(storage.checkpoint_path(fork, steps))["ancestors"]
    lineage = [f"{Path(entry['run']).name}@{entry['step']}" for entry in entries if not entry["overrides"]]
    return Comparison(len(_runs.rows(fork)), different, changed, num_shards, lineage)


def fork_twice(case: Case, folder: Path) -> Iterator[tuple[str, int, Comparison]]:
    """Train a trunk, a fork of it and a fork of that.

    Args:
        case: Configuration and number of processes.
        folder: Scratch folder.

    Yields:
        What was forked, the step it began after, and the comparison with the trunk.
    """
    log = folder / "output.txt"
    common = [*case.overrides, f"steps={_STEPS}", f"checkpoint.every={_EVERY}", "tracking.histograms_every=10"]
    common += [*_runs.make_data(folder / "toy"), "checkpoint.keep_last=null"]

    def train(name: str, *overrides: str) -> Path:
        arguments = [case.config, f"run_dir={folder / name}", *common, *overrides]
        _runs.start(case.processes, arguments, log).wait()
        return folder / name

    trunk = train("trunk")
    first = train("fork", f"fork={trunk}@{_FIRST}")
    yield "the trunk", _FIRST, compare(trunk, first, _FIRST, _STEPS)
    second = train("fork_of_fork", f"fork={first}@{_SECOND}")
    yield "the fork", _SECOND, compare(trunk, second, _SECOND, _STEPS)


def uncounted(run_dir: Path, step: int) -> int:
    """Compare how many weights a run's histograms of a step count with how many it trains; 0 where all, once each."""
    found = [json.loads(line) for line in (run_dir / "histograms.jsonl").read_text().splitlines()]
    counted = sum(sum(r["counts"]) for r in found if r["step"] == step and r["name"].startswith("histogram/master/"))
    trained = storage.Reader(storage.checkpoint_path(run_dir, step)).read_full("master")
    return sum(value.numel() for value in trained.values()) - counted


def cool_down(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Fork a constant-rate trunk at two steps to cool down over 5 and over 10.

    Args:
        folder: Scratch folder.

    Yields:
        What was forked, the step it began after, and the largest difference of a rate from the closed form, in shares
        of the peak.
    """
    log, data = folder / "output.txt", _runs.make_data(folder / "toy")
    trunk = folder / "trunk"
    _runs.start(1, [_runs.DEBUG_CONFIG, f"run_dir={trunk}", "steps=20", "checkpoint.every=10", *data], log).wait()
    for start, count in ((10, 5), (20, 10)):
        child = folder / f"cooldown{start}"
        arguments = ["configs/debug/denoiser_cooldown.yaml", f"run_dir={child}", f"fork={trunk}@{start}", *data]
        arguments += [f"optim.cooldown_from={start}", f"steps={start + count}"]
        _runs.start(1, arguments, log).wait()
        rates = [row["optim/lr"] for row in _runs.rows(child)]
        expected = [1e-3 * (count - n) / count for n in range(count)]
        worst = max(abs(a - b) for a, b in zip(rates, expected, strict=True)) / 1e-3
        yield f"a cool-down over {count} steps", start, worst


def measure() -> Proof:
    """Fork every case twice and compare."""
    rows: list[Sequence[Cell]] = []
    misses = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            for number, (what, since, found) in enumerate(fork_twice(case, folder)):
                shards = f"{len(found.different_shards)} of {found.num_shards}"
                differing = len(found.different_rows)
                rows.append([case.name, what, since, found.rows, differing, shards, " -> ".join(found.lineage)])
                expected = [f"trunk@{_FIRST}", f"fork@{_SECOND}"][: number + 1]
                whole = found.rows == _STEPS - since and found.lineage == expected
                if not whole or found.different_rows or found.different_shards:
                    misses.append(f"{case.name}, fork of {what}: {found}")
            left = uncounted(folder / "trunk", _STEPS)
            if left:
                misses.append(f"{case.name}: histograms count {left} weights too few")
    with tempfile.TemporaryDirectory() as scratch:
        for what, since, worst in cool_down(Path(scratch)):
            rows.append(["denoiser, constant rate", what, since, "", "", "", f"rates within {worst:.1e}"])
            if worst > 1e-12:
                misses.append(f"{what}: rates differ by {worst:.3g} of the peak")
    notes = (
        f"Trunks of {_STEPS} steps. A fork begins from a checkpoint of the run named, with only `run_dir` and `fork` "
        "changed. Compared with the trunk: every row of `metrics.jsonl` from the fork's first step on (losses, "
        "gradient norms, learning rates, held-out figures, key hashes; not the clocks), and every byte of the "
        "last checkpoint's shards (weights, optimizer state, averages). The lineage is that of the last manifest. "
        "Histograms of the weights are on in all runs and count every weight once on any number of processes. "
        "Cool-downs (`configs/debug/denoiser_cooldown.yaml`): the logged rates against "
        "peak x (n - i) / n at the i-th of n steps."
    )
    columns = ["run", "fork of", "after step", "rows", "rows that differ", "shards that differ", "lineage"]
    return Proof("A fork, and a fork of a fork, equal their trunk", columns, rows, misses, notes)
