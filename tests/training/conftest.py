"""Data that runs of several modules train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltd.data.synthetic import make_toy_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_toy_shards(folder, num_videos=16, num_images=8, num_frames=9, height=32, width=32, seed=0)
    return folder
