from __future__ import annotations

import numpy as np

from ltd.data.transforms import cover, resize


def ramp(height: int, width: int) -> np.ndarray:
    picture = np.arange(height * width, dtype=np.uint32).reshape(1, height, width, 1) % 251
    return np.repeat(picture, 3, 3).astype(np.uint8)


def test_cover_without_scaling_is_a_plain_crop() -> None:
    frames = ramp(8, 20)
    assert (cover(frames, 8, 8, crop=(0.0, 0.0)) == frames[:, :, :8]).all()
    assert (cover(frames, 8, 8, crop=(1.0, 1.0)) == frames[:, :, 12:]).all()
    assert (cover(frames, 8, 8, crop=(1.0, 0.0)) == frames[:, :, :8]).all()
    assert (cover(frames, 8, 8) == frames[:, :, 6:14]).all()
    assert (cover(frames, 8, 8, flip=True) == frames[:, :, 13:5:-1]).all()
    tall = frames.transpose(0, 2, 1, 3)
    assert (cover(tall, 8, 8, crop=(1.0, 0.0)) == tall[:, 12:]).all()


def test_cover_keeps_the_aspect() -> None:
    rows, columns = np.mgrid[0:64, 0:128]
    disc = ((rows - 31.5) ** 2 + (columns - 63.5) ** 2 < 24**2).astype(np.uint8)[None, ..., None] * np.uint8(255)
    small = cover(np.repeat(disc, 3, 3), 32, 32)[0, :, :, 0] > 127
    assert small.any(1).sum() == small.any(0).sum() == 24


def test_resize_is_antialiased() -> None:
    stripes = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    small = resize(stripes, 16, 16)[0, :, 1:-1]
    assert small.std() < 3  # nearest or plain bicubic sampling would keep or alias the stripes
    assert abs(small.mean() - 127.5) < 3
