"""Worlds in which one process is slow, runs something else, or lacks the run's directory; writes what each said."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ltd.command import command_line
from ltd.parallel import Layout, ParallelConfig, preflight
from tests.parallel import forked

DELAY_S = 0.12

DIGESTS = {"configuration": "a" * 64, "shard list": "b" * 64}


def check(folder: Path, digests: dict[str, str] = DIGESTS, *, per_host: int = 2) -> None:
    """Run it as a command does, on this process's own host by name."""
    layout = Layout.from_environment(ParallelConfig(timeout_s=20))
    socket.gethostname = lambda: f"node{layout.global_rank // per_host}"
    with command_line():
        began = time.monotonic()
        rates = preflight.check(layout, digests, storage_dir=folder)
        took_s = time.monotonic() - began
        (folder / f"rates{layout.global_rank}.json").write_text(json.dumps({"took_s": took_s, **rates}))
    layout.close()


def delayed(module: Any, name: str) -> None:
    """Make one measurement of this process slow."""
    build = getattr(module, name)

    def slowed(*arguments: Any) -> Callable[[], float | None]:
        action = build(*arguments)
        return lambda: (time.sleep(DELAY_S), action())[1]

    setattr(module, name, slowed)


def delay_one_each(rank: int, folder: Path) -> None:
    preflight._SIDE_CPU = 64
    os.fsync = lambda file: None  # a busy disk would delay all of them by more
    if rank:
        delayed(preflight, {1: "_matmul", 2: "_storage", 3: "_link"}[rank])
    check(folder, per_host=1)  # a neighbour's noise is told apart


def other_configuration(rank: int, folder: Path) -> None:
    check(folder, DIGESTS | ({"configuration": "c" * 64} if rank == 1 else {}))


def other_package(rank: int, folder: Path) -> None:
    versions = preflight.package_versions() | ({"torch": "2.12.0"} if rank == 2 else {})
    preflight.package_versions = lambda: versions
    check(folder)


def other_code(rank: int, folder: Path) -> None:
    files = preflight.code_digests() | ({"ltd/nn/norm.py": "f" * 64} if rank == 0 else {})
    preflight.code_digests = lambda: files
    check(folder)


def other_directory(rank: int, folder: Path) -> None:
    preflight._VISIBLE_S = 0.3
    own = folder / "unshared"
    own.mkdir(exist_ok=True)
    check(own if rank == 1 else folder)


def full_storage(rank: int, folder: Path) -> None:
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    check(folder)


CASES: dict[str, tuple[int, Callable[[int, Path], None]]] = {
    "equal": (2, lambda rank, folder: check(folder)),
    "delayed": (4, delay_one_each),
    "configuration": (2, other_configuration),
    "package": (3, other_package),
    "code": (3, other_code),
    "directory": (3, other_directory),
    "full": (2, full_storage),
}


def main(out: Path, folder: Path) -> None:
    found = {}
    for name, (size, body) in CASES.items():  # one after the other: they measure
        world = forked.prepare(folder / name)
        run_dir = folder / name / "run"
        run_dir.mkdir()
        forked.launch(world, lambda rank, body=body, run_dir=run_dir: body(rank, run_dir), world_size=size)
        (ends,) = forked.collect([world])
        found[name] = {
            "codes": [code for code, _ in ends],
            "logs": [(folder / name / f"log{rank}").read_text() for rank in range(size)],
            "files": sorted(path.name for path in run_dir.rglob("*") if path.is_file()),
            "rates": [json.loads(path.read_text()) for path in sorted(run_dir.glob("rates*.json"))],
        }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
