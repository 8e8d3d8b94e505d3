"""Run a worker's checks under torchrun and read what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def launch(worker: str, processes: int, out: Path, *arguments: str) -> dict[str, Any]:
    """Run a module of ``tests.parallel`` that writes its results to ``out``, check by check."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", f"tests.parallel.{worker}", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def get(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Take the results of one check, which must not have failed."""
    assert "error" not in results[name], results[name]["error"]
    found: dict[str, Any] = results[name]
    return found
