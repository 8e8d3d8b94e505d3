"""Layouts on 1, 2 and 4 processes against a plain one: loss, gradients, weights after 10 steps; and the same twice."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.proofs._parallel_worker import MISSING, SIZES, Case
from tools.proofs.table import Cell, Proof

NAME = "parallel"
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-5

NOTES = f"""
A DiT of 2 blocks with text (fp32, every parameter redrawn so that no layer is zero, 4 heads), 8 samples of 45 tokens
(an odd count, so that sequence degrees 2 and 4 pad), clipping at norm 1. *Plain* is torch alone in one process, the
whole batch before one update, sharing no code with `ltd.parallel`. *Packed*: the 8 samples have
{", ".join(str(t * h * w) for t, h, w in SIZES)} tokens, each process packs its own (so their lengths differ), plain
computes them one by one. *Unequal*: {len(MISSING)} samples weigh nothing, so that the last processes hold fewer that
count, or none; plain does not have them at all.

*Loss* is the largest relative difference of a step's loss over 10 steps, *gradient* the relative L2 difference of the
first step's gradient before clipping, *worst tensor* the same for the worst single tensor (of those that carry more
than 1e-4 of the norm), *weights* the largest difference of a weight after 10 steps. *Repeat*: the same layout trained
a second time gave the same bits in every loss, gradient and weight.

Limits: loss, gradient and worst tensor 1e-5 everywhere, weights 1e-5 with SGD. AdamW divides by the gradient's own
size, so where the true gradient is zero (a key bias behind a softmax) it turns rounding into full steps of the learning
rate; its weights are shown without a limit. For the same reason a wrong factor would hide behind AdamW: some rows are
wrong on purpose, and must fail. *Halved* halves every loss; *wrong seam* multiplies the gradient of one attention by
the sequence degree, forward untouched.
"""


def single_cases() -> list[Case]:
    """List the rows of one process."""
    deepspeed = [Case(zero, accumulation=1 + zero % 2) for zero in range(4)]
    torch_engine = [
        Case(0, repeat=True),
        Case(0, accumulation=4, kind="adamw"),
        Case(0, checkpointing="selective", every=2),
        Case(0, accumulation=2, packed=True, heads=5, checkpointing="full"),
        Case(0, accumulation=4, unequal=True),
    ]
    return [*(dataclasses.replace(case, engine="torch") for case in torch_engine), *deepspeed]


def pair_cases() -> list[Case]:
    """List the rows of two processes; the last ones are wrong on purpose."""
    stages = [
        Case(zero, sequence=degree, accumulation=1 + (zero + degree) % 2, repeat=(zero, degree) in ((2, 1), (3, 2)))
        for zero in range(4)
        for degree in (1, 2)
    ]
    adamw = [Case(zero, sequence=1 + zero % 2, kind="adamw") for zero in range(4)]
    recomputed = [
        Case(2, sequence=2, checkpointing="full"),
        Case(3, sequence=2, checkpointing="full", every=2),
        Case(2, sequence=2, checkpointing="selective"),
        Case(3, sequence=2, checkpointing="selective", every=2, repeat=True),
    ]
    lengths = [
        Case(0, sequence=2, packed=True),
        Case(1, accumulation=2, packed=True),
        Case(2, sequence=2, packed=True, accumulation=2, repeat=True),
        Case(3, sequence=2, packed=True, checkpointing="full"),
        Case(2, unequal=True),
        Case(3, sequence=2, accumulation=2, unequal=True),
    ]
    heads = [Case(2, sequence=2, heads=3), Case(3, sequence=2, heads=5), Case(1, sequence=2, heads=5, packed=True)]
    offloaded = [
        Case(1, offload="optimizer", accumulation=2),
        Case(2, offload="optimizer", sequence=2, repeat=True),
        Case(3, offload="optimizer", sequence=2),
        Case(3, offload="all"),
        Case(2, offload="optimizer", kind="adamw"),
    ]
    compiled = [Case(2, sequence=2, compile="blocks")]
    wrong = [Case(2, factor=0.5), Case(3, sequence=2, factor=0.5), Case(2, sequence=2, wrong_seam=True)]
    return [*stages, *adamw, *recomputed, *lengths, *heads, *offloaded, *compiled, *wrong]


def wide_cases() -> list[Case]:
    """List the rows of four processes: several sequence groups, and one over all; the last one is wrong on purpose."""
    return [
        Case(1, accumulation=2),
        Case(2, sequence=2, accumulation=2),
        Case(3, sequence=2, repeat=True),
        Case(2, sequence=4, repeat=True),
        Case(0, sequence=4, heads=3),
        Case(3, sequence=4, heads=2),
        Case(1, sequence=4, heads=5, packed=True),
        Case(3, sequence=2, packed=True, checkpointing="full"),
        Case(2, sequence=4, checkpointing="selective"),
        Case(2, sequence=2, unequal=True),
        Case(2, sequence=4, offload="optimizer"),
        Case(3, sequence=4, kind="adamw"),
        Case(3, sequence=4, wrong_seam=True),
    ]


def launch(cases: Sequence[Case], *, processes: int = 2, timeout_s: float = 600) -> list[dict[str, Any]]:
    """Run cases in one torchrun.

    Args:
        cases: What to measure.
        processes: World size.
        timeout_s: Seconds until the run is stopped.

    Returns:
        One dictionary per case: its fields and its figures.

    Raises:
        RuntimeError: If a process failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, todo = Path(folder, "out.json"), Path(folder, "cases.json")
        todo.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "tools.proofs._parallel_worker", str(out), str(todo)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode or not out.is_file():
            raise RuntimeError(f"torchrun ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}")
        results: list[dict[str, Any]] = json.loads(out.read_text())
    return results


def misses_of(result: dict[str, Any]) -> list[str]:
    """List the limits that a row breaks."""
    if "error" in result:
        return [result["error"]]
    limited = ["loss", "gradient", "worst"] + (["weights"] if result["kind"] == "sgd" else [])
    misses = [f"{name} {result[name]:.3g}, needed {LIMIT:g}" for name in limited if not result[name] <= LIMIT]
    return misses + (["two trainings of the same layout differ"] if result["identical"] is False else [])


def is_wrong(result: dict[str, Any]) -> bool:
    """Say whether a row has a deliberate error."""
    return result["factor"] != 1.0 or bool(result["wrong_seam"])


def _setting(result: dict[str, Any]) -> str:
    """Write what a row has besides its layout."""
    words = [
        f"{result['heads']} heads" if result["heads"] != 4 else "",
        "packed" if result["packed"] else "",
        "unequal" if result["unequal"] else "",
        f"offload {result['offload']}" if result["offload"] != "none" else "",
        "compiled" if result["compile"] != "none" else "",
        "**halved**" if result["factor"] != 1.0 else "",
        "**wrong seam**" if result["wrong_seam"] else "",
    ]
    return ", ".join(word for word in words if word)


def _row(result: dict[str, Any], broken: list[str]) -> tuple[Cell, ...]:
    every = f", every {result['every']}" if result["every"] > 1 else ""
    fails = "fails, as it must" if is_wrong(result) and "error" not in result else "FAILS"
    return (
        result["processes"],
        "torch" if result["engine"] == "torch" else str(result["zero"]),
        result["sequence"],
        result["accumulation"],
        result["checkpointing"] + every,
        _setting(result),
        result["kind"],
        *(result.get(name) for name in ("loss", "gradient", "worst", "weights")),
        "same bits" if result.get("identical") else None,
        fails if broken else "FAILS" if is_wrong(result) else "holds",
    )


def measure() -> Proof:
    """Measure every row of the page.

    Returns:
        The table; a right row that breaks a limit is a miss, and so is a wrong row that breaks none.
    """
    rows, misses = [], []
    results = launch(single_cases(), processes=1) + launch(pair_cases()) + launch(wide_cases(), processes=4)
    for result in results:
        broken = misses_of(result)
        row = _row(result, broken)
        rows.append(row)
        name = (
            f"{result['processes']} processes, zero {result['zero']}, sequence {result['sequence']}, {_setting(result)}"
        )
        if is_wrong(result) and (not broken or "error" in result):
            misses.append(f"a deliberate error ({name}) passed, or did not run: {broken}")
        if not is_wrong(result):
            misses += [f"{name}, {result['kind']}: {miss}" for miss in broken]
    columns = ["processes", "ZeRO", "sequence", "accumulation", "recompute", "also", "optimizer"]
    columns += ["loss", "gradient", "worst tensor", "weights", "repeat", "verdict"]
    return Proof("Many processes against one plain process", columns, rows, misses, NOTES)


def main() -> int:
    """Measure and write ``docs/proofs/parallel.md``; return 1 on a miss."""
    from tools.proofs.__main__ import main as run_proofs

    return run_proofs([NAME])


if __name__ == "__main__":
    sys.exit(main())
