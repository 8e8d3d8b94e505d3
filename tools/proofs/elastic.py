"""Move one run over several layouts by the launcher and ``parallel`` alone, and compare with the run that stayed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltd import storage
from tools.proofs import _runs
from tools.proofs.table import Cell, Proof

NAME = "elastic"
STEPS = 80
#: Largest relative difference of a step's loss.
LIMIT = 1e-4


@dataclass(frozen=True)
class Leg:
    """A part of the run on one layout."""

    name: str
    processes: int
    overrides: tuple[str, ...]


HOME = Leg("2 processes, ZeRO-2", 2, ("parallel.zero=2",))
LEGS = (
    HOME,
    Leg("4 processes, ZeRO-3, sequence 2", 4, ("parallel.zero=3", "parallel.sequence=2")),
    Leg("1 process, torch alone", 1, ("parallel.engine=torch",)),
    Leg(
        "2 processes, ZeRO-1, sequence 2, accumulation 2",
        2,
        ("parallel.zero=1", "parallel.sequence=2", "parallel.accumulation=2"),
    ),
)


@dataclass(frozen=True)
class Part:
    """What a leg has in common with the same steps of the run that stayed."""

    leg: Leg
    first_step: int
    last_step: int
    #: Steps whose key hash differs.
    different_keys: list[int]
    #: Largest relative difference of the training loss, of the gradient norm, and of held-out losses.
    loss: float
    grad_norm: float
    heldout: float | None


@dataclass(frozen=True)
class Comparison:
    """All parts, and the end."""

    parts: list[Part]
    #: Relative L2 difference of the last checkpoint, by group.
    groups: dict[str, float]
    keys_hashes: tuple[str, str]


def train_whole(folder: Path, *, steps: int = STEPS) -> list[str]:
    """Make data and train on one layout, in ``folder / "whole"``.

    Args:
        folder: Scratch folder.
        steps: Steps of the run.

    Returns:
        Overrides of the run, apart from its layout.
    """
    overrides = [f"steps={steps}", "checkpoint.every=1000", "evaluation.every=10", *_runs.make_data(folder / "toy")]
    _start(HOME, folder / "whole", overrides).wait()
    return overrides


def compare(legs: Sequence[Leg], folder: Path, overrides: Sequence[str], *, steps: int = STEPS) -> Comparison:
    """Train again on all layouts in turn, each stopped by SIGTERM, and compare.

    Args:
        legs: The layouts.
        folder: Scratch folder with the run that stayed, ``whole``.
        overrides: Its overrides, apart from its layout.
        steps: Steps of the run, the same number for every leg.

    Returns:
        The comparison.
    """
    whole, moved = folder / "whole", folder / "moved"
    ends = []
    for number, leg in enumerate(legs, start=1):
        run = _start(leg, moved, overrides)
        if number < len(legs):
            until = number * steps // len(legs)
            _runs.wait_for(lambda step=until: _runs.has_row(moved, step), run, f"step {until}")  # type: ignore[misc]
            run.terminate()
        run.wait()
        newest = storage.latest_checkpoint(moved)
        assert newest is not None
        ends.append(storage.checkpoint_step(newest))
    true, found = ({row["step"]: row for row in _runs.rows(run_dir)} for run_dir in (whole, moved))
    assert found.keys() == true.keys()
    parts = [
        _part(leg, [(found[step], true[step]) for step in range(first + 1, last + 1)])
        for leg, first, last in zip(legs, [0, *ends], ends, strict=False)
    ]
    last, expected = (storage.Reader(storage.checkpoint_path(run_dir, steps)) for run_dir in (moved, whole))
    groups = {group: _difference(last, expected, group) for group in sorted(expected.groups())}
    return Comparison(parts, groups, (true[steps]["data/keys_hash"], found[steps]["data/keys_hash"]))


def misses_of(found: Comparison) -> list[str]:
    """List the limits that are broken."""
    misses = [
        f"{part.leg.name}: loss differs by {part.loss:.3g}, needed {LIMIT:g}"
        for part in found.parts
        if not part.loss <= LIMIT
    ]
    return misses + [
        f"{part.leg.name}: other samples in steps {part.different_keys}" for part in found.parts if part.different_keys
    ]


def measure() -> Proof:
    """Move a run of 80 steps over four layouts and compare."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = train_whole(Path(folder))
        found = compare(LEGS, Path(folder), overrides)
    table: list[Sequence[Cell]] = [
        (
            part.leg.name,
            f"{part.first_step} to {part.last_step}",
            len(part.different_keys),
            part.loss,
            part.grad_norm,
            part.heldout,
        )
        for part in found.parts
    ]
    notes = f"""
One run of {STEPS} steps (fp32, AdamW): `train.py` is started with another number of processes and other `parallel.`
fields for each row, stopped by SIGTERM, and goes on from the checkpoint that it wrote then; nothing is converted. The
other run stayed on {HOME.name}. *Other samples*: steps whose key hash differs. *Loss*, *gradient norm* and
*held-out loss* are the largest relative differences of a step's row; limit of the loss {LIMIT:g}.

After the last step, relative L2 difference over all tensors:
{", ".join(f"`{group}` {value:.3g}" for group, value in found.groups.items())}. Key hash of the last step:

    stayed {found.keys_hashes[0]}
    moved  {found.keys_hashes[1]}
"""
    columns = ("layout", "steps", "other samples", "loss", "gradient norm", "held-out loss")
    title = "A run moves to another number of processes and goes on"
    return Proof(title, columns, table, misses_of(found), notes)


def _start(leg: Leg, run_dir: Path, overrides: Sequence[str]) -> _runs.Launched:
    arguments = [_runs.DEBUG_CONFIG, f"run_dir={run_dir}", *overrides, *leg.overrides]
    return _runs.start(leg.processes, arguments, run_dir.with_name("output.txt"))


def _part(leg: Leg, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Part:
    def largest(prefix: str) -> float | None:
        found = [
            abs(row[name] - true[name]) / abs(true[name])
            for row, true in pairs
            for name in true
            if name.startswith(prefix)
        ]
        return max(found, default=None)

    return Part(
        leg,
        pairs[0][0]["step"],
        pairs[-1][0]["step"],
        [row["step"] for row, true in pairs if row["data/keys_hash"] != true["data/keys_hash"]],
        largest("loss/") or 0.0,
        largest("optim/grad_norm") or 0.0,
        largest("eval/"),
    )


def _difference(found: storage.Reader, true: storage.Reader, group: str) -> float:
    tensors, expected = found.read_full(group), true.read_full(group)
    assert tensors.keys() == expected.keys()
    error = torch.stack([(tensors[name] - value).norm() for name, value in expected.items()]).norm()
    return float(error / torch.stack([value.norm() for value in expected.values()]).norm())
