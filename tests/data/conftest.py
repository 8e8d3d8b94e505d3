"""Tiny media whose frames carry their own number, and tars made of anything."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from ltd.data.synthetic import make_toy_shards

BITS = 8


def draw_number(number: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Draw a frame whose eight vertical bars are the bits of its number."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    return np.repeat(np.repeat(np.array(bits, dtype=np.uint8) * 200 + 28, width // BITS)[None, :, None], 3, 2).repeat(
        height, 0
    )


def read_numbers(frames: np.ndarray) -> list[int]:
    """Read the numbers back from frames of any size."""
    width = frames.shape[2]
    centres = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    bits = frames[:, frames.shape[1] // 2, centres, 1] > 127
    return [int(sum(int(on) << bit for bit, on in enumerate(row))) for row in bits]


@pytest.fixture
def numbered_frames() -> Callable[[Sequence[int]], np.ndarray]:
    return lambda numbers: np.stack([draw_number(number) for number in numbers])


@pytest.fixture
def numbers_of() -> Callable[[np.ndarray], list[int]]:
    return read_numbers


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """A film as cameras write it: 200 numbered frames at 24 fps, B-frames, rare key frames."""
    import av

    path = tmp_path / "media" / "film.mp4"
    path.parent.mkdir()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"bf": "3", "g": "90", "crf": "12", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(200):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def write_tar() -> Callable[[Path, Mapping[str, bytes]], Path]:
    """Write members, by name, into a plain tar."""

    def write(path: Path, members: Mapping[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 13 clips of 12 frames and 11 stills, 40x56."""
    folder = tmp_path_factory.mktemp("toy") / "shards"
    return make_toy_shards(folder, num_videos=13, num_images=11, num_frames=12, height=40, width=56, seed=0)
