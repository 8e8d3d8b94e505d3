"""The global list of sample keys over two epochs is the same on any ranks and workers, and over any resume."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from ltd.data import BucketsConfig, DataConfig, DatasetConfig, PackedConfig, ViewConfig, build_loader
from ltd.data.index import index_tar
from ltd.data.synthetic import FPS, draw_clip
from ltd.data.write import encode_image, encode_video
from tools.proofs.table import Cell, Proof

NAME = "order"
SEED = 11
WORLDS = ((1, 0), (1, 2), (2, 1), (4, 2))
RESUMED = (1, 4)

Keys = dict[int, tuple[str, int]]  # draw -> (key, sum of the pixels that were cut)


@dataclass(frozen=True)
class Case:
    """One way to batch."""

    name: str
    data: DataConfig
    epoch: int | None  #: Samples of an epoch, where every two of them must hold each sample once; None is not checked.


def make_data(folder: Path) -> list[str]:
    """Write five tars of clips and stills of several sizes, every sample with a key of its own."""
    tars = []
    for number, (height, width, frames) in enumerate(
        ((32, 48, 9), (48, 32, 13), (32, 32, 9), (48, 48, 5), (32, 48, 13))
    ):
        tars.append(str(folder / f"{number}.tar"))
        with TarWriter(tars[-1], encoder=False, mtime=0.0) as writer:
            for place in range(16):
                length = frames if place < 7 else 1
                clip, caption, _ = draw_clip(place, num_frames=length, height=height, width=width, seed=number)
                media = {"mp4": encode_video(clip, FPS)} if place < 7 else {"png": encode_image(clip[0])}
                writer.write({"__key__": f"s{number}_{place:02d}", "txt": caption.encode(), **media})
        index_tar(tars[-1])
    return tars


def cases(tars: list[str]) -> list[Case]:
    """List the ways to batch: 80 samples in five tars."""
    still = ViewConfig(num_frames=1, height=32, width=32)
    fixed = DataConfig(shards=tuple(tars), views=(still,), global_batch=8, open_shards=3, flip=True)
    mixed = (DatasetConfig(shards=tuple(tars[:2]), weight=3.0), DatasetConfig(shards=tuple(tars[2:])))
    buckets = BucketsConfig(tokens=128, token=(4, 16, 16), multiple=4, sides=(32,), frames=(1, 5, 9))
    packed = PackedConfig(tokens=40, token=(4, 16, 16), packs=4, max_side=48, max_frames=13)
    return [
        Case("fixed", fixed, 45),
        Case("two data sets 3:1", replace(fixed, shards=None, datasets=mixed), None),
        Case("with replacement", replace(fixed, mode="replacement"), None),
        Case("buckets", DataConfig(shards=tuple(tars), batching=buckets), None),
        Case("packed", DataConfig(shards=tuple(tars), batching=packed), 80),
    ]


def read(data: DataConfig, *, steps: int, world: int, state: dict[str, Any] | None = None) -> tuple[list[Keys], Any]:
    """Read steps on every rank and put them into global order.

    Args:
        data: The data section.
        steps: Steps.
        world: Processes.
        state: State to go on from.

    Returns:
        Per step what was read, by draw; the state after the last step.
    """
    found: list[Keys] = [{} for _ in range(steps)]
    for rank in range(world):
        with build_loader(data, seed=SEED, global_rank=rank, world_size=world, state=state) as loader:
            for place, (batches, info) in enumerate(itertools.islice(loader, steps)):
                for batch in batches:
                    for group in getattr(batch, "groups", (batch,)):
                        sums = group.pixels.long().flatten(1).sum(1).tolist()
                        pairs = zip(group.keys, sums, strict=True)
                        found[place].update(zip(group.draws, pairs, strict=True))
                last = info.state
    return found, last


def digest(steps: list[Keys]) -> str:
    """Hash the ordered list of keys and pixel sums."""
    rows = [f"{draw} {key} {total}" for step in steps for draw, (key, total) in sorted(step.items())]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def measure() -> Proof:
    """Compare every world and two elastic resumes with one process."""
    rows: list[list[Cell]] = []
    misses: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(make_data(Path(folder))):
            with build_loader(case.data, seed=SEED, global_rank=0, world_size=1) as loader:
                steps = next(k for k in range(1, 1000) if min(e for _, e in loader.plan.progress(k)) >= 2)
            plain, _ = read(case.data, steps=steps, world=1)
            expected = digest(plain)
            keys = [key for step in plain for _, (key, _) in sorted(step.items())]
            if case.epoch is not None:
                per_epoch = [Counter(keys[i : i + case.epoch]) for i in (0, case.epoch)]
                if not all(set(count.values()) == {1} and len(count) == case.epoch for count in per_epoch):
                    misses.append(f"{case.name}: an epoch of {case.epoch} does not hold every sample once")
            runs = [(f"{world}x{workers}", world, workers, None) for world, workers in WORLDS]
            cut = 1 + int(np.random.default_rng(SEED).integers(steps - 1))
            runs += [(f"2x1 -> {world}x1", world, 1, cut) for world in RESUMED]
            for label, world, workers, resumed in runs:
                data = replace(case.data, num_workers=workers)
                begun, state = read(data, steps=resumed, world=2) if resumed else ([], None)
                rest, _ = read(data, steps=steps - (resumed or 0), world=world, state=state)
                found = digest(begun + rest)
                if found != expected:
                    misses.append(f"{case.name}, {label}: hash {found[:12]}, needed {expected[:12]}")
                rows.append([case.name, label, resumed, steps, len(keys), found[:16], found == expected])
    return Proof(
        title="Order of the samples over ranks, workers and resumes",
        columns=("batching", "ranks x workers", "resumed at step", "steps", "samples", "sha256", "equal"),
        rows=rows,
        misses=misses,
        notes=(
            "Five tars of 35 clips and 45 stills of five sizes. The hash is of the ordered list of draw, key and the "
            "sum of all pixels as they were cut (window, crop and flip included), over as many steps as every data set "
            "needs for two epochs. Resumed rows read the first steps on 2 ranks and the rest on 1 or 4, from the plain "
            "state of the second rank. With fixed views (45 stills) and in packs, each epoch was also checked to hold "
            "every sample exactly once, across batch borders."
        ),
    )
