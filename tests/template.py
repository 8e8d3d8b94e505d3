"""A process that has imported all that training needs, and forks worlds of it: one line of JSON in, one out, for each.

It computes nothing itself, so that no thread of a library is there to be lost in a fork.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from tests.parallel import forked

ROOT = Path(__file__).resolve().parents[1]
#: Scripts and modules that training imports at once or as it goes, slow ones first.
IMPORTED = (
    "train",
    "sample",
    "deepspeed",
    "deepspeed.comm.torch",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch._inductor.compile_fx",
)
#: What a launcher tells a process.
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WORLD += ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")


def run(rank: int, request: dict[str, Any]) -> None:
    """Become one process of a launch."""
    out = os.open(Path(request["folder"]) / f"out{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    # Who this process is has been set by now.
    world = {name: os.environ[name] for name in WORLD} if request["processes"] else {}
    os.environ.clear()
    os.environ.update(request["environment"] | world)
    target = request["target"]
    sys.argv = [target, *request["arguments"]]
    if target.endswith(".py"):
        runpy.run_path(str(ROOT / target), run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


def serve() -> None:
    """Answer requests with the exit codes by rank, until standard input ends."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what is imported may print
    for name in IMPORTED:
        importlib.import_module(name)
    for line in requests:
        request = json.loads(line)
        world = forked.prepare(Path(request["folder"]))
        size = request["processes"] or 1
        forked.launch(world, lambda rank, r=request: run(rank, r), world_size=size)  # type: ignore[misc]
        (ends,) = forked.collect([world], limit_s=request["timeout_s"])
        answers.write(json.dumps([code for code, _ in ends]) + "\n")


if __name__ == "__main__":
    serve()
