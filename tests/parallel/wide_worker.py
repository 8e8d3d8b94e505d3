"""One process of the sequence-parallel tests on four processes; run as
``-m tests.parallel.wide_worker OUT.json``.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.parallel.packed_check import check_packed
from tests.parallel.sequence_checks import check_conditioned, check_sequence

#: (degree, ZeRO stage, heads), each through DeepSpeed; at degree 2 two groups train on the same samples.
CONDITIONED = ((4, 0, 3), (4, 3, 6))
PACKED = ((4, 0, 2), (4, 3, 3), (2, 0, 3))


def main(out: str) -> None:
    checks: dict[str, Callable[[], dict[str, Any]]] = {"sequence": lambda: check_sequence(4)}
    for degree, zero, heads in CONDITIONED:
        name = f"conditioned-{degree}-{zero}-{heads}"
        checks[name] = lambda d=degree, z=zero, h=heads: check_conditioned(d, z, h)
    for degree, zero, heads in PACKED:
        checks[f"packed-{degree}-{zero}-{heads}"] = lambda d=degree, z=zero, h=heads: check_packed(d, z, h)
    results = {}
    for name, function in checks.items():
        try:
            results[name] = function()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
