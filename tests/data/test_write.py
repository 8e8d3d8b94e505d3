from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ltd.data.decode import decode_clip, decode_image, probe
from ltd.data.write import encode_video, write_image, write_video


def smooth(frames: int, height: int, width: int) -> np.ndarray:
    t, y, x = np.mgrid[0:frames, 0:height, 0:width]
    return np.stack([40 + 8 * t + y, 200 - x, 90 + 0 * t], -1).astype(np.uint8)


def test_video_round_trip_and_same_bytes(tmp_path: Path) -> None:
    frames = smooth(7, 34, 50)
    write_video(tmp_path / "deep" / "a.mp4", frames, 12.5)
    data = (tmp_path / "deep" / "a.mp4").read_bytes()
    assert data == encode_video(frames, 12.5)
    info = probe(data, "mp4")
    assert (info.frames, info.height, info.width, info.fps) == (7, 34, 50, 12.5)
    error = decode_clip(data, start=0, num_frames=7).astype(float) - frames
    assert np.abs(error).mean() < 2
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.mp4"]  # no part file is left


def test_odd_sizes_are_padded() -> None:
    frames = smooth(3, 33, 35)
    decoded = decode_clip(encode_video(frames, 8), start=0, num_frames=3)
    assert decoded.shape == (3, 34, 36, 3)
    assert np.abs(decoded[:, :33, :35].astype(float) - frames).mean() < 2


def test_png_is_exact(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    write_image(tmp_path / "a.png", frame[None])
    assert (decode_image((tmp_path / "a.png").read_bytes())[0] == frame).all()


def test_wrong_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needed uint8 \(t, h, w, 3\)"):
        encode_video(np.zeros((4, 8, 8, 3), dtype=np.float32), 8)
    with pytest.raises(ValueError, match="fps: got 0"):
        encode_video(np.zeros((4, 8, 8, 3), dtype=np.uint8), 0)
    with pytest.raises(ValueError, match="image extension: got 'bmp'"):
        write_image(tmp_path / "a.bmp", np.zeros((8, 8, 3), dtype=np.uint8))
