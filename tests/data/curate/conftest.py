"""Films of scenes that are unlike each other and move a little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ltd.data.write import encode_video


def draw_scene(number: int, frames: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Draw smooth waves of random colours and directions that drift by a pixel a frame."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width] / 32.0
    scene = []
    for time in range(frames):
        shifted = x + time / 32
        channels = []
        for waves in np.random.default_rng(number).normal(size=(3, 4, 3)):
            channels.append(sum(np.sin(3 * a * y + 3 * b * shifted + 6 * c) for a, b, c in waves) / 8 + 0.5)
        scene.append(np.stack(channels, -1))
    base = rng.uniform(0.2, 0.8, size=3)
    return (np.clip((np.stack(scene) + base) / 2, 0, 1) * 255).astype(np.uint8)


@pytest.fixture
def write_film(tmp_path: Path) -> Callable[..., Path]:
    """Write a film of scenes of given lengths, at 24 frames per second."""

    def write(name: str, lengths: Sequence[int], *, first: int = 0) -> Path:
        frames = np.concatenate([draw_scene(first + number, length) for number, length in enumerate(lengths)])
        path = tmp_path / "media" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_video(frames, 24.0))
        return path

    return write
