"""What ``tools/buckets.py`` says of the quickstart's shards: crop, unused budget and balance of buckets and packs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ltd.data import BucketsConfig, DataConfig, PackedConfig
from ltd.data.arrange import arrange
from ltd.data.mixture import open_sources
from tools import buckets, quickstart
from tools.proofs.table import Cell, Proof

NAME = "buckets"
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.1  # of the token budget may stay empty
TOKEN = (4, 16, 16)
BATCHINGS = {
    "buckets": BucketsConfig(tokens=6900, token=TOKEN, multiple=2, sides=(96, 144), frames=(1, 17, 49), max_aspects=3),
    "packed": PackedConfig(tokens=2048, token=TOKEN, packs=4, max_side=144, max_frames=49),
}


def make_shards() -> Path:
    """Run the quickstart's first two steps, which reuse what is there."""
    root = ROOT / quickstart.DEFAULT_ROOT
    for step in quickstart.steps(Path(quickstart.DEFAULT_ROOT))[:2]:
        subprocess.run([sys.executable, *step.command[1:]], cwd=ROOT, check=True)
    return root / "shards" / "train"


def measure() -> Proof:
    """Tabulate the buckets and the packs of the quickstart's training shards."""
    shards = str(make_shards())
    rows: list[list[Cell]] = []
    misses, notes = [], ["Shards of the quickstart: 119 clips and 488 stills of one film."]
    for name, batching in BATCHINGS.items():
        data = DataConfig(shards=shards, batching=batching)
        source = open_sources(data)
        arrangement = arrange(data, source)
        rows += [[name, *row] for row in buckets.rows(data, source, arrangement)]
        placed = sum(len(ids) for ids in arrangement.ids)
        if placed != len(source.entries):
            misses.append(f"{name}: {len(source.entries) - placed} samples have no place")
        lines = buckets.summary(data, source, arrangement, seed=0, ranks=2)
        unused = buckets.unused(data, source, arrangement, seed=0)
        if unused > LIMIT:
            misses.append(f"{name}: {unused:.3f} of the token budget stays empty, needed at most {LIMIT}")
        notes.append(f"{name}: " + "; ".join(lines))
    return Proof(
        title="Buckets and packs of the quickstart's data",
        columns=("batching", *buckets.COLUMNS),
        rows=rows,
        misses=misses,
        notes="\n\n".join(notes),
    )
