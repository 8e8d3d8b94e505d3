"""Feed damaged media and tars to everything that reads them: each is read right or refused by a named cause.

Runs in processes of their own, so that a crash of native code is seen and counted, and goes on behind the file.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.decode import IMAGE_EXTENSIONS, Backend, available_backends, decode_clip, decode_image, probe
from tools.proofs._fuzz_files import media_seeds, mutate, tar_seeds
from tools.proofs.table import Cell, Proof

NAME = "fuzz"
ROOT = Path(__file__).resolve().parents[2]
MEDIA, TARS = 5_000, 400  # files of the proof
FILE_LIMIT_S = 10.0
MEMORY_LIMIT_MB = 1_000.0
#: What a file may be refused for.
CAUSES = ("empty", "undecodable", "too_short", "too_large", "absurd_fps", "one_frame", "wrong_kind")
_MAX_CRASHES = 20


@dataclass
class Outcome:
    """What became of the damaged files of one kind."""

    files: int = 0
    #: Files by result: ``read``, or a cause.
    results: Counter[str] = field(default_factory=Counter)
    #: What must not happen, one line a file: other exceptions, crashes, time and memory.
    faults: list[str] = field(default_factory=list)


def _read_media(data: bytes, extension: str, number: int, backend: Backend) -> str:
    rng = random.Random(number)
    try:
        info = probe(data, extension if rng.random() < 0.9 else None)
        height, width = rng.choice(((32, 32), (24, 56), (None, None)))
        if info.kind == "image":
            frames, count = decode_image(data, height=height, width=width), 1
        else:
            count = min(5, info.frames)
            start = rng.randrange(info.frames - count + 1)
            frames = decode_clip(data, start=start, num_frames=count, height=height, width=width, backend=backend)
    except BadSampleError as error:
        return error.cause if error.cause in CAUSES else f"fault: unknown cause {error.cause}"
    except Exception as error:
        return f"fault: {type(error).__name__}: {str(error)[:100]}"
    shape = (count, height or info.height, width or info.width, 3)
    # A file may change its size on the way, or say another one than it has.
    if frames.dtype != np.uint8 or frames.ndim != 4 or (height is not None and frames.shape != shape):
        return f"fault: got {frames.dtype} {frames.shape}, needed uint8 {shape}"
    return "read"


def _read_tar(data: bytes, folder: Path) -> str:
    from ltd.data.index import index_tar

    tar = folder / "damaged.tar"
    tar.write_bytes(data)
    try:
        entries, bad = index_tar(tar)
    except ConfigError:
        result = "refused"
    except Exception as error:
        return f"fault: {type(error).__name__}: {str(error)[:100]}"
    else:
        result = "read" if len(entries) else "no sample left"
        if bad and len(entries):
            result = "read in part"
    beside = {path.name for path in folder.iterdir()} - {tar.name}
    strangers = [name for name in beside if not name.startswith(tar.name)]
    for name in beside:
        (folder / name).unlink()
    return f"fault: wrote {strangers[:3]}" if strangers else result


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def read_damaged(kind: str, start: int, stop: int) -> Iterator[str]:
    """Read damaged files in this process.

    Args:
        kind: A decoder, or ``tar``.
        start: Number of the first file.
        stop: Number after the last.

    Yields:
        For each file one JSON line before, and one after it is read.
    """
    seeds = tar_seeds() if kind == "tar" else media_seeds()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(start, stop):
            name, damage, data = mutate(seeds, number)
            yield json.dumps([number, name, damage])
            before = _peak_mb()
            faulthandler.dump_traceback_later(FILE_LIMIT_S, exit=True)
            if kind == "tar":
                result = _read_tar(data, Path(folder))
            else:
                result = _read_media(data, name.rsplit(".", 1)[1], number, kind)  # type: ignore[arg-type]
            faulthandler.cancel_dump_traceback_later()
            if _peak_mb() - before > MEMORY_LIMIT_MB:
                result = f"fault: took {_peak_mb() - before:.0f} MB"
            yield json.dumps([number, name, damage, result])


def fuzz(kind: str, files: int) -> dict[str, Outcome]:
    """Read damaged files in processes of their own; one that ends at a file goes on behind it.

    Args:
        kind: A decoder, or ``tar``.
        files: How many.

    Returns:
        What became of them, by extension of the seed.
    """
    outcomes: dict[str, Outcome] = {}
    start = crashes = 0
    while start < files and crashes < _MAX_CRASHES:
        command = [sys.executable, "-m", "tools.proofs.fuzz", kind, str(start), str(files)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[") and line.endswith("]")]
        for line in lines:
            if len(line) == 4:
                _count(outcomes, *line)
        if done.returncode == 0:
            break
        if not lines or len(lines[-1]) == 4:
            raise RuntimeError(f"{kind}: ended with code {done.returncode} between files:\n{done.stderr[-2000:]}")
        crashes += 1
        number, name, damage = lines[-1]
        cause = "time limit" if "Timeout" in done.stderr else f"code {done.returncode}"
        _count(outcomes, number, name, damage, f"fault: process ended: {cause}")
        start = number + 1
    return outcomes


def _count(outcomes: dict[str, Outcome], number: int, name: str, damage: str, result: str) -> None:
    outcome = outcomes.setdefault(name.rsplit(".", 1)[1], Outcome())
    outcome.files += 1
    if result.startswith("fault: "):
        outcome.faults.append(f"file {number} ({name}, {damage}): {result.removeprefix('fault: ')}")
        result = "fault"
    outcome.results[result] += 1


def measure() -> Proof:
    """Read 5,000 damaged media files with each decoder, and 400 damaged tars."""
    rows: list[list[Cell]] = []
    misses: list[str] = []
    for kind, files in (*((backend, MEDIA) for backend in available_backends()), ("tar", TARS)):
        for extension, outcome in sorted(fuzz(kind, files).items()):
            image = extension in IMAGE_EXTENSIONS
            if image and kind != available_backends()[0]:
                continue  # images do not pass through a video decoder
            reader = "index" if kind == "tar" else "Pillow" if image else kind
            results = ", ".join(f"{count} {result}" for result, count in outcome.results.most_common())
            rows.append([extension, reader, outcome.files, results, len(outcome.faults)])
            misses += [f"{extension}, {reader}: {fault}" for fault in outcome.faults]
    notes = (
        "Whole small files are damaged by bit flips, wrong header bytes, cuts, zeroed or removed spans, extreme "
        "numbers, splices and the headers of other kinds; each is probed, then decoded where it opens. *read*: "
        "decoded to the right shape (what a decoder conceals is not seen). A *fault* is any exception but "
        f"`BadSampleError` with one of the causes {', '.join(CAUSES)}, a crash, more than {FILE_LIMIT_S:g} s or "
        f"{MEMORY_LIMIT_MB:g} MB, or a file written beside a tar. Limit: no fault."
    )
    return Proof(
        "Damaged files never end a run", ["seed", "read by", "files", "results", "faults"], rows, misses, notes
    )


if __name__ == "__main__":
    for text in read_damaged(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])):
        print(text, flush=True)
