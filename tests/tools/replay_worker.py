"""One of two processes that replay steps in other layouts and with planted faults; run under torchrun:
``-m tests.tools.replay_worker RUN PACKED OUT``. Each case writes the trace ``OUT/<name>`` through the command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from ltd.parallel import Layout, ParallelConfig
from ltd.parallel.heads import HeadExchange
from tools import replay

STEP = 5
SEQUENCE = ("parallel.sequence=2", "parallel.zero=0")


def halve(x: Tensor) -> Tensor:
    return x * 0.5


def halve_gradient(x: Tensor) -> Tensor:
    """The same values, half the gradient."""
    return x * 0.5 + (x * 0.5).detach()


def halve_on_the_last(x: Tensor) -> Tensor:
    return x * 0.5 if dist.get_rank() == dist.get_world_size() - 1 else x


def plant(patch: pytest.MonkeyPatch, fault: Callable[[Tensor], Tensor]) -> None:
    """Change what the second all-to-all of every self-attention gives."""
    original = HeadExchange.to_tokens

    def wrong(self: HeadExchange, *args: Any) -> Tensor:
        return fault(original(self, *args))

    patch.setattr(HeadExchange, "to_tokens", wrong)


def main(run: str, packed: str, out: str) -> None:
    # A layout that stays open: the ones of the replays then share its process group.
    Layout.from_environment(ParallelConfig(timeout_s=100))
    cases: dict[str, tuple[str, tuple[str, ...], Callable[[Tensor], Tensor] | None]] = {
        "sequence": (run, SEQUENCE, None),
        "zero": (
            run,
            (
                "parallel.sequence=2",
                "parallel.zero=3",
                "parallel.accumulation=2",
                "parallel.activation_checkpointing=full",
            ),
            None,
        ),
        "data": (run, ("parallel.zero=2", "parallel.accumulation=2"), None),
        "packed": (packed, SEQUENCE, None),
        "forward": (run, SEQUENCE, halve),
        "last": (run, SEQUENCE, halve_on_the_last),
        "backward": (run, SEQUENCE, halve_gradient),
    }
    codes = {}
    for name, (run_dir, overrides, fault) in cases.items():
        with pytest.MonkeyPatch.context() as patch:
            if fault is not None:
                plant(patch, fault)
            command = [run_dir, "--step", str(STEP), "--trace", str(Path(out) / name), "parallel.engine=deepspeed"]
            codes[name] = replay.main([*command, *overrides])
    if dist.get_rank() == 0:
        (Path(out) / "codes.txt").write_text("\n".join(f"{name} {code}" for name, code in codes.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
