"""Run a command on several processes as torchrun would, in a tenth of its time.

A process of its own (``template.py``, one for each process that runs tests) has imported what training needs, and
forks the processes of every launch. What it costs to start, and to import torch and DeepSpeed, is paid once.
torchrun itself is in the tests of ``launch/``, ``tests/launch``, ``tests/proofs`` and of restarts.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def launch(target: str, *arguments: str, processes: int = 2, timeout_s: float = 300) -> str:
    """Run a script or module as ``__main__`` on gloo processes that must all end with exit code 0.

    Args:
        target: A ``.py`` file below the repository's root, such as ``train.py``, or a module's dotted name.
        arguments: What stands behind it on the command line.
        processes: Size of the world; 0 for one process that is told of none.
        timeout_s: Seconds after which they are killed.

    Returns:
        What the processes wrote to standard output, one behind another.

    Raises:
        AssertionError: If one failed, with the end of what each wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        asked = {"folder": f"{folder}/world", "target": target, "arguments": arguments, "environment": environment}
        codes = _ask({**asked, "processes": processes, "timeout_s": timeout_s})
        said = {path.name: path.read_text() for path in sorted(Path(folder, "world").glob("*[0-9]"))}
    ends = "".join(f"\n--- {name}:\n{text[-4000:]}" for name, text in said.items())
    assert set(codes) == {0}, f"exit codes {codes} of {target} {' '.join(arguments)}{ends}"
    return "".join(text for name, text in said.items() if name.startswith("out"))


def fork(target: str, *arguments: str) -> None:
    """Run a script or module in one process without a launcher, such as one that makes worlds of its own."""
    launch(target, *arguments, processes=0)


def train(*arguments: str) -> None:
    """Run ``train.py`` on two processes."""
    launch("train.py", *arguments)


def _ask(request: dict[str, Any]) -> list[int]:
    process = _template()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, "the process that forks others has ended"
    codes: list[int] = json.loads(answer)
    return codes


@functools.cache
def _template() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.template"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.terminate)
    return process
