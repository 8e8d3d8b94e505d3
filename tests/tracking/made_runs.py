"""Run directories as training and ``sample.py`` write them, for tests of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ltd import config
from ltd.data.write import write_video
from ltd.tracking import Tracker, TrackingConfig

PROMPT = 'a rabbit & a "butterfly" </script><b>bold</b>'


def write_ramp(path: Path, num_frames: int = 17) -> None:
    """Write a video that grows brighter, at 8 frames a second."""
    ramp = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * 10
    write_video(path, np.broadcast_to(ramp, (num_frames, 32, 48, 3)).copy(), fps=8)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_samples(run_dir: Path, step: int, *, num_frames: int = 9) -> None:
    """Add the samples of a step of training: two prompts, and the grid; noted in ``media.jsonl`` too."""
    folder = run_dir / "samples" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate((PROMPT, f"{PROMPT} 2")):
        write_ramp(folder / f"{number:04d}.mp4", num_frames)
        size = {"num_frames": num_frames, "height": 32, "width": 48}
        rows.append({"file": f"{number:04d}.mp4", "prompt": prompt, "repetition": 0, "step": step, "seed": 5, **size})
    write_rows(folder / "samples.jsonl", rows)
    Image.new("RGB", (48, 32), "blue").save(folder / "grid.png")
    with (run_dir / "media.jsonl").open("a") as file:
        for row in rows:
            noted = {"step": step, "name": "eval/samples", "path": f"samples/{folder.name}/{row['file']}"}
            file.write(json.dumps({**noted, "caption": row["prompt"]}) + "\n")


def make_run(run_dir: Path, *, lr: float = 1e-3, media: bool = False) -> Path:
    """Write a run directory the way training and ``sample.py`` do."""
    settings = {"model": {"kind": "dit"}, "steps": 70, "optim": {"lr": lr, "betas": [0.9, 0.99]}}
    config.save(settings, run_dir / "config.yaml")
    track = Tracker(run_dir, TrackingConfig(), is_main=True, run_config=settings)
    for step in range(1, 71):
        values = {"loss/denoise": 2.0 / step, "optim/lr": lr, "time/step_s": 0.5, "time/data_s": 0.05, "other/x": step}
        if step == 7:
            values["loss/denoise"] = math.nan
        if step % 35 == 0:
            values["eval/denoise"] = 3.0 / step
        if step == 9:
            record = {"key": "k9", "shard": "a.tar", "cause": "truncated", "message": "<i>short</i>"}
            track.quarantine(step, [record])
        track.log(step, values)
    track.finish()
    if media:
        samples = run_dir / "samples"
        samples.mkdir()
        write_ramp(samples / "0000.mp4")
        Image.new("RGB", (48, 32), "red").save(samples / "grid.png")
        rows = [{"file": "0000.mp4", "prompt": PROMPT, "seed": 3, "steps": 24, "solver": "heun"}]
        write_rows(samples / "samples.jsonl", rows)
    row = {
        "name": "psnr",
        "value": 24.5,
        "unit": "dB",
        "network": None,
        "n": 12,
        "floor": None,
        "note": "<u>held out</u>",
    }
    (run_dir / "evaluation.json").write_text(json.dumps({"rows": [row]}))
    return run_dir
