"""Decode 20,000 clips from threads, as the loader does, and watch the process's memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ltd.data.decode import Backend, available_backends, decode_clip
from ltd.data.write import encode_video
from tools.proofs.table import Cell, Proof

NAME = "memory"
ROOT = Path(__file__).resolve().parents[2]
MARKS = (1_000, 2_000, 5_000, 10_000, 15_000, 20_000)  # clips
GROWTH_LIMIT_MB = 30.0  # from the second mark to the last
THREADS = 2
_TIMEOUT_S = 1200.0


def make_clips(count: int = 8, *, height: int = 72, width: int = 96, frames: int = 48) -> list[bytes]:
    """Make short films of drifting noise, each of another size, so that no buffer fits twice in a row."""
    rng = np.random.default_rng(0)
    clips = []
    for number in range(count):
        size = (height + 2 * number, width + 4 * number)
        still = rng.integers(0, 256, (size[0] // 4 + 1, size[1] // 4 + 1, 3), dtype=np.uint8)
        still = still.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]
        film = np.stack([np.roll(still, step, axis=1) for step in range(frames)])
        clips.append(encode_video(film, 24, crf=23, keyframe_every=48))
    return clips


def rss_mb() -> float:
    """Return the resident memory of this process in MB (10^6 bytes)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(backend: Backend, marks: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Decode random 9-frame windows of some clips at half their size, from two threads.

    Args:
        backend: Decoder.
        marks: Numbers of clips after which the memory is read, ascending.

    Yields:
        Clips decoded so far, and resident memory in MB.
    """
    clips = make_clips()
    rng = random.Random(0)

    def decode_one(seed: int) -> None:
        choice = random.Random(seed)
        data = choice.choice(clips)
        decode_clip(data, start=choice.randrange(39), num_frames=9, height=32, width=48, backend=backend)

    done = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for mark in marks:
            while done < mark:
                count = min(200, mark - done)
                for _ in pool.map(decode_one, [rng.getrandbits(32) for _ in range(count)]):
                    pass
                done += count
            yield mark, rss_mb()


def soak_in_process(backend: Backend, marks: Sequence[int]) -> dict[int, float]:
    """Run ``soak`` in a process of its own.

    Args:
        backend: Decoder.
        marks: Numbers of clips after which the memory is read.

    Returns:
        Resident memory in MB by number of clips.

    Raises:
        RuntimeError: If the process ends with an error.
    """
    command = [sys.executable, "-m", "tools.proofs.memory", backend, *map(str, marks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{backend}: the process ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return {int(mark): float(value) for mark, value in json.loads(done.stdout.splitlines()[-1])}


def measure() -> Proof:
    """Measure the curve of each installed decoder."""
    rows: list[list[Cell]] = []
    misses: list[str] = []
    for backend in available_backends():
        curve = soak_in_process(backend, MARKS)
        growth = curve[MARKS[-1]] - curve[MARKS[1]]
        slope = (curve[MARKS[-1]] - curve[MARKS[3]]) / (MARKS[-1] - MARKS[3]) * 1e6
        rows.append([backend, *(round(curve[mark], 1) for mark in MARKS), round(growth, 1), round(slope)])
        if growth > GROWTH_LIMIT_MB:
            misses.append(f"{backend}: grew by {growth:.1f} MB from 2,000 to 20,000 clips, limit {GROWTH_LIMIT_MB:g}")
    notes = (
        f"Resident memory in MB after so many clips, each decoder in a process of its own: 9 frames from anywhere in "
        f"one of 8 films (72x96 to 86x124, 48 frames, H.264), scaled to 32x48, by {THREADS} threads. *growth*: MB "
        f"from 2,000 to 20,000 clips, limit {GROWTH_LIMIT_MB:g}. *slope*: bytes a clip over the second half."
    )
    columns = ["decoder", *(f"{mark:,}" for mark in MARKS), "growth", "slope"]
    return Proof("Memory stays flat over 20,000 decoded clips", columns, rows, misses, notes)


if __name__ == "__main__":
    print(json.dumps(list(soak(sys.argv[1], [int(mark) for mark in sys.argv[2:]]))))  # type: ignore[arg-type]
