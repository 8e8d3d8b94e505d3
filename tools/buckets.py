"""Show how a run's data are batched: python tools/buckets.py CONFIG [dotted.key=value ...].

Prints each bucket (or view, or size of packed sample) with its samples, its share of the data, the batch, the part of
the token budget that stays empty, and what cropping and scaling cost; then a whole epoch planned, to show the balance.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ltd import config as config_io
from ltd.command import command_line
from ltd.config import ConfigError
from ltd.data.arrange import arrange, build_plan
from ltd.data.batching import Arrangement, frame_steps
from ltd.data.config import DataConfig
from ltd.data.mixture import MixedSource, open_sources
from ltd.data.plan import ViewConfig
from ltd.training.autoencoder import AutoencoderRun
from ltd.training.denoiser import DenoiserRun
from tools.proofs.table import Cell, markdown_table

COLUMNS = (
    "size",
    "samples",
    "share %",
    "tokens",
    "batch",
    "budget unused %",
    "cropped off %",
    "frames outside %",
    "enlarged %",
)


def losses(view: ViewConfig, ids: np.ndarray, source: MixedSource) -> tuple[float, float, float]:
    """Measure what a view costs its samples.

    Args:
        view: The view.
        ids: Its samples, at least one.
        source: All samples.

    Returns:
        Mean share of the picture that the crop cuts off; mean share of the frames that one window leaves out; share of
        the samples that are enlarged.
    """
    if not source.random_cuts:
        return 0.0, 0.0, 0.0
    columns = {name: column[ids].astype(np.float64) for name, column in source.entries.columns.items() if name in _USED}
    scale = np.maximum(view.height / columns["height"], view.width / columns["width"])
    kept = view.height * view.width / (columns["height"] * columns["width"] * scale**2)
    spans = (view.num_frames - 1) * frame_steps(columns["fps"], view.fps) + 1
    return float(1 - kept.mean()), float(1 - (spans / columns["frames"]).mean()), float((scale > 1 + 1e-9).mean())


_USED = ("height", "width", "frames", "fps")


def rows(data: DataConfig, source: MixedSource, arrangement: Arrangement) -> list[list[Cell]]:
    """Make the table.

    Args:
        data: The data section.
        source: The samples.
        arrangement: Views and the samples of each.

    Returns:
        Cells in the order of ``COLUMNS``.
    """
    total = len(source.entries)
    budget = getattr(data.batching, "tokens", None) if data.batching.kind == "buckets" else None
    found: list[list[Cell]] = []
    for view, ids, tokens, units in zip(
        arrangement.views, arrangement.ids, arrangement.tokens, arrangement.units, strict=True
    ):
        cropped, outside, enlarged = losses(view, ids, source) if len(ids) else (0.0, 0.0, 0.0)
        unused = None if budget is None else f"{100 * (1 - units * tokens / budget):.1f}"
        share = f"{100 * len(ids) / total:.1f}"
        batch = None if data.batching.kind == "packed" else units
        percents = [f"{100 * value:.1f}" for value in (cropped, outside, enlarged)]
        found.append([str(view), len(ids), share, tokens, batch, unused, *percents])
    return found


def _planned(
    data: DataConfig, source: MixedSource, arrangement: Arrangement, *, seed: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield token budget and tokens of each unit, for the steps of about one epoch (at most 500)."""
    plan = build_plan(data, source, arrangement, seed=seed)
    epoch = sum(order.num_units for kind in plan.kinds for order in kind.orders if order is not None)
    units = 0
    for step in range(500):
        planned = plan.step(step)
        sizes = np.array([arrangement.tokens[view] for view in planned.views], dtype=np.float64)
        costs = np.add.reduceat(sizes, np.concatenate([[0], planned.ends[:-1]]).astype(np.int64))
        tokens = getattr(data.batching, "tokens", 0)
        yield tokens * (len(costs) if data.batching.kind == "packed" else 1), costs
        units += len(costs)
        if units >= epoch:
            return


def unused(data: DataConfig, source: MixedSource, arrangement: Arrangement, *, seed: int) -> float:
    """Measure the share of the token budget that stays empty over an epoch of planned steps; 0 for fixed views."""
    return _empty(list(_planned(data, source, arrangement, seed=seed)))


def _empty(steps: list[tuple[int, np.ndarray]]) -> float:
    budget = sum(tokens for tokens, _ in steps)
    return 1 - sum(float(costs.sum()) for _, costs in steps) / budget if budget else 0.0


def summary(data: DataConfig, source: MixedSource, arrangement: Arrangement, *, seed: int, ranks: int) -> list[str]:
    """Plan steps of one epoch and say how full and how even they are.

    Args:
        data: The data section.
        source: The samples.
        arrangement: Views and the samples of each.
        seed: Seed of the run.
        ranks: Processes to deal the steps to.

    Returns:
        Lines of text.
    """
    lines = [f"{len(source.entries)} samples, {len(source.bad)} left out by the index or without caption"]
    if arrangement.left_out:
        lines.append("without a place: " + ", ".join(f"{n} {why}" for why, n in arrangement.left_out.most_common()))
    empty = [str(v) for v, ids in zip(arrangement.views, arrangement.ids, strict=True) if not len(ids)]
    if empty:
        lines.append(f"empty: {', '.join(empty)}")
    steps = list(_planned(data, source, arrangement, seed=seed))
    if data.batching.kind != "fixed":
        share = _empty(steps)
        lines.append(f"padding: {100 * share:.2f} % of the token budget stays empty over {len(steps)} steps")
    dealt = [costs.reshape(ranks, -1).sum(axis=1) for _, costs in steps if len(costs) % ranks == 0]
    if dealt:
        heavy = np.mean([cost.max() / cost.mean() - 1 for cost in dealt])
        lines.append(f"cost over {ranks} processes: the heaviest has {100 * heavy:.2f} % more tokens than the mean")
    return lines


def main(arguments: list[str]) -> int:
    """Print the table of a configuration; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    with command_line():
        run: Any = config_io.load(AutoencoderRun | DenoiserRun, arguments[0], arguments[1:])
        if not run.data.sets:
            raise ConfigError("data.shards: is null, needed tars or a latent cache to show the buckets of")
        source = open_sources(run.data)
        arrangement = arrange(run.data, source)
        print(markdown_table(COLUMNS, rows(run.data, source, arrangement)))
        for line in summary(run.data, source, arrangement, seed=run.seed, ranks=2):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
