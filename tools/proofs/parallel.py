"""ZeRO stages and sequence degrees on 2 and 4 processes against a plain one: gradients, weights after 10 steps."""

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

from tools.proofs._parallel_worker import Case
from tools.proofs.table import Proof

NAME = "parallel"
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-5

NOTES = """
A DiT of 2 blocks with text (fp32, every parameter redrawn so that no layer is zero, 45 tokens: an odd count, so that
sequence degrees 2 and 4 pad), global batch 8, clipping at norm 1. *Plain* is torch alone in one process, the whole
batch in one backward pass, sharing no code with `ltd.parallel`. *Gradient* is the relative L2 difference of the first
step's gradient before clipping, *worst tensor* the same for the worst single tensor (of those that carry more than
1e-4 of the norm), *weights* the largest difference of a weight after 10 steps.

Limits: gradient and worst tensor 1e-5 everywhere, weights 1e-5 with SGD. AdamW divides by the gradient's own size, so
where the true gradient is zero (a key bias behind a softmax) it turns rounding into full steps of the learning rate;
its weights are shown without a limit. For the same reason a wrong factor would hide behind AdamW: the last rows of
two processes halve every loss, and must fail.
"""


def all_cases() -> list[Case]:
    """List the rows of two processes; the last two are wrong on purpose."""
    sgd = [
        Case(zero, sequence=degree, accumulation=accumulation)
        for zero in range(4)
        for degree in (1, 2)
        for accumulation in (1, 2)
    ]
    adamw = [Case(zero, sequence=degree, kind="adamw") for zero in range(4) for degree in (1, 2)]
    recomputed = [Case(2, sequence=2, checkpointing="full"), Case(3, sequence=2, checkpointing="full")]
    return [*sgd, *adamw, *recomputed, Case(2, factor=0.5), Case(3, sequence=2, factor=0.5)]


def wide_cases() -> list[Case]:
    """List the rows of four processes: several sequence groups, and one over all."""
    return [Case(2, sequence=2, accumulation=2), Case(3, sequence=2), Case(2, sequence=4)]


def launch(cases: Sequence[Case], *, processes: int = 2, timeout_s: float = 400) -> list[dict[str, Any]]:
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
    limited = ["gradient", "worst"] + (["weights"] if result["kind"] == "sgd" else [])
    return [f"{figure} {result[figure]:.3g}, needed {LIMIT:g}" for figure in limited if not result[figure] <= LIMIT]


def measure() -> Proof:
    """Measure every row of the page.

    Returns:
        The table; a right row that breaks a limit is a miss, and so is the wrong row if it breaks none.
    """
    rows, misses = [], []
    for result in launch(all_cases()) + launch(wide_cases(), processes=4):
        broken = misses_of(result)
        wrong = result["factor"] != 1.0
        name = f"{result['processes']} processes, zero {result['zero']}, sequence {result['sequence']}"
        if wrong and not broken:
            misses.append(f"halved gradients ({name}) passed")
        if not wrong:
            misses += [f"{name}, {result['kind']}: {miss}" for miss in broken]
        rows.append(
            (
                result["processes"],
                result["zero"],
                result["sequence"],
                result["accumulation"],
                result["checkpointing"] == "full",
                result["kind"] + (" (halved gradients)" if wrong else ""),
                result["gradient"],
                result["worst"],
                result["weights"],
                "fails, as it must" if wrong and broken else "FAILS" if broken else "holds",
            )
        )
    columns = ("processes", "ZeRO", "sequence", "accumulation", "recompute", "optimizer")
    columns += ("gradient", "worst tensor", "weights", "verdict")
    return Proof("Many processes against one plain process", columns, rows, misses, NOTES)


def main() -> int:
    """Measure and write ``docs/proofs/parallel.md``; return 1 on a miss."""
    from tools.proofs.__main__ import main as run_proofs

    return run_proofs([NAME])


if __name__ == "__main__":
    sys.exit(main())
