"""Rates of training: how much work was done in how long, by which share of the devices' peak, over a logging interval.

Nothing here waits for a device: what is known to devices alone travels in the step's own sum over processes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from ltd import storage
from ltd.config import ConfigError
from ltd.data import MicroBatch, PackedBatch
from ltd.parallel.config import ParallelConfig
from ltd.parallel.layout import Layout
from ltd.planning import Peak, Rates, Workload, find_peak, measure_peak, rates
from ltd.planning.devices import Precision

logger = logging.getLogger(__name__)

#: What the hardware of a run is, in its directory.
HARDWARE = "hardware.json"
#: Parts of the names under which profilers list collectives.
_COLLECTIVES = ("nccl", "rccl", "gloo:")


@dataclass(frozen=True, kw_only=True)
class AccountingConfig:
    """What a run measures of itself. Nothing here changes what is learned."""

    #: Whether rates, shares of the peak and memory are logged.
    enabled: bool = True
    #: Time a matrix product at the start also where the table has the device's peak; where it has none, always done.
    measure_peak: bool = True
    #: Steps between those whose collectives are timed, by a profiler, which slows that one step; 0 = none.
    communication_every: int = 500
    #: Steps between rows of ``ledger.jsonl``, which each checkpoint and the last step write too; 0 = no ledger.
    ledger_every: int = 100
    #: Parts of the distribution of training times that the ledger keeps apart.
    time_quantiles: int = 8
    #: Data sets of more shards than this are one source of the ledger.
    max_shards: int = 256

    def __post_init__(self) -> None:
        for name, least in (("communication_every", 0), ("ledger_every", 0), ("time_quantiles", 1), ("max_shards", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed {least} or more")


@dataclass(frozen=True)
class Hardware:
    """The device of a process and its peak."""

    device: str
    precision: Precision
    #: From the table; None for a device that is not in it.
    table: Peak | None
    #: Operations per second of a product that was timed; None where none was.
    measured: float | None

    @property
    def peak(self) -> float | None:
        """Operations per second that utilisation is a share of: the table's, else what was measured."""
        known = None if self.table is None else self.table.flops(self.precision)
        return known or self.measured

    def describe(self) -> str:
        """Say it in a line."""
        known = None if self.table is None else self.table.flops(self.precision)
        parts = [f"{known / 1e12:.4g} by the table ({self.table.name})" if known and self.table else "not in the table"]
        parts += [f"{self.measured / 1e12:.3g} measured"] if self.measured else []
        return f"{self.device}: dense peak in 10^12 {self.precision} operations per second: {', '.join(parts)}"

    def to_plain(self) -> dict[str, Any]:
        """Give what is stored."""
        known = None if self.table is None else self.table.flops(self.precision)
        return {
            "device": self.device,
            "precision": self.precision,
            "table_name": None if self.table is None else self.table.name,
            "table_flops": known,
            "measured_flops": self.measured,
        }


def find_hardware(device: torch.device, parallel: ParallelConfig, *, measure: bool) -> Hardware:
    """Look the device up, and time a product where that is asked for or the table does not know it.

    Args:
        device: This process's.
        parallel: Its precision is read.
        measure: Whether to time a product in any case.

    Returns:
        What was found.
    """
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else "CPU"
    precision: Precision = "bf16" if parallel.precision == "bf16" else "fp32"
    if precision == "fp32" and gpu and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    table = find_peak(name) if gpu else None
    measured = None
    if measure or table is None or table.flops(precision) is None:
        measured = _measured_once(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return Hardware(name, precision, table, measured)


@functools.cache
def _measured_once(device: torch.device, dtype: torch.dtype) -> float:
    return measure_peak(device, dtype)


class Accounting:
    """Add up steps and give the row of an interval; reads allocators' own statistics, and waits for no device.

    Args:
        config: What is measured.
        layout: Processes of the run.
        parallel: Its parallel section.
        run_dir: Where ``hardware.json`` goes.
        several: Whether steps are of several sizes, which are then listed one by one too.
    """

    #: Most memory this process had held when a step last began its GPU's peak anew, over all stages.
    _held: ClassVar[float] = 0.0

    def __init__(
        self, config: AccountingConfig, layout: Layout, parallel: ParallelConfig, run_dir: str, *, several: bool
    ) -> None:
        self.config, self.layout, self.several = config, layout, several
        self._peak: float | None = None
        self._measured: float | None = None
        if config.enabled:
            hardware = find_hardware(layout.device, parallel, measure=config.measure_peak)
            self._peak, self._measured = hardware.peak, hardware.measured
            if layout.is_main:
                logger.info("%s", hardware.describe())
                storage.write_json(Path(run_dir) / HARDWARE, {**hardware.to_plain(), "devices": layout.world_size})
        self._buckets: dict[str, _Sum] = {}
        self._communication_s, self._measured_step_s = 0.0, 0.0
        #: Whether the step that runs is one whose collectives are timed.
        self._watched = False
        #: Size of the last step whose collectives were timed.
        self._watched_bucket = ""
        self._row: dict[str, float] = {}

    def flags(self) -> list[float]:
        """Give this process's numbers for the step's sum: seconds of collectives, of how long, and its memory.

        Of the memory, the most held so far, then the most held since the step began.
        """
        if not self.config.enabled:
            return []
        memory, of_step = ([0.0] * self.layout.world_size for _ in range(2))
        rank = self.layout.global_rank
        of_step[rank] = memory_peak(self.layout.device)
        memory[rank] = max(Accounting._held, of_step[rank])
        flags = [self._communication_s, self._measured_step_s, *memory, *of_step]
        self._communication_s = self._measured_step_s = 0.0
        return flags

    @contextlib.contextmanager
    def watching(self, step: int, last: int) -> Iterator[None]:
        """Time the collectives of a step, if it is one of those; the next step's sum takes the figure along.

        Args:
            step: The step that runs inside.
            last: The step with which the loop ends.
        """
        self._begin_memory()
        alone = self.layout.world_size == 1
        if not self.config.enabled or alone or not is_watched(step, last, self.config.communication_every):
            yield
            return
        self._watched = True
        gpu = self.layout.device.type == "cuda"
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CUDA if gpu else kinds.CPU], acc_events=True) as profiler:
            began = time.perf_counter()
            yield
            if gpu:
                torch.cuda.synchronize(self.layout.device)
            self._measured_step_s = time.perf_counter() - began
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if any(part in event.name.lower() for part in _COLLECTIVES)
        ]
        self._communication_s = min(covered(spans) / 1e6, self._measured_step_s)

    def _begin_memory(self) -> None:
        """Let the peak of the GPU's memory be that of the coming step, where sizes are told apart."""
        device = self.layout.device
        if self.config.enabled and self.several and device.type == "cuda":
            Accounting._held = max(Accounting._held, memory_peak(device))
            torch.cuda.reset_peak_memory_stats(device)

    def add(self, bucket: str, work: Workload, step_s: float, flags: Sequence[float], *, wait_s: float) -> None:
        """Add a step.

        Args:
            bucket: Size of its samples.
            work: What it amounted to, over all processes.
            step_s: Its seconds.
            flags: Sums over processes of what ``flags`` gave.
            wait_s: Of its seconds, those that the slowest process waited for data.
        """
        if not self.config.enabled:
            return
        watched, self._watched = self._watched, False
        communication_s, measured_s, *memory = flags
        if measured_s:  # of the watched step before this one
            self._row["perf/communication_share"] = communication_s / measured_s
            if self.several:
                self._row[f"perf/bucket/{self._watched_bucket}/communication_share"] = communication_s / measured_s
        processes = len(memory) // 2
        self._row["perf/memory_peak_gb"] = max(memory[:processes]) / 1e9
        if watched:  # its profiler took time of its own
            self._watched_bucket = bucket
        else:
            self._buckets.setdefault(bucket, _Sum()).add(work, step_s, wait_s, max(memory[processes:]))

    def row(self) -> dict[str, float]:
        """Give the metrics of the steps since the last row, and begin anew."""
        if not self._buckets:
            return {}
        whole = _Sum()
        for part in self._buckets.values():
            whole.work, whole.seconds = whole.work + part.work, whole.seconds + part.seconds
        row = self._row | self._metrics(whole, "perf/")
        for name, part in self._buckets.items() if self.several else ():
            row |= self._metrics(part, f"perf/bucket/{name}/")
            row |= {f"perf/bucket/{name}/{figure}": value for figure, value in part.figures().items()}
        self._buckets, self._row = {}, {}
        return row

    def _metrics(self, part: _Sum, prefix: str) -> dict[str, float]:
        found: Rates = rates(part.work, part.seconds, self.layout.world_size, self._peak)
        row = {f"{prefix}{name}": value for name, value in vars(found).items() if value is not None}
        if self._measured is not None and self._measured != self._peak:
            measured = rates(part.work, part.seconds, self.layout.world_size, self._measured)
            row[f"{prefix}mfu_of_measured"] = measured.mfu or 0.0
        return row


@dataclass
class _Sum:
    work: Workload = field(default_factory=Workload)
    seconds: float = 0.0
    steps: int = 0
    wait_s: float = 0.0
    memory: float = 0.0

    def add(self, work: Workload, seconds: float, wait_s: float, memory: float) -> None:
        self.work, self.seconds, self.steps = self.work + work, self.seconds + seconds, self.steps + 1
        self.wait_s, self.memory = self.wait_s + wait_s, max(self.memory, memory)

    def figures(self) -> dict[str, float]:
        return {
            "step_s": self.seconds / self.steps,
            "data_wait_share": self.wait_s / max(self.seconds, 1e-9),
            "memory_peak_gb": self.memory / 1e9,
        }


def is_watched(step: int, last: int, interval: int) -> bool:
    """Say whether a step's collectives are timed: each ``interval`` steps (0: never), and before the last one.

    No step comes after the last that could take its figure along, so in its place the one before it is timed.
    """
    if not interval or step == last:
        return False
    return step % interval == 0 or (step + 1 == last and last % interval == 0)


def bucket_of(batch: MicroBatch) -> str:
    """Name the size of a micro-batch's samples: frames, height and width of what was loaded, or ``packed``."""
    return "packed" if isinstance(batch, PackedBatch) else str(batch.shape)


def memory_peak(device: torch.device) -> float:
    """Tell the most memory this process has held so far, in bytes: of the GPU, or its resident set on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Measure the union of intervals (begin, end)."""
    length, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length
