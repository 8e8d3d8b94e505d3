"""One process of the sequence bench: the same attention by each system in turn; under torchrun.

``-m tools.benches._sequence_worker OUT.json REPEATS full|tiny``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import groups
from torch import Tensor

from ltd.nn.attention import attend
from ltd.parallel import Layout, ParallelConfig
from ltd.parallel.sequence import TokenSeam

TOKENS, HEAD_DIM = (32, 8) if sys.argv[-1] == "tiny" else (1024, 64)
#: Attentions per timed run.
RUNS = 3
#: Heads that both 2 and 4 divide, that neither divides, and fewer than the 4 processes.
HEADS = (8,) if sys.argv[-1] == "tiny" else (8, 7, 3)
TOLERANCE = 1e-5

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class System:
    """One attention, and what it took."""

    work: str
    name: str
    run: Callable[[], None]
    missing: str = ""
    collectives: int = 0
    num_bytes: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """List what each collective sends to other processes, in bytes."""
    sent: list[int] = []
    original = dist.all_to_all_single

    def counted(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        splits = args[1] if len(args) > 1 else kwargs.get("input_split_sizes")
        rank, world = dist.get_rank(), dist.get_world_size()
        rows = splits[rank] if splits else len(input) // world
        sent.append((len(input) - rows) * input[:1].numel() * input.element_size())
        return original(output, input, *args, **kwargs)

    dist.all_to_all_single = counted
    try:
        yield sent
    finally:
        dist.all_to_all_single = original


def whole(num_heads: int) -> list[Tensor]:
    """Draw q, k and v ``(1, n, heads, head_dim)``, the same on all processes."""
    generator = torch.Generator().manual_seed(num_heads)
    return [torch.randn(1, TOKENS, num_heads, HEAD_DIM, generator=generator) for _ in range(3)]


def own(layout: Layout, num_heads: int) -> list[Tensor]:
    """Take this process's tokens of q, k and v."""
    size = TOKENS // layout.sequence
    return [x[:, layout.sequence_rank * size :][:, :size].clone().requires_grad_() for x in whole(num_heads)]


def ours(layout: Layout, local: Callable[..., Tensor]) -> Attention:
    """Make the attention of ``ltd.parallel.sequence``."""
    seam = TokenSeam(layout)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seam.num_tokens = TOKENS
        return seam.attend(local, q, k, v)

    return run


def theirs(layout: Layout, local: Callable[..., Tensor]) -> Attention:
    """Make DeepSpeed's attention over the same group."""
    module = DistributedAttention(local, layout.sequence_group, scatter_idx=2, gather_idx=1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module(q, k, v, 0)
        return out

    return run


def nothing(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Stand for attention that costs nothing."""
    return q


def train(attention: Attention, tensors: list[Tensor]) -> list[Tensor]:
    """Run forward and backward; return output and gradients."""
    for tensor in tensors:
        tensor.grad = None
    out = attention(*tensors)
    out.backward(torch.ones_like(out))
    return [out.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


def check(attention: Attention, layout: Layout, num_heads: int) -> None:
    """Compare output and gradients with the whole sequence in this process."""
    expected = train(attend, [x.requires_grad_() for x in whole(num_heads)])
    size = TOKENS // layout.sequence
    for got, want in zip(train(attention, own(layout, num_heads)), expected, strict=True):
        part = want[:, layout.sequence_rank * size :][:, :size]
        error = float((got - part).abs().max() / want.abs().max())
        if not error < TOLERANCE:
            raise RuntimeError(f"differs from the whole attention by {error:.1e}, needed {TOLERANCE:g}")


def systems_of(layout: Layout, num_heads: int) -> list[System]:
    """List what is timed with this many heads, after a check of both systems."""
    found = []
    for name, make in (("ltd", ours), ("deepspeed", theirs)):
        missing = ""
        try:
            check(make(layout, attend), layout, num_heads)
        except AssertionError as error:
            missing = str(error).split(";")[0]
        tensors = own(layout, num_heads)
        attention, exchange = make(layout, attend), make(layout, nothing)

        def forward(attention: Attention = attention, tensors: list[Tensor] = tensors) -> None:
            with torch.no_grad():
                attention(*tensors)

        def both(attention: Attention = attention, tensors: list[Tensor] = tensors) -> None:
            train(attention, tensors)

        def alone(attention: Attention = exchange, tensors: list[Tensor] = tensors) -> None:
            with torch.no_grad():
                attention(*tensors)

        for work, run in (("forward", forward), ("forward and backward", both), ("exchange alone, forward", alone)):
            found.append(System(f"{num_heads} heads, {work}", name, run, missing))
    return found


def count(system: System, layout: Layout) -> None:
    """Fill in the collectives of one run, and the bytes over all processes."""
    with counting() as sent:
        system.run()
    system.collectives = len(sent)
    system.num_bytes = sum(layout.gather_objects(sum(sent)))


def cpu_s() -> float:
    """Return the CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def clock(system: System, layout: Layout) -> tuple[float, float]:
    """Time some runs; return wall seconds of the slowest process and CPU seconds of all, for one run."""
    layout.barrier()
    cpu, began = cpu_s(), time.perf_counter()
    for _ in range(RUNS):
        system.run()
    mine = (time.perf_counter() - began, cpu_s() - cpu)
    walls, cpus = zip(*layout.gather_objects(mine), strict=True)
    return max(walls) / RUNS, sum(cpus) / RUNS


def skip_kernel() -> None:
    """Keep deepspeed from compiling a kernel for minutes that only all-reduces at inference call."""
    # By its name in full: as an attribute, `deepspeed.comm.torch` is pip's torch.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def main(out: str, repeats: str, _size: str) -> None:
    """Run all systems in turn, one round to warm up; the main process writes what each took."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    layout = Layout.from_environment(ParallelConfig(sequence=world))
    skip_kernel()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    groups.mpu = SimpleNamespace(get_sequence_parallel_rank=lambda: layout.sequence_rank)  # it asks for odd heads
    systems = [system for num_heads in HEADS for system in systems_of(layout, num_heads)]
    present = [system for system in systems if not system.missing]
    for system in present:
        count(system, layout)
    for turn in range(int(repeats) + 1):
        shift = turn % len(present)
        for system in present[shift:] + present[:shift]:
            took = clock(system, layout)
            if turn:
                system.times.append(took)
    if layout.is_main:
        rows = [
            {"work": s.work, "system": s.name, "missing": s.missing, "times": s.times}
            | {"collectives": s.collectives, "bytes": s.num_bytes}
            for s in systems
        ]
        Path(out).write_text(json.dumps(rows))
    layout.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
