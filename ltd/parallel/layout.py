"""Who this process is and how it talks to the others: the only reader of RANK, WORLD_SIZE and LOCAL_RANK.

Two groups: all processes (over which the engine sums gradients and ZeRO shards) and this process's sequence group of
``parallel.sequence`` neighbours. DeepSpeed is told of the first only.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ltd.config import ConfigError
from ltd.parallel.config import ParallelConfig
from ltd.storage import StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STORE_TIMEOUT = timedelta(seconds=10)


class Layout:
    """Position of this process, its device, and the collectives the project uses outside the engine.

    Every method that communicates must be called by all processes, in the same order.

    Args:
        config: Engine, sequence degree and time-out are read.
        global_rank: Index of this process in the world.
        world_size: Number of processes.
        local_rank: Index of this process on its host; picks the GPU.

    Raises:
        ConfigError: If the world does not fit the configuration.
    """

    def __init__(self, config: ParallelConfig, *, global_rank: int, world_size: int, local_rank: int) -> None:
        if world_size % config.sequence:
            raise ConfigError(
                f"parallel.sequence: must divide the world size, got sequence {config.sequence} "
                f"and world size {world_size}; set it to a divisor of {world_size}"
            )
        if config.engine == "torch" and world_size != 1:
            raise ConfigError(
                f"parallel.engine: torch runs one process, got world size {world_size}; set parallel.engine=deepspeed"
            )
        self.global_rank = global_rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.sequence = config.sequence
        self.sequence_rank = global_rank % config.sequence
        self.is_main = global_rank == 0
        self.device = _pick_device(local_rank)
        # The heartbeat ends a run that hangs at timeout_s, with the name of the culprit; collectives only after it.
        self.timeout = timedelta(seconds=1.25 * config.timeout_s + 15)
        #: Group of all processes with this run's time-out; None where nothing was initialised.
        self.world_group: dist.ProcessGroup | None = None
        #: Group of the neighbours that share a sample's tokens; None at degree 1.
        self.sequence_group: dist.ProcessGroup | None = None
        #: Collectives begun so far; the same on all processes once they stand at the same place.
        self.collectives = 0
        self._owns_process_group = False
        if config.engine == "deepspeed":
            self._make_groups()

    @classmethod
    def from_environment(cls, config: ParallelConfig) -> Layout:
        """Read what the launcher set; a process without a launcher is a world of one.

        Args:
            config: The parallel section.

        Returns:
            The layout, with process groups made (none for ``parallel.engine=torch``).

        Raises:
            ConfigError: If the world does not fit the configuration, or the launcher set only some of the variables.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        missing = [name for name in names if name not in os.environ]
        alone = {"RANK", "WORLD_SIZE"} <= set(missing)  # DeepSpeed may have left LOCAL_RANK behind
        if missing and not alone:
            raise ConfigError(f"environment: {', '.join(missing)} not set while the others are; start with torchrun")
        rank, world, local = (0, 1, 0) if alone else (int(os.environ[name]) for name in names)
        return cls(config, global_rank=rank, world_size=world, local_rank=local)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place.

        Args:
            tensor: Same shape and dtype everywhere, on ``device`` or the CPU.

        Returns:
            The same tensor.
        """
        self.collectives += 1
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.world_group)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over all processes.

        Args:
            tensor: Same shape and dtype everywhere.

        Returns:
            A new tensor.
        """
        return self.sum_(tensor.clone()) / self.world_size

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Join the rows of all processes.

        Args:
            rows: ``(n, ...)``, the same shape and dtype everywhere.

        Returns:
            ``(world_size * n, ...)`` by global rank, on every process.
        """
        if self.world_size == 1:
            return rows
        self.collectives += 1
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows.contiguous(), group=self.world_group)
        return torch.cat(parts)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            self.sum_(torch.zeros(1, device=self.device)).item()

    def broadcast_object(self, value: Any) -> Any:
        """Give every process the main process's value.

        Args:
            value: Plain value; read on the main process only.

        Returns:
            The main process's value.
        """
        return self.gather_objects(value if self.is_main else None)[0]

    def decide(self, work: Callable[[], T]) -> T:
        """Let the main process find something out for all, as file systems show new files to some hosts later.

        Args:
            work: Called on the main process only; it must not communicate.

        Returns:
            What it gave, a plain value, on every process.

        Raises:
            ConfigError, StorageError: What ``work`` raised, on every process.
        """
        found: Any = None
        if self.is_main:
            try:
                found = work()
            except (ConfigError, StorageError) as error:
                found = error
        found = self.broadcast_object(found)
        if isinstance(found, ConfigError | StorageError):
            raise found
        return cast("T", found)

    def lead(self, work: Callable[[Callable[[], None]], T], moved: Callable[[], None]) -> T:
        """Let the main process work alone while the others wait in step, so that none counts as standing still.

        Args:
            work: Called on the main process only, with what it must call every few seconds; no other communication.
            moved: Called at each of those steps on every process.

        Returns:
            What ``work`` gave, a plain value, on every process.
        """

        def step() -> None:
            self.any(False)
            moved()

        value: Any = None
        if self.is_main:
            value = work(step)
            self.any(True)
        else:
            while not self.any(False):
                moved()
        return cast("T", self.broadcast_object(value))

    def gather_objects(self, value: Any) -> list[Any]:
        """Collect one plain value per process.

        Args:
            value: This process's value; pickled between the processes of this run only.

        Returns:
            The values by global rank, on every process.
        """
        if self.world_size == 1:
            return [value]
        self.collectives += 1
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.world_group)
        return values

    def any(self, flag: bool) -> bool:
        """Say whether the flag is set on at least one process."""
        if self.world_size == 1:
            return flag
        return bool(self.sum_(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def gather_sequence(self, tensor: Tensor) -> list[Tensor]:
        """Collect a tensor from every member of the sequence group.

        Args:
            tensor: Contiguous, same shape on all members.

        Returns:
            The members' tensors by sequence rank.
        """
        if self.sequence_group is None:
            return [tensor]
        self.collectives += 1
        parts = [torch.empty_like(tensor) for _ in range(self.sequence)]
        dist.all_gather(parts, tensor, group=self.sequence_group)
        return parts

    def swap_sequence(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Exchange parts of axis 0 within the sequence group (an all-to-all).

        Args:
            tensor: ``(sum(send), ...)``, contiguous.
            send: Rows that go to each member, in order.
            receive: Rows that come from each member.

        Returns:
            ``(sum(receive), ...)``; the parts by member.
        """
        self.collectives += 1
        received = tensor.new_empty(sum(receive), *tensor.shape[1:])
        dist.all_to_all_single(received, tensor, list(receive), list(send), group=self.sequence_group)
        return received

    def time_link(self, tensor: Tensor) -> float:
        """Send a tensor to the next process, all around the world, and time the arrival of the previous one's.

        Args:
            tensor: Contiguous, same shape and dtype everywhere, on ``device``; two processes or more.

        Returns:
            Seconds until it was there.
        """
        self.collectives += 1
        received = torch.empty_like(tensor)
        following, previous = (self.global_rank + 1) % self.world_size, (self.global_rank - 1) % self.world_size
        transfers = [
            dist.P2POp(dist.irecv, received, previous, self.world_group),
            dist.P2POp(dist.isend, tensor, following, self.world_group),
        ]
        began = time.perf_counter()
        first, *others = dist.batch_isend_irecv(transfers)
        first.wait()
        received.view(-1)[0].item()  # waits for the device
        seconds = time.perf_counter() - began
        for work in others:
            work.wait()
        return seconds

    def open_store(self, prefix: str) -> Store | None:
        """Connect to the rendezvous store once more, for a thread of its own.

        Args:
            prefix: Keys of this use are kept apart from others', and from those of earlier attempts of the launcher.

        Returns:
            The store; None in a world of one process.
        """
        if self.world_size == 1:
            return None
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT)  # type: ignore[attr-defined]
        return PrefixStore(f"{_attempt()}/{prefix}", store)

    def close(self) -> None:
        """Leave the process group, if this layout made it."""
        if self._owns_process_group and dist.is_initialized():
            dist.destroy_process_group()
        self.world_group = self.sequence_group = None

    def _make_groups(self) -> None:
        if not dist.is_initialized():
            # DeepSpeed insists on the variable even in a world of one.
            os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=self._store(), rank=self.global_rank, world_size=self.world_size, timeout=self.timeout
            )
            self._owns_process_group = True
        self.world_group = dist.new_group(range(self.world_size), timeout=self.timeout)
        if self.sequence > 1:
            for first in range(0, self.world_size, self.sequence):
                group = dist.new_group(range(first, first + self.sequence), timeout=self.timeout)
                if first <= self.global_rank < first + self.sequence:
                    self.sequence_group = group

    def _store(self) -> Store:
        """Open the rendezvous store under a prefix of its own per restart: torchrun keeps stale keys otherwise."""
        if self.world_size == 1:
            return dist.HashStore()  # type: ignore[attr-defined]
        store, _, _ = next(iter(rendezvous("env://", timeout=self.timeout)))
        return PrefixStore(_attempt(), store)


def name_ranks(ranks: Sequence[int]) -> str:
    """Write sorted ranks in short: "0-3, 7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def name_processes(ranks: Sequence[int]) -> str:
    """Write "process 3" or "processes 0-3, 7"."""
    return f"process{'es' if len(ranks) > 1 else ''} {name_ranks(ranks)}"


def _attempt() -> str:
    """Name this start of the processes: apart from earlier ones where they share the launcher's store.

    A store of their own is new at each start. The launchers of several hosts do not count restarts alike, so the count
    must stay out of it there: the processes would never meet.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return "ltd"
    return f"ltd/restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _pick_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"--nproc-per-node: local rank {local_rank} has no GPU, this host has {count}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
