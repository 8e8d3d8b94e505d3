"""One process of the saver's tests: two processes that hold halves of a state, without DeepSpeed; the tests assert.

Run as ``-m tests.parallel.saver_worker OUT.json FOLDER``.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from ltd import storage
from ltd.parallel import Ema, EmaConfig, Layout, ParallelConfig
from ltd.parallel.checkpoint import Saver, load
from ltd.parallel.frozen import FrozenWeights
from ltd.parallel.interface import MasterShard, restore_shards
from ltd.storage import Reader, ShardImage
from tests.parallel.setup import save

DECAYS = (0.9, 0.5)


class Halves:
    """An engine that trains nothing: each process holds half of every tensor."""

    def __init__(self, layout: Layout, value: float = 0.0) -> None:
        self.applied_steps = 0
        self.module = nn.Linear(30, 40)
        self.module.register_buffer("mean", torch.full((3,), value))
        self.frozen = FrozenWeights(self.module, ParallelConfig())
        self._shards = []
        for name, parameter in self.module.named_parameters():
            size = parameter.numel() // layout.world_size
            start = layout.global_rank * size
            data, moment = (torch.arange(start, start + size, dtype=torch.float32) + value for _ in range(2))
            self._shards.append(MasterShard(name, tuple(parameter.shape), start, data, {"exp_avg": moment}, True))

    def master_shards(self) -> list[MasterShard]:
        return self._shards

    def add(self, value: float) -> None:
        """What a training step does to the state."""
        for shard in self._shards:
            shard.data.add_(value)
            shard.state["exp_avg"].add_(value)

    def load_shards(self, reader: Reader, step: int) -> None:
        restore_shards(self._shards, reader)
        self.applied_steps = step

    def refresh_weights(self) -> None:
        return None

    def resolved_config(self) -> dict[str, Any]:
        return {"engine": "halves"}

    def first(self) -> float:
        """Value that was added to the state, on this process; NaN where its elements disagree."""
        parts = [
            t - torch.arange(s.start, s.start + t.numel()) for s in self._shards for t in (s.data, *s.state.values())
        ]
        values = torch.cat(parts)
        return float(values[0]) if bool((values == values[0]).all()) else float("nan")


def steps(saver: Saver, layout: Layout, *, limit_s: float = 20.0) -> int:
    """Do what the loop does each step, until the save on its way has ended; returns the steps that took."""
    count, deadline = 0, time.monotonic() + limit_s
    while layout.any(saver._flight is not None) and time.monotonic() < deadline:
        numbers = torch.tensor(saver.pending())
        saver.settle(*layout.sum_(numbers).tolist())
        count += 1
        time.sleep(0.002)
    return count


@contextmanager
def writing(layout: Layout, function: Callable[[Callable[[], None]], None], *, rank: int) -> Iterator[None]:
    """Replace the writing of a shard on one process; the function is given the genuine one."""
    genuine = storage.write_image

    def replaced(directory: Path, shard_name: str, image: ShardImage) -> None:
        if layout.global_rank == rank:
            function(lambda: genuine(directory, shard_name, image))
        else:
            genuine(directory, shard_name, image)

    with mock.patch.object(storage, "write_image", replaced):
        yield


def no_space(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device, needed 123 bytes, 7 are free")


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def check_background(layout: Layout, folder: Path) -> dict[str, Any]:
    """Train on while the slow process writes: what is saved is the state at the call."""
    engine = Halves(layout, 5.0)
    saver = Saver(folder, engine, None, layout)
    gate = threading.Event()
    with writing(layout, lambda write: (gate.wait(20), write()), rank=1):
        saver.save(1, {"data": {"position": 4}})
        blocked_s = saver.blocked_s
        engine.add(100.0)
        early = []
        for _ in range(20):
            saver.settle(*layout.sum_(torch.tensor(saver.pending())).tolist())
            early.append(storage.latest_checkpoint(folder) is None)
        gate.set()
        steps(saver, layout)
    layout.barrier()
    latest = storage.latest_checkpoint(folder)
    manifest = load(latest, engine, None, layout)
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    saver.close()
    return {
        "early": all(early),
        "latest": latest.name if latest else None,
        "loaded": engine.first(),
        "manifest": {key: manifest[key] for key in ("step", "data", "world_size", "ema")},
        "blocked_s": blocked_s,
        "write_s": saver.write_s,
        "names": names(folder),
        "threads": len(threads),
    }


def check_next_save_waits(layout: Layout, folder: Path) -> dict[str, Any]:
    engine = Halves(layout)
    saver = Saver(folder, engine, None, layout, keep_last=1)
    with writing(layout, lambda write: (time.sleep(0.3), write()), rank=1):
        for step in (1, 2, 3):
            engine.add(1.0)
            saver.save(step, {})
    blocked_s = saver.blocked_s
    saver.wait()
    layout.barrier()
    load(storage.latest_checkpoint(folder), engine, None, layout)
    return {"names": names(folder), "loaded": engine.first(), "blocked_s": blocked_s}


def check_failed_write(layout: Layout, folder: Path) -> dict[str, Any]:
    """The second process's disk is full: found by the loop, by ``wait`` and by the next save; then there is room."""
    engine = Halves(layout)
    saver = Saver(folder, engine, None, layout)
    saver.save(1, {})
    saver.wait()
    messages = {}
    for step, (name, find) in enumerate(
        {
            "loop": lambda: steps(saver, layout),
            "wait": saver.wait,
            "next": lambda: saver.save(99, {}),
        }.items(),
        start=2,
    ):
        with writing(layout, no_space, rank=1):
            saver.save(step, {})
            messages[name] = layout.gather_objects(error_of(find))
        layout.barrier()
    left = names(folder)
    saver.save(9, {})
    saver.wait()
    layout.barrier()
    return {"messages": messages, "left": left, "after": names(folder)}


def check_failed_commit(layout: Layout, folder: Path) -> dict[str, Any]:
    """Room for the shards but not for the manifest: the main process alone fails, all hear of it."""
    engine = Halves(layout)
    saver = Saver(folder, engine, None, layout)
    saver.save(1, {})
    saver.wait()
    with mock.patch.object(storage, "write_manifest", no_space):
        saver.save(2, {})
        message = error_of(lambda: steps(saver, layout))
    with writing(layout, lambda write: None, rank=1):  # as on a disk that the hosts do not share
        saver.save(2, {})
        unseen = error_of(lambda: steps(saver, layout))
    with mock.patch.object(storage, "begin_directory", no_space):
        start = error_of(lambda: saver.save(3, {}))
    layout.barrier()
    return {
        "messages": layout.gather_objects(message),
        "unseen": layout.gather_objects(unseen),
        "starts": layout.gather_objects(start),
        "left": names(folder),
    }


def check_different_steps(layout: Layout, folder: Path) -> dict[str, Any]:
    saver = Saver(folder, Halves(layout), None, layout)
    message = error_of(lambda: saver.save(10 + layout.global_rank, {}))
    layout.barrier()
    return {"messages": layout.gather_objects(message), "left": names(folder)}


def check_damage(layout: Layout, folder: Path) -> dict[str, Any]:
    """A byte changes in the second process's shard: the first, which reads only its own, must not go on alone."""
    engine = Halves(layout)
    for step in (1, 2):
        save(folder, step, engine, None, {}, layout)
    layout.barrier()
    newest = storage.checkpoint_path(folder, 2)
    if layout.is_main:
        file = newest / "rank_00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    layout.barrier()
    message = error_of(lambda: load(newest, engine, None, layout))
    load(storage.checkpoint_path(folder, 1), engine, None, layout)
    return {"messages": layout.gather_objects(message), "loaded": engine.first()}


def check_leftovers(layout: Layout, folder: Path) -> dict[str, Any]:
    engine = Halves(layout)
    save(folder, 1, engine, None, {}, layout)
    if layout.is_main:
        for name in ("step-00000002.incomplete", "step-00000001.removed.incomplete"):
            (folder / "checkpoints" / name).mkdir()
            (folder / "checkpoints" / name / "rank_00000.safetensors").write_text("half")
    layout.barrier()
    saver = Saver(folder, engine, None, layout)
    layout.barrier()
    left = names(folder)
    if layout.is_main:  # and one that appears later is written over
        storage.begin_directory(storage.checkpoint_path(folder, 3))
        (folder / "checkpoints" / "step-00000003.incomplete" / "stray.json").write_text("{}")
    layout.barrier()
    saver.save(3, {})
    saver.wait()
    layout.barrier()
    return {"left": left, "files": sorted(path.name for path in storage.checkpoint_path(folder, 3).iterdir())}


def check_other_decays(layout: Layout, folder: Path) -> dict[str, Any]:
    engine = Halves(layout)
    ema = Ema(engine, EmaConfig(decays=DECAYS, warmup=False))
    engine.add(1.0)
    ema.update(0)
    path = save(folder, 1, engine, ema, {}, layout)
    again = Halves(layout, 50.0)
    other = Ema(again, EmaConfig(decays=(0.99, 0.5)))
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ltd").addHandler(handler)
    manifest = load(path, again, other, layout)
    logging.getLogger("ltd").removeHandler(handler)
    kept = {s.name: s.data - torch.arange(s.start, s.start + s.data.numel()) for s in other.slices(0.5)}
    started = {s.name: s.data - torch.arange(s.start, s.start + s.data.numel()) for s in other.slices(0.99)}
    return {
        "ema": manifest["ema"],
        "told": told,
        "kept": [float((value - 0.5).abs().max()) for value in kept.values()],
        "started": [float((value - 1.0).abs().max()) for value in started.values()],
    }


def main(out: str, folder: str) -> None:
    layout = Layout.from_environment(ParallelConfig(timeout_s=30))
    results = {}
    for name, check in list(globals().items()):
        if not name.startswith("check_"):
            continue
        try:
            results[name] = check(layout, Path(folder) / name)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        layout.barrier()
    if layout.is_main:
        Path(out).write_text(json.dumps(results))
    layout.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
