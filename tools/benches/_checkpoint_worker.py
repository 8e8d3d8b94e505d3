"""One process of the checkpoint bench: the same sharded state saved and loaded by each system in turn; under torchrun.

``-m tools.benches._checkpoint_worker OUT.json FOLDER REPEATS full|tiny``.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ltd.parallel import Ema, EmaConfig, Layout, ParallelConfig, checkpoint
from ltd.parallel.frozen import FrozenWeights
from ltd.parallel.interface import MasterShard, restore_shards
from ltd.storage import Reader

_BLOCKS, _WIDTH = (1, 32) if sys.argv[-1] == "tiny" else (7, 512)
_STATES = ("exp_avg", "exp_avg_sq")


class ShardedState:
    """What an engine holds of a transformer's weights, cut in equal halves over the processes; nothing trains.

    Args:
        layout: This process's position.
    """

    def __init__(self, layout: Layout) -> None:
        self.applied_steps = 1
        self.module = nn.ModuleDict({f"block{index}": _block() for index in range(_BLOCKS)})
        self.frozen = FrozenWeights(self.module, ParallelConfig())
        self._shards = []
        generator = torch.Generator().manual_seed(layout.global_rank)
        for name, parameter in self.module.named_parameters():
            part = parameter.numel() // layout.world_size
            data, *state = (torch.randn(part, generator=generator) for _ in range(1 + len(_STATES)))
            start = layout.global_rank * part
            states = dict(zip(_STATES, state, strict=True))
            self._shards.append(MasterShard(name, tuple(parameter.shape), start, data, states, True))

    def master_shards(self) -> list[MasterShard]:
        """List the shards."""
        return self._shards

    def load_shards(self, reader: Reader, step: int) -> None:
        """Restore the shards."""
        restore_shards(self._shards, reader)

    def refresh_weights(self) -> None:
        """Do nothing: there are no forward weights."""

    def resolved_config(self) -> dict[str, Any]:
        """Describe nothing."""
        return {}


def _block() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "norm": nn.LayerNorm(_WIDTH),
            "qkv": nn.Linear(_WIDTH, 3 * _WIDTH),
            "out": nn.Linear(_WIDTH, _WIDTH),
            "up": nn.Linear(_WIDTH, 4 * _WIDTH),
            "down": nn.Linear(4 * _WIDTH, _WIDTH),
        }
    )


@dataclass
class System:
    """One way to do one work."""

    work: str
    name: str
    before: Callable[[int], None]
    run: Callable[[int], None]
    after: Callable[[int], None]


class Bench:
    """The state, and the systems that save and load it.

    Args:
        folder: Scratch folder that all processes see.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout = Layout.from_environment(ParallelConfig())
        self.state: Any = ShardedState(self.layout)
        self.ema = Ema(self.state, EmaConfig(decays=(0.999,)))
        self.blocking = self._saver("blocking", background=False)
        self.background = self._saver("background", background=True)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))  # the rest of it needs a GPU
        self.tensors = self._distributed()
        self.sums = self._sums()
        self.loaded = self._saver("load", background=False).save(1, {})
        dcp.save(self.tensors, checkpoint_id=folder / "dcp-load")

    @property
    def num_megabytes(self) -> float:
        """Megabytes of the whole state."""
        local = sum(value.to_local().nbytes for value in self.tensors.values())
        return local * self.layout.world_size / 1e6

    def systems(self) -> list[System]:
        """List everything that is timed."""
        found = [
            System("save, on disk", "ltd", self._clean, self._save_ours, lambda turn: self.blocking.wait()),
            System("save, on disk", "DCP save", self._clean, lambda turn: self._save_dcp(1), _nothing),
            System("save, on disk", "DCP save, 2 threads", self._clean, lambda turn: self._save_dcp(2), _nothing),
            System("save, time blocked", "ltd", _nothing, self._begin_ours, self._end_ours),
        ]
        for cached, name in ((False, "DCP async_save"), (True, "DCP async_save, staging memory kept")):
            begin = lambda turn, c=cached: self._begin_dcp(c)  # noqa: E731
            found.append(System("save, time blocked", name, _nothing, begin, self._end_dcp))
        for cold in (False, True):
            work = "load, page cache dropped" if cold else "load, page cache warm"
            before = lambda turn, c=cold: self._before_load(c)  # noqa: E731
            found.append(System(work, "ltd", before, self._load_ours, self._check))
            found.append(System(work, "DCP load", before, self._load_dcp, self._check))
        return found

    def _saver(self, name: str, *, background: bool) -> checkpoint.Saver:
        return checkpoint.Saver(
            self.folder / name, self.state, self.ema, self.layout, keep_last=1, background=background
        )

    def _distributed(self) -> dict[str, DTensor]:
        """View the same memory as DTensors."""
        mesh = init_device_mesh("cpu", (self.layout.world_size,))
        found = {}
        for shard in self.state.master_shards():
            for group, value in {"master": shard.data, **shard.state}.items():
                found[f"{group}.{shard.name}"] = (value, shard.shape)
        for item in self.ema.slices():
            found[f"{item.group}.{item.name}"] = (item.data, item.shape)
        return {
            name: DTensor.from_local(value.view(-1, *shape[1:]), mesh, [Shard(0)], run_check=False)
            for name, (value, shape) in found.items()
        }

    def _sums(self) -> list[float]:
        return [float(_local(value).double().sum()) for value in self.tensors.values()]

    def _clean(self, turn: int) -> None:
        if self.layout.is_main:
            shutil.rmtree(self.folder / "dcp-save", ignore_errors=True)

    def _save_ours(self, turn: int) -> None:
        self.blocking.save(turn + 1, {})

    def _save_dcp(self, threads: int) -> None:
        dcp.save(self.tensors, storage_writer=FileSystemWriter(self.folder / "dcp-save", thread_count=threads))

    def _begin_ours(self, turn: int) -> None:
        self.background.save(turn + 1, {})

    def _end_ours(self, turn: int) -> None:
        self.background.wait()

    def _begin_dcp(self, cached: bool) -> None:
        target = self.folder / f"dcp-async-{cached}"
        stager = self.stager if cached else None
        self._future = dcp.async_save(self.tensors, checkpoint_id=target, async_stager=stager)

    def _end_dcp(self, turn: int) -> None:
        self._future.result()

    def _before_load(self, cold: bool) -> None:
        for value in self.tensors.values():
            _local(value).zero_()
        folders = [self.loaded, self.folder / "dcp-load"]
        _drop(folders) if cold else _read(folders)

    def _load_ours(self, turn: int) -> None:
        checkpoint.load(self.loaded, self.state, self.ema, self.layout)

    def _load_dcp(self, turn: int) -> None:
        dcp.load(self.tensors, storage_reader=FileSystemReader(self.folder / "dcp-load"))

    def _check(self, turn: int) -> None:
        if self._sums() != self.sums:
            raise RuntimeError("the loaded state is not the saved one")


def _local(value: DTensor) -> Tensor:
    return value.to_local()


def _nothing(turn: int) -> None:
    return None


def _files(folders: list[Path]) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def _read(folders: list[Path]) -> None:
    for file in _files(folders):
        file.read_bytes()


def _drop(folders: list[Path]) -> None:
    for file in _files(folders):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(out: str, folder: str, repeats: str, _size: str) -> None:
    """Run all systems in turn, one round to warm up; the main process writes the seconds of each."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    bench = Bench(Path(folder))
    systems = bench.systems()
    times: dict[str, dict[str, list[list[float]]]] = {}
    for turn in range(int(repeats) + 1):
        shift = turn % len(systems)
        for system in systems[shift:] + systems[:shift]:
            system.before(turn)
            gc.collect()
            bench.layout.barrier()
            cpu_s, began = _cpu_s(), time.perf_counter()
            system.run(turn)
            own = time.perf_counter() - began
            numbers = torch.tensor([_cpu_s() - cpu_s], dtype=torch.float64)
            bench.layout.sum_(numbers)
            wall_s = max(bench.layout.gather_objects(own))
            system.after(turn)
            if turn:
                times.setdefault(system.work, {}).setdefault(system.name, []).append([wall_s, float(numbers)])
    if bench.layout.is_main:
        Path(out).write_text(json.dumps({"megabytes": bench.num_megabytes, "times": times}))
    bench.layout.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
