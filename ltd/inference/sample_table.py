"""What a sampling job wrote, read back for measuring: the rows of samples.jsonl and the clips they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.decode import decode_clip, decode_image
from ltd.evaluation.protocol import Clips

Shape = tuple[int, int, int]
_TEXTS, _COUNTS = ("file", "prompt"), ("num_frames", "height", "width")


def read_samples(directory: Path, prompts: Path | None) -> list[dict[str, Any]]:
    """Read samples.jsonl.

    Args:
        directory: What sample.py wrote.
        prompts: Keep only samples of the prompts in this file; None keeps all.

    Returns:
        Its rows.

    Raises:
        ConfigError: If a file is missing or not UTF-8, a line is no row of a sample, or no sample is left.
    """
    path = directory / "samples.jsonl"
    if not path.is_file():
        raise ConfigError(f"--samples: no samples.jsonl in {directory}; needed a directory that sample.py wrote")
    lines = _read_text(path, "--samples").splitlines()
    rows = [_row(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]
    if prompts is not None:
        if not prompts.is_file():
            raise ConfigError(f"--prompts: {prompts} does not exist")
        wanted = {line.strip() for line in _read_text(prompts, "--prompts").splitlines()}
        rows = [row for row in rows if row["prompt"].strip() in wanted]
    if not rows:
        raise ConfigError(f"--samples: {path} holds no sample" + (f" of a prompt in {prompts}" if prompts else ""))
    return rows


def shape_of(row: dict[str, Any]) -> Shape:
    """Give the frames, height and width of a row's sample."""
    return row["num_frames"], row["height"], row["width"]


def load_samples(directory: Path, rows: list[dict[str, Any]]) -> Clips:
    """Decode samples of one size.

    Args:
        directory: Where the files are.
        rows: Their rows of samples.jsonl.

    Returns:
        The clips, in the rows' order.

    Raises:
        ConfigError: If a file is missing, does not decode or is not of the size its row says.
    """
    clips = [_load(directory / row["file"], shape_of(row)) for row in rows]
    return Clips(torch.stack(clips), tuple(row["prompt"].strip() for row in rows), tuple(row["file"] for row in rows))


def check_samples(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Decode samples one after the other, keeping none.

    Args:
        directory: Where the files are.
        rows: Their rows of samples.jsonl, of any sizes.

    Raises:
        ConfigError: As ``load_samples``.
    """
    for row in rows:
        _load(directory / row["file"], shape_of(row))


def shared_facts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Collect how samples were made.

    Args:
        rows: Of samples.jsonl.

    Returns:
        ``weights``, ``steps``, ``guidance`` and ``seed``; None where the rows differ or do not say.
    """
    facts = {}
    for name in ("weights", "steps", "guidance", "seed"):
        first = rows[0].get(name)
        facts[name] = first if all(row.get(name) == first for row in rows) else None
    return facts


def _read_text(path: Path, option: str) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: {path} is not UTF-8: {error}") from None


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--samples: {place} is not JSON ({error}); was it cut off?") from None
    if not isinstance(row, dict):
        raise ConfigError(f"--samples: {place} is a {type(row).__name__}, needed the object of a sample")
    missing = {*_TEXTS, *_COUNTS} - row.keys()
    if missing:
        raise ConfigError(f"--samples: {place} lacks {', '.join(sorted(missing))}")
    for name in _TEXTS:
        if not isinstance(row[name], str):
            raise ConfigError(f"--samples: {place}: {name}: got {row[name]!r}, needed a text")
    for name in _COUNTS:
        if type(row[name]) is not int or row[name] < 1:
            raise ConfigError(f"--samples: {place}: {name}: got {row[name]!r}, needed an integer of 1 or more")
    return row


def _load(path: Path, shape: Shape) -> torch.Tensor:
    """Decode a file to uint8 ``(t, h, w, 3)``."""
    if not path.is_file():
        raise ConfigError(f"--samples: {path} is named in samples.jsonl and does not exist")
    data = path.read_bytes()
    try:
        frames = decode_image(data) if shape[0] == 1 else decode_clip(data, start=0, num_frames=shape[0])
    except BadSampleError as error:
        says = "x".join(map(str, shape))
        raise ConfigError(f"--samples: {path} ({says} by samples.jsonl) cannot be read: {error}") from None
    if frames.shape != (*shape, 3):
        raise ConfigError(f"--samples: {path} is {frames.shape}, its row of samples.jsonl says otherwise")
    return torch.from_numpy(frames.copy())
