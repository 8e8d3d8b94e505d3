"""Sizes: the 1 + k f rule and its messages."""

from __future__ import annotations

import pytest

from ltd.shapes import Compression, VideoShape, num_tokens


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_latent_and_video_are_inverse(factor: int) -> None:
    compression = Compression(factor, 8, 16)
    for k in range(5):
        video = VideoShape(1 + k * factor, 64, 112)
        latent = compression.latent(video)
        assert latent == VideoShape(1 + k, 8, 7)
        assert compression.video(latent) == video


def test_wrong_sizes_name_the_nearest() -> None:
    compression = Compression(4, 8, 8)
    with pytest.raises(ValueError, match="got 16; the nearest are 13 and 17"):
        compression.latent_frames(16)
    with pytest.raises(ValueError, match="width must be a multiple of 8 .*got 100; nearest: 96 and 104"):
        compression.latent(VideoShape(1, 64, 100))
    with pytest.raises(ValueError, match="latent axis w of size 13"):
        num_tokens(VideoShape(5, 8, 13), (1, 2, 2))


def test_token_count() -> None:
    assert num_tokens(Compression(4, 8, 8).latent(VideoShape(17, 64, 112)), (1, 2, 2)) == 140
