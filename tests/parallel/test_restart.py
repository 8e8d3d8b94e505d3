"""torchrun's restart: the new processes must not meet the store keys of the killed ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.dist
@pytest.mark.slow
def test_processes_find_each_other_after_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    command += ["-m", "tests.parallel.restart_worker", str(tmp_path)]
    # Without launch/environment.sh's variable: the layout's own prefix has to do.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    # Stale keys cost minutes of retries (168 s measured without the prefix, 19 s with it), if they are overcome at all.
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["attempt 2, total 4.0"] * 2
