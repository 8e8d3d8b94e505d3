"""Attention over a split sequence against DeepSpeed's ``DistributedAttention``, on 2 and 4 processes of this machine.

The same q, k and v for both, and the same single-device attention inside; outputs and gradients must agree to 1e-5.
Counted are the collectives of one attention and the bytes that leave a process for another, over all processes; the
slowest process's time counts. "exchange alone" puts nothing in the place of attention.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.benches.table import Row

KIND = "sequence"
NAME = "sequence"
LAYOUT = "2 and 4 processes, all of one sequence group"
SHAPES = "1,024 tokens, heads of 64 channels, 8, 7 and 3 of them, fp32"
TINY_SHAPES = "32 tokens, 8 heads of 8 channels, fp32; 2 processes alone"
ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 1800.0


def measure(repeats: int, *, tiny: bool = False) -> list[Row]:
    """Time and count attentions.

    Args:
        repeats: Rounds of each.
        tiny: The smallest sizes, to see that it runs.

    Returns:
        Rows per 1,000 attentions; collectives and megabytes stand in the systems' names.
    """
    return [row for processes in ((2,) if tiny else (2, 4)) for row in _measure(processes, repeats, tiny)]


def _measure(processes: int, repeats: int, tiny: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="ltd-bench-sequence-") as folder:
        out = Path(folder) / "times.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "tools.benches._sequence_worker", str(out), str(repeats), "tiny" if tiny else "full"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        found = json.loads(out.read_text())
    rows = []
    for item in found:
        ours = item["system"] == "ltd"
        name = "ltd" if ours else f"deepspeed {importlib.metadata.version('deepspeed')}"
        if not item["missing"]:
            name += f", {item['collectives']} collectives, {item['bytes'] / 1e6:.2f} MB"
        rows.append(
            Row(
                work=f"{processes} processes, {item['work']}",
                system=name,
                wall_s=[wall_s * 1000 for wall_s, _ in item["times"]],
                cpu_s=[cpu_s * 1000 for _, cpu_s in item["times"]],
                ours=ours,
                missing=item["missing"],
            )
        )
    return rows


def summary(rows: list[Row]) -> list[str]:
    """Say how the time of each work compares.

    Args:
        rows: What ``measure`` gave.

    Returns:
        Lines of a Markdown list.
    """
    lines = []
    for ours in (row for row in rows if row.ours):
        peers = [row for row in rows if row.work == ours.work and not row.ours and not row.missing]
        for peer in peers:
            ratio = statistics.median(b / a for a, b in zip(ours.wall_s, peer.wall_s, strict=True))
            lines.append(f"- {ours.work}: {ours.system}; {peer.system}, {ratio:.2f} times our time")
    return lines
