"""Write one self-contained HTML page about one run or several: ``tools/report.py RUN [RUN ...] [--out FILE]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltd.tracking.report import write_report
from ltd.tracking.run_record import read_run


def main(argv: Sequence[str] | None = None) -> int:
    """Read the runs and write the page; return 2 on a mistake the user can mend."""
    parser = argparse.ArgumentParser(prog="tools/report.py", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directory; several are drawn over each other"
    )
    parser.add_argument("--out", type=Path, help="HTML file; default: report.html in the first run directory")
    parser.add_argument(
        "--samples",
        nargs="*",
        type=Path,
        default=[],
        metavar="DIR",
        help="folders of samples, one per run, in the same order",
    )
    parser.add_argument("--media-mb", type=float, default=64.0, help="embed at most this much media, in megabytes")
    arguments = parser.parse_args(argv)
    if len(arguments.samples) > len(arguments.runs):
        parser.error(
            f"--samples: at most one folder per run, got {len(arguments.samples)} for {len(arguments.runs)} runs"
        )
    if not arguments.media_mb >= 0:  # NaN too
        parser.error(f"--media-mb: must be at least 0, got {arguments.media_mb}")
    folders = [*arguments.samples, *[None] * (len(arguments.runs) - len(arguments.samples))]
    out = arguments.out or arguments.runs[0] / "report.html"
    try:
        runs = [read_run(run, samples=folder) for run, folder in zip(arguments.runs, folders, strict=True)]
        left_out = write_report(runs, out, media_limit_mb=arguments.media_mb)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
