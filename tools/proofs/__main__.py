"""Run the proofs and write their pages: ``python -m tools.proofs [NAME ...]`` (``make proofs ONLY=name``)."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from tools import proofs
from tools.proofs.table import Proof, render

ROOT = Path(__file__).resolve().parents[2]
NOT_PROOFS = {"__main__", "table"}


def proof_modules() -> dict[str, ModuleType]:
    """Import every module of this package that measures something, by its ``NAME``, in alphabetical order."""
    found: dict[str, ModuleType] = {}
    for info in sorted(pkgutil.iter_modules(proofs.__path__), key=lambda info: info.name):
        if info.name in NOT_PROOFS or info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{proofs.__name__}.{info.name}")
        if hasattr(module, "measure"):
            found[module.NAME] = module
    return found


def header(name: str) -> list[str]:
    """Say how a page was made: the command, the machine and the versions that decide the figures."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "deepspeed", "numpy"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return [
        f"Command: `make proofs ONLY={name}`",
        f"Machine: {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        f"Versions: {', '.join(versions)}",
    ]


def run_proofs(modules: dict[str, ModuleType], directory: Path) -> Iterator[tuple[str, Proof, float]]:
    """Measure proofs one after another and write each one's page as soon as it is known.

    Args:
        modules: Proof modules by name.
        directory: Folder of the pages; made when missing.

    Yields:
        Name, table and seconds taken.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        start = time.monotonic()
        proof = module.measure()
        (directory / f"{name}.md").write_text(render(proof, header(name)), encoding="utf-8")
        yield name, proof, time.monotonic() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named proofs, or all; return 1 when a limit was missed, 2 when a name is unknown."""
    parser = argparse.ArgumentParser(prog="python -m tools.proofs", description=__doc__)
    parser.add_argument("names", nargs="*", help="proofs to run; all when none is named")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "proofs", help="folder of the pages")
    arguments = parser.parse_args(argv)
    modules = proof_modules()
    unknown = [name for name in arguments.names if name not in modules]
    if unknown:
        print(f"no proof named {', '.join(unknown)}; there are: {', '.join(modules)}", file=sys.stderr)
        return 2
    chosen = {name: modules[name] for name in arguments.names or modules}
    missed = 0
    for done, (name, proof, seconds) in enumerate(run_proofs(chosen, arguments.out), start=1):
        verdict = f"{len(proof.misses)} MISSED" if proof.misses else "held"
        print(f"[{done}/{len(chosen)}] {name}: {len(proof.rows)} rows, {verdict}, {seconds:.1f} s", flush=True)
        for miss in proof.misses:
            print(f"    missed: {miss}", flush=True)
        missed += len(proof.misses)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
