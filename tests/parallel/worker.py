"""One process of the distributed tests: runs every check in turn and writes what it measured; the tests assert.

One launch for all checks, because importing DeepSpeed takes longer than most of them. Run as
``-m tests.parallel.worker OUT.json FOLDER``.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.parallel.checkpoint_checks import check_disk_full, check_elastic, check_ema, check_resume, check_wrong_model
from tests.parallel.encode_check import check_encoded_once
from tests.parallel.engine_checks import (
    check_accumulation_count,
    check_bf16,
    check_layout,
    check_limit,
    check_lr,
    check_non_finite,
    check_unused,
    check_views,
)
from tests.parallel.family_check import FAMILY_ROWS, WHOLE, check_family
from tests.parallel.packed_check import check_packed
from tests.parallel.recompute_checks import check_compiled, check_modes
from tests.parallel.sequence_checks import check_conditioned, check_sequence
from tools.proofs._parallel_worker import Case, run_case

STAGES = (0, 1, 2, 3)
#: Rows of the ``parallel`` proof that are in the tests too.
PROOF_ROWS = (
    Case(0, sequence=2, accumulation=2),
    Case(2),
    Case(2, sequence=2, accumulation=2),
    Case(3, sequence=2, checkpointing="full"),
    Case(1, sequence=2, heads=3, packed=True, repeat=True),
    Case(2, unequal=True, offload="optimizer"),
    Case(2, factor=0.5),
    Case(2, sequence=2, wrong_seam=True),
)


def checks(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {"layout": check_layout, "sequence": check_sequence}
    for zero in STAGES:
        for name, function in {
            "views": check_views,
            "lr": check_lr,
            "unused": check_unused,
            "count": check_accumulation_count,
            "ema": check_ema,
            "bf16": check_bf16,
        }.items():
            found[f"{name}-{zero}"] = lambda f=function, z=zero: f(z)
        for precision in ("fp32", "bf16"):
            found[f"limit-{zero}-{precision}"] = lambda z=zero, p=precision: check_limit(z, p)
            found[f"non_finite-{zero}-{precision}"] = lambda z=zero, p=precision: check_non_finite(z, p)
            found[f"resume-{zero}-{precision}"] = lambda z=zero, p=precision: check_resume(z, p, folder)
    for zero, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")):
        name = f"offload-{zero}-{offload}"
        found[f"{name}-views"] = lambda z=zero, o=offload: check_views(z, o)
        found[f"{name}-unused"] = lambda z=zero, o=offload: check_unused(z, o)
        for precision in ("fp32", "bf16"):
            found[f"{name}-limit-{precision}"] = lambda z=zero, p=precision, o=offload: check_limit(z, p, o)
            found[f"{name}-non_finite-{precision}"] = lambda z=zero, p=precision, o=offload: check_non_finite(z, p, o)
    for index, case in enumerate(PROOF_ROWS):
        found[f"proof-{index}"] = lambda c=case: run_case(c)
    found["encoded"] = check_encoded_once
    for zero, heads in ((0, 2), (3, 3)):
        found[f"conditioned-{zero}-{heads}"] = lambda z=zero, h=heads: check_conditioned(2, z, h)
    for zero, name in FAMILY_ROWS:
        degree = 1 if name in WHOLE else 2
        found[f"family-{zero}-{name}"] = lambda d=degree, z=zero, n=name: check_family(d, z, n)
    for degree, zero, heads in ((1, 2, 2), (2, 0, 1), (2, 3, 3)):
        found[f"packed-{degree}-{zero}"] = lambda d=degree, z=zero, h=heads: check_packed(d, z, h)
    for source, target in ((2, 3), (3, 0), (0, 1), (1, 2)):
        found[f"elastic-{source}-{target}"] = lambda s=source, t=target: check_elastic(s, t, folder)
    for degree, zero, precision in ((2, 0, "fp32"), (1, 2, "bf16"), (2, 3, "fp32"), (2, 3, "bf16")):
        found[f"modes-{degree}-{zero}-{precision}"] = lambda d=degree, z=zero, p=precision: check_modes(d, z, p)
    for zero in (0, 2):
        found[f"compiled-{zero}"] = lambda z=zero: check_compiled(z)
    found["disk_full"] = lambda: check_disk_full(folder)
    found["wrong_model"] = lambda: check_wrong_model(folder)
    return found


def main(out: str, folder: str) -> None:
    results = {}
    for name, function in checks(Path(folder)).items():
        start = time.monotonic()
        try:
            results[name] = function()
        except Exception:
            # A check fails on all processes alike; the others still run.
            results[name] = {"error": traceback.format_exc()}
        results[name]["seconds"] = time.monotonic() - start
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
