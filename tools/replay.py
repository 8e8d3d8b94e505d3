"""Take one step of a run again, or find the first difference between two traces of a step.

python tools/replay.py RUN --step N [--trace DIR] [dotted.key=value ...]
    takes step N again from the newest checkpoint before it (alone or under torchrun, in any layout), compares it with
    the run's metrics and lists its samples with their losses; --trace writes down what passed through the model
python tools/replay.py A B [--tolerance 1e-4]
    compares two traces and names the first sample, input, module output or gradient that differs

Exit code 0: equal within the tolerance; 1: different; 2: the command cannot be carried out as given.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ltd.command import command_line
from ltd.config import ConfigError
from ltd.parallel.interface import ProcessLostError
from ltd.training.guards import GuardError
from ltd.training.replay import Replay, load_run, replay
from ltd.training.trace import Trace, check_target
from ltd.training.trace_compare import Category, Comparison, Difference, compare

logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Define and read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="RUN|A", type=Path, help="run directory; or a trace")
    parser.add_argument("rest", metavar="B|dotted.key=value", nargs="*", help="the other trace; or changed fields")
    parser.add_argument("--step", type=int, help="step to take again, from 1 as in metrics.jsonl")
    parser.add_argument("--trace", type=Path, help="folder to write a trace of the step to")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative difference that counts as equal")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_intermixed_args(arguments)


def run_replay(run_dir: Path, step: int, trace: Path | None, overrides: Sequence[str], tolerance: float) -> int:
    """Take a step again and say what came of it.

    Args:
        run_dir: Directory of the run.
        step: Number of the step.
        trace: Folder to write a trace to, if any.
        overrides: Changed fields of the configuration.
        tolerance: Largest relative difference that counts as equal.

    Returns:
        The exit code.
    """
    if trace is not None:
        check_target(trace)
    found = replay(load_run(run_dir, overrides), run_dir, step, trace=trace is not None)
    differences = found.differences()
    if found.is_main:
        if trace is not None and found.trace is not None:
            found.trace.write(trace)
        print("\n".join(describe(found, run_dir, tolerance)))
        if trace is not None:
            print(f"\ntrace: {trace}")
    # The main process alone: a launcher would end it, at work on the trace, for another one's code.
    return int(found.is_main and any(not difference <= tolerance for difference in differences.values()))


def describe(found: Replay, run_dir: Path, tolerance: float) -> list[str]:
    """Write the report of a step that was taken again.

    Args:
        found: What came out.
        run_dir: Directory of the run.
        tolerance: Largest relative difference that counts as equal.

    Returns:
        Lines.
    """
    start = f"the checkpoint of step {found.start}" if found.start else "the beginning"
    lines = [f"step {found.step} of {run_dir}, from {start}"]
    if found.incident is not None:
        lines.append(f"not taken: {found.incident}")
    differences = found.differences()
    if found.recorded is None and found.incident is None:
        lines.append(f"{run_dir} has no row of step {found.step} to compare with")
    elif differences and not any(differences.values()):
        lines.append("equal to the run's row bit for bit")
    elif differences:
        beyond = any(not difference <= tolerance for difference in differences.values())
        lines.append(f"the run's row is {'different' if beyond else 'equal within the tolerance'} ({tolerance:g})")
    lines.append("")
    for name, value in found.row.items():
        recorded = f", recorded {_number(found.recorded[name])}" if name in (found.recorded or {}) else ""
        apart = f", relative {differences[name]:.3g}" if differences.get(name) else ""
        lines.append(f"  {name:<20} {_number(value)}{recorded}{apart}")
    lines += ["", f"  {'draw':>8} {'loss':>12} {'weight':>6}  key (shard)"]
    for sample in found.samples:
        lines.append(f"  {sample.draw:>8} {sample.loss:>12.6g} {sample.weight:>6g}  {sample.key} ({sample.shard})")
    return lines


def describe_comparison(found: Comparison) -> list[str]:
    """Write the report of a comparison.

    Args:
        found: The comparison.

    Returns:
        Lines; the verdict last.
    """
    lines = [*found.notes, ""] if found.notes else []
    lines.append(f"  {'':<9} {'compared':>8} {'differ':>8} {'above':>8}  largest difference")
    for category in get_args(Category):
        if category not in found.compared:
            continue
        mine = [difference for difference in found.differences if difference.category == category]
        above = [difference for difference in mine if difference.error > found.tolerance]
        counts = f"{found.compared[category]:>8} {len(mine):>8} {len(above):>8}"
        lines.append(f"  {category:<9} {counts}  {_short(found.worst(category))}")
    lines.append("")
    first = found.first
    if first is not None:
        lines.append(f"first difference: {first}")
        if first.category == "weight":
            lines.append(
                "the steps before went apart already: trace the step right after the checkpoint they start from"
            )
    elif found.differences:
        lines.append(f"equal within {found.tolerance:g}, not bit for bit")
    else:
        lines.append("equal bit for bit")
    return lines


@contextlib.contextmanager
def _without_news() -> Iterator[None]:
    """Keep the start of a run from telling what a replay changed: its directory, and that it evaluates nothing."""
    loggers = [logging.getLogger(f"ltd.training.{name}") for name in ("start", "session")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _short(difference: Difference | None) -> str:
    return "none" if difference is None else str(difference)


def _number(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.9g}"
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a hash


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse(arguments)
    with command_line(GuardError, ProcessLostError):
        if not args.tolerance >= 0:
            raise ConfigError(f"--tolerance: got {args.tolerance}, needed 0 or more")
        if args.step is not None:
            with _without_news():
                return run_replay(args.first, args.step, args.trace, args.rest, args.tolerance)
        if args.trace is not None or len(args.rest) != 1:
            raise ConfigError("needed RUN --step N, or two traces A B")
        found = compare(Trace.read(args.first), Trace.read(args.rest[0]), tolerance=args.tolerance)
        print("\n".join(describe_comparison(found)))
        return int(found.first is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
