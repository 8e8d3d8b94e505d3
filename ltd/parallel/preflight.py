"""Before the first step: do all processes run the same thing, and does one of them run slower than the rest?

Compares digests of configuration, code, packages and shard lists, and refuses a difference by name. Measures matrix
products, the link to the next process, and storage, and warns of an outlier with its host. Takes a second or two.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ltd.config import ConfigError, digest
from ltd.parallel.layout import Layout, name_ranks

logger = logging.getLogger(__name__)

#: Packages whose versions decide what is computed.
PACKAGES = (
    "torch",
    "deepspeed",
    "numpy",
    "safetensors",
    "webdataset",
    "omegaconf",
    "einops",
    "decord",
    "av",
    "flash-attn",
)
#: A process is an outlier if it takes this many times the median of all.
FACTOR = 2.0
_REPEATS = 5
_LINK_BYTES = 4 << 20
_STORAGE_BYTES = 4 << 20
#: Shorter times than this (seconds) are noise, however they compare.
_FLOOR_S = 2e-3


def check(layout: Layout, digests: Mapping[str, str], *, storage_dir: Path) -> dict[str, float]:
    """Compare the processes of a run and measure them; called by all.

    Args:
        layout: This process's position.
        digests: What must be equal on all processes, by name; code and package versions are added.
        storage_dir: Directory of the run, where checkpoints will be written.

    Returns:
        ``preflight/<what>_<unit>`` -> the median over processes, and with ``_worst`` the slowest process's.

    Raises:
        ConfigError: If something differs between processes; names what, and the processes and hosts.
    """
    files = code_digests()
    compare(layout, {**digests, **{f"package {name}": version for name, version in package_versions().items()}})
    compare(layout, {"code": digest(files)}, details=files)
    sample = torch.ones(512, 512, dtype=torch.bfloat16 if layout.device.type == "cuda" else torch.float32)
    seconds = {
        "matmul": _measure(layout, _matmul(sample.to(layout.device))),
        "link": _measure(layout, _link(layout)),
        "storage": _measure(layout, _storage(layout, storage_dir)),
    }
    gathered = layout.gather_objects((socket.gethostname(), seconds))
    hosts = [host for host, _ in gathered]
    times = {kind: [found[kind] for _, found in gathered] for kind in seconds}
    if layout.is_main:
        for message in outliers(times, hosts):
            logger.warning("preflight: %s", message)
    return _rates(times)


def compare(layout: Layout, values: Mapping[str, str], *, details: Mapping[str, str] | None = None) -> None:
    """Refuse values that differ between processes.

    Args:
        layout: This process's position.
        values: By name; equal on all processes.
        details: Parts of the values, compared only where they differ, to say which part.

    Raises:
        ConfigError: If one differs, on all processes with the same message.
    """
    gathered = layout.gather_objects((socket.gethostname(), dict(values)))
    hosts = [host for host, _ in gathered]
    problems = _differences([found for _, found in gathered], hosts)
    if problems and details is not None:
        parts = layout.gather_objects(dict(details))
        problems = _differences(parts, hosts) or problems
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ConfigError(f"preflight: the processes do not all run the same: {shown}; make them equal")


def outliers(times: Mapping[str, list[float]], hosts: list[str]) -> list[str]:
    """Name the processes that are much slower than the rest.

    Args:
        times: Seconds of each process, by what was measured.
        hosts: Host of each process.

    Returns:
        One sentence per measurement and host with an outlier.
    """
    what = {"matmul": "matrix products", "link": "the link to the next process", "storage": "storage"}
    found = []
    for kind, values in times.items():
        median = statistics.median_low(values)
        slow: dict[str, list[int]] = {}
        for rank, value in enumerate(values):
            if value > FACTOR * median and value - median > _FLOOR_S:
                slow.setdefault(hosts[rank], []).append(rank)
        for host, ranks in slow.items():
            worst = max(values[rank] for rank in ranks)
            found.append(
                f"{what[kind]} on host {host} (processes {name_ranks(ranks)}) {worst / median:.1f} times slower than "
                f"the median ({1e3 * worst:.1f} against {1e3 * median:.1f} ms)"
            )
    return found


def code_digests() -> dict[str, str]:
    """Hash every Python file of this package and the command that was started, by relative name."""
    package = Path(__file__).resolve().parents[1]
    files = {f"{package.name}/{path.relative_to(package)}": path for path in sorted(package.rglob("*.py"))}
    script = Path(sys.argv[0])
    if script.is_file():
        files[script.name] = script
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in files.items()}


def package_versions() -> dict[str, str]:
    """Look up Python's version and those of the packages that decide what is computed; "none" where not installed."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def _differences(found: list[dict[str, str]], hosts: list[str]) -> list[str]:
    problems = []
    for name in sorted(set().union(*found)):
        values = [part.get(name, "missing") for part in found]
        if len(set(values)) == 1:
            continue
        groups = []
        for value in sorted(set(values), key=lambda value: -values.count(value)):
            ranks = [rank for rank, other in enumerate(values) if other == value]
            where = ", ".join(sorted({hosts[rank] for rank in ranks}))
            groups.append(f"{value[:16]} on processes {name_ranks(ranks)} (host {where})")
        problems.append(f"{name} is {' and '.join(groups)}")
    return problems


def _measure(layout: Layout, action: Callable[[], None]) -> float:
    """Take the median seconds of a few runs that all processes begin together; the first is not counted."""
    times = []
    for _ in range(_REPEATS + 1):
        layout.barrier()
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _matmul(sample: torch.Tensor) -> Callable[[], None]:
    def multiply() -> None:
        product = sample
        for _ in range(8):
            product = sample @ product.clamp(max=1.0)
        product.sum().item()  # waits for the device

    return multiply


def _link(layout: Layout) -> Callable[[], None]:
    payload = torch.zeros(_LINK_BYTES, dtype=torch.uint8, device=layout.device)

    def send_and_receive() -> None:
        layout.pass_on(payload)

    return send_and_receive


def _storage(layout: Layout, folder: Path) -> Callable[[], None]:
    payload = os.urandom(_STORAGE_BYTES)
    path = folder / f"preflight_{layout.global_rank:05d}.incomplete"

    def write_and_read() -> None:
        try:
            with path.open("wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            path.read_bytes()
        finally:
            path.unlink(missing_ok=True)

    return write_and_read


def _rates(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Turn seconds into rates."""
    units = {
        "matmul": ("tflops", 8 * 2 * 512**3 / 1e12),
        "link": ("gb_per_s", _LINK_BYTES / 1e9),
        "storage": ("gb_per_s", _STORAGE_BYTES / 1e9),
    }
    rates = {}
    for kind, values in times.items():
        unit, amount = units[kind]
        rates[f"preflight/{kind}_{unit}"] = amount / statistics.median_low(values)
        rates[f"preflight/{kind}_{unit}_worst"] = amount / max(values)
    return rates
