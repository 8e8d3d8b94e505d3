"""One process of the ``recompute`` proof: ``memory CASE`` measures one case, ``time`` times all of them in turn.

Writes one line of JSON to standard output.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ltd.denoisers import Dit, DitConfig
from ltd.parallel.activation import ATTENTION_OPERATIONS, checkpoint_blocks
from ltd.parallel.compilation import compile_blocks
from ltd.parallel.config import ParallelConfig

DEPTH = 8
LATENT = (4, 2, 32, 32)  # channels, t, h, w: 2,048 tokens
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to run the same model."""

    mode: str
    every: int = 1
    compile: str = "none"


CASES = {
    "none": Case("none"),
    "full": Case("full"),
    "full, every 2nd": Case("full", every=2),
    "selective": Case("selective"),
    "none, compiled": Case("none", compile="blocks"),
    "full, compiled": Case("full", compile="blocks"),
    "selective, compiled": Case("selective", compile="blocks"),
}


def build(case: Case) -> Dit:
    """Make the model with every parameter drawn, so that no layer is zero."""
    torch.manual_seed(0)
    model = Dit(DitConfig(latent_channels=LATENT[0], patch=(1, 1, 1), width=256, depth=DEPTH, num_heads=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    config = ParallelConfig(
        precision="fp32",
        activation_checkpointing=case.mode,  # type: ignore[arg-type]
        activation_checkpointing_every=case.every,
        compile=case.compile,  # type: ignore[arg-type]
    )
    checkpoint_blocks(model, config)
    compile_blocks(model, config)
    return model


def forward(model: Dit) -> Tensor:
    """Compute the loss of one fixed sample."""
    draw = torch.Generator().manual_seed(1)
    x_t, target = torch.randn(1, *LATENT, generator=draw), torch.randn(1, *LATENT, generator=draw)
    velocity = model(x_t, torch.full((1,), 0.5))
    assert isinstance(velocity, Tensor)
    return (velocity - target).square().mean()


def step(model: Dit) -> float:
    """Run forward and backward; the gradients stay allocated between steps, as an optimizer's do."""
    model.zero_grad(set_to_none=False)
    start = time.perf_counter()
    forward(model).backward()
    return time.perf_counter() - start


def memory(case: Case) -> dict[str, float]:
    """Measure the resident memory of one step above what the process holds between steps, in MB.

    Args:
        case: What to run.

    Returns:
        ``kept_mb`` after the forward pass, ``peak_mb`` over forward and backward.
    """
    model = build(case)
    step(model)
    model.zero_grad(set_to_none=False)
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_mb("VmRSS")
    loss = forward(model)
    libc.malloc_trim(0)
    kept = _status_mb("VmRSS") - before
    loss.backward()
    return {"kept_mb": kept, "peak_mb": _status_mb("VmHWM") - before}


class _CountAttention(TorchDispatchMode):
    """Count the attention operations that run; what a checkpoint gives back does not come by here."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ATTENTION_OPERATIONS
        return func(*args, **(kwargs or {}))


def num_attentions(model: Dit, *, compiled: bool) -> int:
    """Count the attentions that run in one step.

    Args:
        model: The model, warmed up.
        compiled: Whether it is compiled: torch runs no compiled code under a mode, and its profiler sees what a
            checkpoint gives back as if it had run.

    Returns:
        Calls, forward and backward.
    """
    if compiled:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(model)
        return sum(event.name in ATTENTION_OPERATIONS for event in profile.events())
    with _CountAttention() as counter:
        step(model)
    return counter.count


def times() -> dict[str, dict[str, Any]]:
    """Time every case, one step each in turn, and compare what they compute with the first one's."""
    models = {name: build(case) for name, case in CASES.items()}
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in models}
    reference = torch.empty(0)
    for name, model in models.items():
        step(model)
        found[name]["attentions"] = num_attentions(model, compiled=CASES[name].compile == "blocks") / DEPTH
        model.zero_grad()
        loss = forward(model)
        loss.backward()
        result = torch.cat(
            [loss.detach().view(1), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)]
        )
        reference = reference if len(reference) else result
        found[name]["difference"] = float((result - reference).norm() / reference.norm())
    for _ in range(ROUNDS):
        for name, model in models.items():
            found[name]["seconds"].append(step(model))
    return found


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(json.dumps(memory(CASES[sys.argv[2]]) if sys.argv[1] == "memory" else times()))
