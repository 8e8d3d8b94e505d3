from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ltd.data.transforms import cover, cover_size, cut_offset, resize


def ramp(height: int, width: int) -> np.ndarray:
    picture = np.arange(height * width, dtype=np.uint32).reshape(1, height, width, 1) % 251
    return np.repeat(picture, 3, 3).astype(np.uint8)


def test_cover_without_scaling_is_a_plain_crop() -> None:
    frames = ramp(8, 20)
    assert (cover(frames, 8, 8, crop=(0.0, 0.0)) == frames[:, :, :8]).all()
    assert (cover(frames, 8, 8, crop=(1.0, 1.0)) == frames[:, :, 12:]).all()
    assert (cover(frames, 8, 8, crop=(1.0, 0.0)) == frames[:, :, :8]).all()
    assert (cover(frames, 8, 8) == frames[:, :, 6:14]).all()
    tall = frames.transpose(0, 2, 1, 3)
    assert (cover(tall, 8, 8, crop=(1.0, 0.0)) == tall[:, 12:]).all()


def test_cover_keeps_the_aspect() -> None:
    rows, columns = np.mgrid[0:64, 0:128]
    disc = ((rows - 31.5) ** 2 + (columns - 63.5) ** 2 < 24**2).astype(np.uint8)[None, ..., None] * np.uint8(255)
    small = cover(np.repeat(disc, 3, 3), 32, 32)[0, :, :, 0] > 127
    assert small.any(1).sum() == small.any(0).sum() == 24


def test_the_size_that_covers() -> None:
    assert cover_size(480, 854, 256, 256) == (256, 455)
    assert cover_size(480, 854, 480, 480) == (480, 854)
    assert cover_size(10, 10, 256, 64) == (256, 256)
    assert cover_size(1, 1000, 3, 3) == (3, 3000)
    for height, width in np.random.default_rng(0).integers(1, 400, (200, 2)):
        rows, columns = cover_size(97, 131, height, width)
        assert rows >= height and columns >= width and (rows == height or columns == width)
        assert cut_offset((rows, columns), height, width, (1.0, 1.0)) == (rows - height, columns - width)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (77, 91), (37, 20), (1, 1)])
def test_resize_is_pillows_bicubic(height: int, width: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), dtype=np.uint8)
    pillow = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    assert np.abs(resize(frames, height, width).astype(int) - np.stack(pillow)).max() <= 2
    assert resize(frames, 37, 53) is frames


def test_resize_is_antialiased() -> None:
    stripes = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    small = resize(stripes, 16, 16)[0, :, 1:-1]
    assert small.std() < 3  # nearest or plain bicubic sampling would keep or alias the stripes
    assert abs(small.mean() - 127.5) < 3
