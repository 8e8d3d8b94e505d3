"""Sampling around known frames on one process, on two, and on two that share each video; and videos of segments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ltd.data.write import write_video
from tests.inference import jobs_worker
from tests.inference.jobs_worker import Case, make_run, run_side_by_side

SHAPE = ("--shapes", "9x32x32", "--batch-size", "1")
KNOWN = (*SHAPE, "--condition", "{folder}/clip.mp4", "--task", "extension", "--known", "2")
LONG = (*SHAPE, "--segments", "2")
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, KNOWN),
    "two": (2, KNOWN),
    "pair": (2, (*KNOWN, "--sequence", "2")),
    "long": (1, LONG),
    "long-two": (2, LONG),
}


def main(folder: Path) -> None:
    make_run(folder, "model.frames=times")
    (folder / "prompts.txt").write_text("\n".join(jobs_worker.PROMPTS[:2]))
    write_video(folder / "clip.mp4", np.random.default_rng(0).integers(0, 255, (7, 48, 40, 3), np.uint8), 8.0)
    cases: dict[str, Case] = {
        name: (name, size, None, tuple(word.format(folder=folder) for word in words))
        for name, (size, words) in CASES.items()
    }
    codes = run_side_by_side(folder, cases)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
