"""Activation checkpointing and compilation: memory, time, attentions and equality of every mode."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.proofs._recompute_worker import CASES, DEPTH, ROUNDS
from tools.proofs.table import Cell, Proof

NAME = "recompute"
ROOT = Path(__file__).resolve().parents[2]
COMPILED_LIMIT = 1e-5
#: Attentions per block and step: forward, and again in the recomputation.
ATTENTIONS = {"none": 1.0, "full": 2.0, "full, every 2nd": 1.5, "selective": 1.0}
_TIMEOUT_S = 900

NOTES = f"""
A DiT of {DEPTH} blocks of width 256 on one sample of 2,048 tokens, fp32, two threads; forward and backward, no update.

*kept*: resident memory after the forward pass, *peak*: highest resident memory during forward and backward, both in MB
above what the process holds between steps (weights and gradients); each case in a process of its own, after one step
that warms it up. *seconds*: median of {ROUNDS} steps, all cases in turn in one process, with the range. *attentions*:
attention operations that ran per block, forward and backward, counted at torch's dispatcher (of compiled blocks: by its
profiler). *difference*: relative L2 difference of loss and all gradients to *none*.

Limits: peak of full < selective < none, and of every 2nd block between full and none; selective faster than full;
attentions as often as each mode says; without compilation no bit differs, with it at most {COMPILED_LIMIT:g}, because
the compiler fuses operations and so adds in another order. On a GPU attention is a smaller part of a block of
this size and memory is not what the allocator of the C library leaves: take the order from here, not the ratios.
"""


def _worker(*arguments: str) -> Any:
    command = [sys.executable, "-m", "tools.proofs._recompute_worker", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{arguments}: the process ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def misses_of(found: dict[str, dict[str, Any]]) -> list[str]:
    """List the limits that the measured cases break.

    Args:
        found: Figures by case.

    Returns:
        One line for each.
    """
    misses = []
    peak = {name: figures["peak_mb"] for name, figures in found.items()}
    for less, more in (("full", "selective"), ("selective", "none"), ("full", "full, every 2nd")):
        if not peak[less] < peak[more]:
            misses.append(f"peak of {less} {peak[less]:.0f} MB, needed less than {more}, {peak[more]:.0f} MB")
    if not peak["full, every 2nd"] < peak["none"]:
        misses.append(f"peak of every 2nd {peak['full, every 2nd']:.0f} MB, needed less than none")
    seconds = {name: statistics.median(found[name]["seconds"]) for name in ("full", "selective")}
    if not seconds["selective"] < seconds["full"]:
        misses.append(f"selective {seconds['selective']:.3f} s, needed less than full, {seconds['full']:.3f} s")
    for name, figures in found.items():
        needed = ATTENTIONS[name.removesuffix(", compiled")]
        if figures["attentions"] != needed:
            misses.append(f"{name}: {figures['attentions']:g} attentions per block, needed {needed:g}")
        limit = COMPILED_LIMIT if CASES[name].compile == "blocks" else 0.0
        if not figures["difference"] <= limit:
            misses.append(f"{name}: difference {figures['difference']:.3g}, needed {limit:g}")
    return misses


def measure() -> Proof:
    """Measure the memory of every case, then the time of all.

    Returns:
        The table.
    """
    found: dict[str, dict[str, Any]] = {name: _worker("memory", name) for name in CASES}
    for name, figures in _worker("time").items():
        found[name] |= figures
    plain = statistics.median(found["none"]["seconds"])
    rows: list[list[Cell]] = []
    for name, figures in found.items():
        seconds = figures["seconds"]
        median = statistics.median(seconds)
        rows.append(
            [
                name,
                round(figures["kept_mb"]),
                round(figures["peak_mb"]),
                round(figures["peak_mb"] / found["none"]["peak_mb"], 2),
                f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
                round(median / plain, 2),
                figures["attentions"],
                figures["difference"],
            ]
        )
    columns = ("case", "kept", "peak", "peak / none", "seconds", "seconds / none", "attentions", "difference")
    return Proof("What recomputing and compiling blocks costs and saves", columns, rows, misses_of(found), NOTES)
