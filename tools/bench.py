"""Time our parts against their peers: ``python tools/bench.py KIND [--only NAME] [--repeats N] [--force] [--tiny]``.

Every bench module of ``tools/benches`` belongs to a kind (data, autoencoder, denoiser, sampler, checkpoint, train,
sequence, mfu); all of a kind write one page, ``docs/benchmarks/KIND_HARDWARE_YYYYMM.md``. Adding a kind is adding a
module with another ``KIND``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import logging
import os
import pkgutil
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch

from tools import benches
from tools.benches.table import Row, bench_table

ROOT = Path(__file__).resolve().parent.parent
#: Share of all cores that other processes may use when a bench starts, in percent.
BUSY_LIMIT_PERCENT = 15.0
_LOOK_S = 3.0
_PACKAGES = ("torch", "deepspeed", "numpy", "av", "decord", "torchcodec", "webdataset", "pillow")
_BUSY, _TINY = " (busy machine)", " (tiny: no figure)"


def bench_modules() -> dict[str, dict[str, ModuleType]]:
    """Import all bench modules; return them by kind and name."""
    kinds: dict[str, dict[str, ModuleType]] = {}
    for info in sorted(pkgutil.iter_modules(benches.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{benches.__name__}.{info.name}")
        if hasattr(module, "measure"):
            kinds.setdefault(module.KIND, {})[module.NAME] = module
    return kinds


def busy_percent() -> float:
    """Return the share of all cores in use while this process sleeps, in percent."""
    return float(psutil.cpu_percent(interval=_LOOK_S))


def hardware() -> str:
    """Name the processor and its cores, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found.group(1).strip() if found else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}"


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        " with changes" if git("status", "--porcelain") else ""
    )


def typed(arguments: argparse.Namespace) -> str:
    """Write the command that measures the same again."""
    options = [arguments.kind, *(["--only", arguments.only] if arguments.only else [])]
    options += ["--repeats", str(arguments.repeats)]
    options += [f"--{name}" for name in ("force", "tiny") if getattr(arguments, name)]
    return " ".join(["python tools/bench.py", *options])


def header(command: str, busy: float, modules: Sequence[ModuleType], *, tiny: bool = False) -> list[str]:
    """Say how the figures came about.

    Args:
        command: What was typed.
        busy: Load of the machine by others before the start, in percent.
        modules: The benches: each says its shapes and how it is laid out over processes.
        tiny: Whether the smallest sizes were measured.

    Returns:
        Lines of a Markdown list.
    """
    sizes = [f"{what} ({one.NAME}): {text}" for one in modules for what, text in _said(one, tiny)]
    return [
        f"Command: `{command}`",
        f"Machine: {hardware()} ({torch.backends.cpu.get_cpu_capability()}), "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB of memory, {platform.system()}",
        f"Versions: Python {platform.python_version()}, {', '.join(_version(package) for package in _PACKAGES)}",
        f"Commit: {_commit()}",
        f"Threads: torch {torch.get_num_threads()}, decoders 1, loader 1",
        f"Load by other processes before the start: {busy:.0f} % of all cores (limit {BUSY_LIMIT_PERCENT:g} %)",
        *sizes,
    ]


def _said(module: ModuleType, tiny: bool) -> tuple[tuple[str, str], tuple[str, str]]:
    shapes = module.TINY_SHAPES if tiny else module.SHAPES
    return ("Shapes", shapes), ("Parallel layout", module.LAYOUT)


def page(kind: str, lines: Sequence[str], rows: Sequence[Row], summaries: Sequence[str], *, mark: str) -> str:
    """Write a page.

    Args:
        kind: Kind of benches.
        lines: The header.
        rows: All rows.
        summaries: Lines below the table.
        mark: What is put behind the systems and the summaries of a disturbed run.

    Returns:
        Markdown.
    """
    notes = (
        "Median (smallest-largest) over the rounds; each round runs every system once, in a turning order. A ratio is "
        "the system's time over ours in the same round: above 1, ours is faster. CPU time includes child processes."
    )
    parts = [f"# Benchmark: {kind}", "\n".join(f"- {line}" for line in lines), bench_table(rows, mark=mark)]
    return "\n\n".join([*parts, *(["\n".join(line + mark for line in summaries)] if summaries else []), notes]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benches of a kind; return 2 where the kind is unknown, 3 where the machine is busy."""
    parser = argparse.ArgumentParser(prog="python tools/bench.py", description=__doc__)
    parser.add_argument("kind", help="kind of benches, such as data")
    parser.add_argument("--only", help="one bench of the kind")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one that warms up")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too, and mark the rows")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to see that it runs; marks the rows")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the page")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    kinds = bench_modules()
    modules = kinds.get(arguments.kind, {})
    if arguments.only is not None:
        modules = {name: module for name, module in modules.items() if name == arguments.only}
    missing = [reason for module in modules.values() if (reason := getattr(module, "missing", str)())]
    if missing and not arguments.tiny:
        print(f"bench: {missing[0]}")
        return 2
    if not modules or arguments.repeats < 1:
        known = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
        asked = f"{arguments.kind}{f' --only {arguments.only}' if arguments.only else ''} --repeats {arguments.repeats}"
        print(f"bench: got {asked}, needed one of {known}, and --repeats of 1 or more")
        return 2
    busy = busy_percent()
    if busy > BUSY_LIMIT_PERCENT and not arguments.force:
        print(
            f"bench: other processes use {busy:.0f} % of the cores, needed at most {BUSY_LIMIT_PERCENT:g} %; wait, or "
            "measure all the same with --force, which marks the rows"
        )
        return 3
    torch.set_num_threads(1)
    rows: list[Row] = []
    summaries: list[str] = []
    for module in modules.values():
        found = module.measure(arguments.repeats, tiny=arguments.tiny)
        rows += found
        summaries += module.summary(found) if hasattr(module, "summary") else []
    mark = (_BUSY if busy > BUSY_LIMIT_PERCENT else "") + (_TINY if arguments.tiny else "")
    lines = header(typed(arguments), busy, list(modules.values()), tiny=arguments.tiny)
    text = page(arguments.kind, lines, rows, summaries, mark=mark)
    part = f"-{arguments.only}" if arguments.only else ""  # one bench must not take the place of the whole page
    name = f"{arguments.kind}{part}_{_slug(hardware())}_{datetime.datetime.now(datetime.UTC):%Y%m}.md"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / name).write_text(text, encoding="utf-8")
    print(text)
    return 0


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
