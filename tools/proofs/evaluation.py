"""Measure FVD every few steps of runs: training does not notice, and figures do not depend on who computes them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.proofs import _runs
from tools.proofs.table import Cell, Proof

NAME = "evaluation"

_CONFIG, _AUTOENCODER = "configs/debug/denoiser_metrics.yaml", "configs/debug/autoencoder_metrics.yaml"
_STEPS, _EVERY, _STOP = 12, 4, 6
#: Largest difference of a figure; under ZeRO-3, whose engine adds the biases of linear layers apart, with its rounding.
_LIMIT, _LIMIT_ZERO3 = 1e-9, 1e-5
_MEASURES = (
    "metrics.measures=[{name: clips, features: {kind: packaged, name: transnetv2}, metrics: [fvd, kid]},"
    "{name: motion, features: {kind: packaged, name: frame_differences}, metrics: [fvd, precision_recall]},"
    "{metrics: [motion]}]"
)


@dataclass(frozen=True)
class Case:
    """One layout to train on with and without metrics."""

    name: str
    processes: int
    overrides: tuple[str, ...]
    #: Whether the run with metrics is stopped and resumed between two measurements.
    resumed: bool = False
    config: str = _CONFIG


ONE = Case("one process", 1, ("parallel.engine=torch",))
CASES = (
    Case("2 processes, ZeRO-2", 2, ("parallel.zero=2",)),
    Case("2 processes, ZeRO-3, resumed between", 2, ("parallel.zero=3",), resumed=True),
    Case("2 processes, ZeRO-3, sequence 2", 2, ("parallel.zero=3", "parallel.sequence=2")),
    Case("autoencoder, 2 processes, ZeRO-2", 2, ("parallel.engine=deepspeed", "parallel.zero=2"), config=_AUTOENCODER),
)


def figures(run_dir: Path) -> dict[tuple[int, str], float]:
    """Read the metrics of a run, by step and name."""
    return {
        (row["step"], name): float(value)
        for row in _runs.rows(run_dir)
        for name, value in row.items()
        if name.startswith("eval/")
    }


def difference(a: Path, b: Path) -> float:
    """Find the largest difference between the metrics of two runs; infinite if one has figures the other lacks.

    Args:
        a: A run.
        b: Another.

    Returns:
        The difference, 0 for equal bits.
    """
    first, second = figures(a), figures(b)
    if first.keys() != second.keys() or not first:
        return float("inf")
    return max(abs(value - second[name]) for name, value in first.items())


def time_share(run_dir: Path) -> float:
    """Compute the share of a run's time that its evaluations took."""
    rows = _runs.rows(run_dir)
    evaluated = sum(row.get("time/evaluate_s", 0.0) for row in rows)
    return float(evaluated / (evaluated + sum(row["time/step_s"] for row in rows)))


def train(case: Case, folder: Path, name: str, *overrides: str) -> Path:
    """Train a run of a case.

    Args:
        case: Layout.
        folder: Scratch folder.
        name: Of the run.
        overrides: Of the configuration.

    Returns:
        Its directory.
    """
    common = [case.config, f"run_dir={folder / name}", "evaluation.every=0", "checkpoint.every=1000", _MEASURES]
    _runs.start(case.processes, [*common, *case.overrides, *overrides], folder / "output.txt").wait()
    return folder / name


def with_and_without(case: Case, folder: Path, data: Sequence[str]) -> tuple[Path, Path]:
    """Train a run without metrics and one with them.

    Args:
        case: Layout.
        folder: Scratch folder.
        data: Overrides that name the shards.

    Returns:
        Both directories.
    """
    plain = train(case, folder, "plain", *data, f"steps={_STEPS}", "metrics.every=0")
    for steps in (_STOP, _STEPS) if case.resumed else (_STEPS,):
        measured = train(case, folder, "measured", *data, f"steps={steps}", f"metrics.every={_EVERY}")
    return plain, measured


def who_computes(config: str, trunk: Path, folder: Path, data: Sequence[str]) -> Iterator[tuple[str, float, float]]:
    """Measure the weights of one checkpoint, by a step at learning rate 0, on 1 and 2 processes and from the cache.

    Args:
        config: Configuration of the run.
        trunk: Run whose last checkpoint is measured.
        folder: Scratch folder.
        data: Overrides that name the shards.

    Yields:
        What was compared with one process that computes everything, the largest difference of its figures, its limit.
    """
    still = [*data, f"resume={trunk}", "optim.lr=0", f"steps={_STEPS + 1}", f"metrics.every={_STEPS + 1}"]
    one = dataclasses.replace(ONE, config=config)
    alone = train(one, folder, "alone", *still, f"metrics.cache={folder / 'cache'}")
    again = train(one, folder, "again", *still, f"metrics.cache={folder / 'cache'}")
    yield "one process, features of real clips out of the cache", difference(alone, again), _LIMIT
    for zero, limit in ((2, _LIMIT), (3, _LIMIT_ZERO3)):
        layout = ("parallel.engine=deepspeed", f"parallel.zero={zero}")
        case = Case(f"2 processes, ZeRO-{zero}", 2, layout, config=config)
        shared = train(case, folder, f"zero{zero}", *still, f"metrics.cache={folder / f'cache{zero}'}")
        yield f"{case.name}, features computed by both", difference(alone, shared), limit
    for file in (folder / "cache").iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    mended = train(one, folder, "mended", *still, f"metrics.cache={folder / 'cache'}")
    yield "one process, a bit of each cached file flipped", difference(alone, mended), _LIMIT


def measure() -> Proof:
    """Train every case twice and compare; then measure one checkpoint in several ways."""
    rows: list[Sequence[Cell]] = []
    misses = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            data = _runs.make_data(folder / "toy")
            if case.config == _AUTOENCODER:  # too few are held out
                data.append(f"metrics.reference={folder / 'toy' / 'train'}")
            plain, measured = with_and_without(case, folder, data)
            different = _runs.different_rows(plain, measured, aside=("eval/",))
            shards, num_shards = _runs.different_shards(plain, measured, _STEPS)
            steps = sorted({step for step, _ in figures(measured)})
            at = ", ".join(map(str, steps))
            share = f"{100 * time_share(measured):.0f} %"
            rows.append([f"{case.name}: with against without", at, len(different), f"{len(shards)} of {num_shards}"])
            rows[-1] = [*rows[-1], "", share]
            expected = [*range(_EVERY, _STEPS + 1, _EVERY), *([_STOP] if case.resumed else [])]
            if different or shards or steps != sorted(expected) or figures(plain):
                misses.append(f"{case.name}: rows {different}, shards {shards}, measured at {at}")
            if case in (CASES[0], CASES[-1]):
                whose = "autoencoder, " if case is CASES[-1] else ""
                for what, found, limit in who_computes(case.config, measured, folder, data):
                    rows.append([f"{whose}{what}: against one process, fresh", str(_STEPS + 1), "", "", found, ""])
                    if found > limit:
                        misses.append(f"{what}: figures differ by {found:.3g}")
    notes = (
        f"Runs of {_STEPS} steps (`{_CONFIG}`, and for the autoencoder `{_AUTOENCODER}`) with metrics every {_EVERY} "
        "steps against the same run with "
        "`metrics.every=0`: every row of `metrics.jsonl` (losses, gradient norms, rates, key hashes; not the clocks "
        "and not the figures themselves), and every byte of the last checkpoint's shards (weights, optimizer state, "
        "averages). The resumed run ended after step "
        f"{_STOP}, which is measured as its last. FVD and KID of TransNetV2, FVD and precision and recall of motion "
        "statistics, motion by optical flow; 16 samples of 9x32x32 in 4 solver steps from the averaged weights, beside "
        "as many real clips, and for the autoencoder reconstructions of 16 clips. The "
        "rows with a difference measure one checkpoint, by a step at learning rate 0; under ZeRO-3 DeepSpeed puts a "
        "linear layer of its own in the place of torch's, also in the network of features, which rounds otherwise. "
        "Time is that of all evaluations, with the loading of networks, over that and the steps; the debug network is "
        "so small that an evaluation outweighs many steps, and real runs set `metrics.every` by this share."
    )
    columns = ["runs", "measured after", "rows that differ", "shards that differ", "difference of figures", "time"]
    return Proof("Metrics while training change nothing, and depend on nobody", columns, rows, misses, notes)
