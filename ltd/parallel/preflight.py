"""Before the first step: do all processes run the same thing, and does one of them run slower than the rest?

Compares digests of configuration, code, packages and shard lists, and refuses a difference by name; checks that all see
the run's directory. Measures matrix products, links and storage, and warns of an outlier with its host. Takes a second
or two.
"""

from __future__ import annotations

import contextlib
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
from ltd.parallel.layout import Layout, name_processes

logger = logging.getLogger(__name__)

#: Packages whose versions decide what is read, computed and written.
PACKAGES = (
    "av",
    "decord",
    "deepspeed",
    "einops",
    "flash-attn",
    "numpy",
    "omegaconf",
    "pillow",
    "safetensors",
    "torch",
    "transformers",
    "triton",
    "webdataset",
    "xxhash",
)
#: A process is an outlier if it takes this many times the median of all.
FACTOR = 2.0
_REPEATS = 5
_TRANSFER_BYTES = 4 << 20
#: Products per run and their size, on a GPU and on a CPU: some milliseconds each.
_PRODUCTS, _SIDE_GPU, _SIDE_CPU = 8, 4096, 512
#: Differences below this many seconds are noise, whatever their ratio.
_FLOOR_S = 2e-3
#: Seconds that shared storage has to show a new file to all hosts.
_VISIBLE_S = 5.0


def check(layout: Layout, digests: Mapping[str, str], *, storage_dir: Path) -> dict[str, float]:
    """Compare the processes of a run and measure them; called by all.

    Args:
        layout: This process's position.
        digests: What must be equal on all processes, by name; code and package versions are added.
        storage_dir: Directory of the run, where checkpoints will be written.

    Returns:
        ``preflight/<what>_<unit>`` -> the median over processes, and with ``_worst`` the slowest process's.

    Raises:
        ConfigError: If something differs between processes, or one cannot use the directory; names what, and the
            processes and hosts. On all processes, with the same message.
    """
    files = code_digests()
    packages = {f"package {name}": version for name, version in package_versions().items()}
    compare(layout, {**digests, **packages, "code": digest(files)}, details={"code": files})
    unusable: list[str] = []
    _check_directory(layout, storage_dir)
    seconds = {
        "matmul": _measure(layout, _matmul(layout.device)),
        "all_reduce": _measure(layout, _all_reduce(layout)),
        "link": _measure(layout, _link(layout)),
        "storage": _measure(layout, _storage(layout, storage_dir, unusable)),
    }
    gathered = layout.gather_objects((socket.gethostname(), seconds, unusable[:1]))
    hosts = [host for host, _, _ in gathered]
    _refuse(storage_dir, {rank: problems[0] for rank, (_, _, problems) in enumerate(gathered) if problems}, hosts)
    times = {kind: [found[kind] for _, found, _ in gathered] for kind in seconds}
    if layout.is_main:
        for message in outliers(times, hosts):
            logger.warning("preflight: %s", message)
    return _rates(times, _product_flops(layout.device))


def has_fast_bf16() -> bool:
    """Tell whether the processor multiplies bf16 matrices by oneDNN; torch's own loops are many times slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False


def compare(
    layout: Layout, values: Mapping[str, str], *, details: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Refuse values that differ between processes.

    Args:
        layout: This process's position.
        values: By name; equal on all processes.
        details: Parts of some values, compared only where those differ, to say which part.

    Raises:
        ConfigError: If one differs, on all processes with the same message.
    """
    gathered = layout.gather_objects((socket.gethostname(), dict(values)))
    hosts = [host for host, _ in gathered]
    problems = _differences([found for _, found in gathered], hosts)
    for name in sorted(problems.keys() & (details or {}).keys()):
        assert details is not None
        parts = layout.gather_objects(dict(details[name]))
        problems |= {name: "; ".join(_differences(parts, hosts).values()) or problems[name]}
    if problems:
        shown = "; ".join([*problems.values()][:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ConfigError(f"preflight: the processes do not all run the same: {shown}; make them equal")


def outliers(times: Mapping[str, list[float]], hosts: list[str]) -> list[str]:
    """Name the processes that are much slower than the rest.

    Args:
        times: Seconds of each process for ``matmul``, ``storage`` and ``link`` (from the process before to it).
        hosts: Host of each process.

    Returns:
        One clause per measurement and host, or per link, that is an outlier.
    """
    found = []
    for kind, name in (("matmul", "matrix products"), ("storage", "storage")):
        slow: dict[str, list[int]] = {}
        for rank in _slow(times[kind]):
            slow.setdefault(hosts[rank], []).append(rank)
        for host, ranks in slow.items():
            worst = max(times[kind][rank] for rank in ranks)
            found.append(f"host {host} ({name_processes(ranks)}): {name} {_compared(worst, times[kind])}")
    for rank in _slow(times["link"]):
        before = (rank - 1) % len(hosts)
        ends = f"process {before} (host {hosts[before]}) to process {rank} (host {hosts[rank]})"
        found.append(f"link from {ends} {_compared(times['link'][rank], times['link'])}")
    return found


def _slow(seconds: list[float]) -> list[int]:
    median = statistics.median_low(seconds)
    return [rank for rank, value in enumerate(seconds) if value > FACTOR * median and value - median > _FLOOR_S]


def _compared(worst: float, seconds: list[float]) -> str:
    median = statistics.median_low(seconds)
    return f"{worst / median:.1f} times slower than the median ({1e3 * worst:.1f} against {1e3 * median:.1f} ms)"


def code_digests() -> dict[str, str]:
    """Hash every Python file of this package and the command that was started, by relative name."""
    package = Path(__file__).resolve().parents[1]
    files = {f"{package.name}/{path.relative_to(package)}": path for path in sorted(package.rglob("*.py"))}
    script = Path(sys.argv[0])
    if script.is_file():
        files[script.name] = script
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def package_versions() -> dict[str, str]:
    """Look up Python's version and those of the packages that decide what is computed; "none" where not installed."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def _differences(found: list[dict[str, str]], hosts: list[str]) -> dict[str, str]:
    """Say, by name, which values are not the same everywhere: the most frequent first."""
    problems = {}
    for name in sorted(set().union(*found)):
        values = [part.get(name, "missing") for part in found]
        if len(set(values)) == 1:
            continue
        groups = []
        for value in sorted(set(values), key=lambda value: (-values.count(value), values.index(value))):
            ranks = [rank for rank, other in enumerate(values) if other == value]
            where = ", ".join(sorted({hosts[rank] for rank in ranks}))
            shown = value[:12] if len(value) == 64 else value
            groups.append(f"{shown} on {name_processes(ranks)} (host {where})")
        problems[name] = f"{name} is {' and '.join(groups)}"
    return problems


def _check_directory(layout: Layout, folder: Path) -> None:
    """Make sure that all processes see what the main process writes."""
    path = folder / layout.broadcast_object(f"preflight_{time.time_ns()}.incomplete")
    problem = ""
    if layout.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            problem = str(error)
    layout.barrier()
    deadline = time.monotonic() + _VISIBLE_S
    while not problem and not os.path.exists(path):  # False without permission, where Path raises
        time.sleep(0.05)
        if time.monotonic() > deadline:
            problem = "a file that process 0 wrote there does not appear; it must be storage that all hosts share"
    gathered = layout.gather_objects((socket.gethostname(), problem))
    if layout.is_main:
        with contextlib.suppress(OSError):  # it may be what is reported here
            path.unlink()
    _refuse(folder, {rank: text for rank, (_, text) in enumerate(gathered) if text}, [host for host, _ in gathered])


def _refuse(folder: Path, problems: dict[int, str], hosts: list[str]) -> None:
    if problems:
        where = ", ".join(sorted({hosts[rank] for rank in problems}))
        ranks, text = name_processes(sorted(problems)), problems[min(problems)]
        raise ConfigError(f"run_dir: {folder} is of no use to {ranks} (host {where}): {text}")


def _measure(layout: Layout, action: Callable[[], float | None]) -> float:
    """Take the median seconds of a few runs that all processes begin together; the first is not counted."""
    times = []
    for _ in range(_REPEATS + 1):
        layout.barrier()
        began = time.perf_counter()
        own_s = action()
        times.append(time.perf_counter() - began if own_s is None else own_s)
    return statistics.median(times[1:])


def _product_flops(device: torch.device) -> float:
    return _PRODUCTS * 2.0 * (_SIDE_GPU if device.type == "cuda" else _SIDE_CPU) ** 3


def _matmul(device: torch.device) -> Callable[[], None]:
    gpu = device.type == "cuda"
    side, dtype = (_SIDE_GPU, torch.bfloat16) if gpu else (_SIDE_CPU, torch.float32)
    factor = torch.full((side, side), 1.0 / side, device=device, dtype=dtype)

    def multiply() -> None:
        product = factor
        for _ in range(_PRODUCTS):
            product = factor @ product
        product[0, 0].item()  # waits for the device

    return multiply


def _all_reduce(layout: Layout) -> Callable[[], None]:
    payload = torch.zeros(_TRANSFER_BYTES // 4, device=layout.device)

    def reduce() -> None:
        layout.sum_(payload)[0].item()

    return reduce


def _link(layout: Layout) -> Callable[[], float]:
    payload = torch.zeros(_TRANSFER_BYTES // 4, device=layout.device)
    return lambda: layout.time_link(payload)


def _storage(layout: Layout, folder: Path, unusable: list[str]) -> Callable[[], None]:
    payload = os.urandom(_TRANSFER_BYTES)
    path = folder / f"preflight_{layout.global_rank:05d}.incomplete"

    def write_and_read() -> None:
        try:
            with path.open("wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            path.read_bytes()
        except OSError as error:  # raised on all processes together, once all have measured
            unusable.append(str(error))
        with contextlib.suppress(OSError):
            path.unlink()

    return write_and_read


def _rates(times: Mapping[str, list[float]], flops: float) -> dict[str, float]:
    """Turn seconds into rates."""
    units = dict.fromkeys(times, ("gb_per_s", _TRANSFER_BYTES / 1e9)) | {"matmul": ("tflops", flops / 1e12)}
    rates = {}
    for kind, values in times.items():
        unit, amount = units[kind]
        rates[f"preflight/{kind}_{unit}"] = amount / statistics.median_low(values)
        rates[f"preflight/{kind}_{unit}_worst"] = amount / max(values)
    return rates
