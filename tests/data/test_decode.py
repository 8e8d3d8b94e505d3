from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data import decode
from ltd.data.batch import BadSampleError
from ltd.data.decode import decode_clip, decode_image, probe
from ltd.data.write import encode_image, encode_video

BACKENDS = ("decord", "pyav")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("start", "count", "stride"), [(0, 5, 1), (89, 4, 1), (37, 6, 13), (195, 5, 1)])
def test_the_frames_asked_for_are_the_frames_returned(
    film: Path, numbers_of: Callable[[np.ndarray], list[int]], backend: str, start: int, count: int, stride: int
) -> None:
    frames = decode_clip(film.read_bytes(), start=start, num_frames=count, stride=stride, backend=backend)  # type: ignore[arg-type]
    assert numbers_of(frames) == [start + i * stride for i in range(count)]


def test_backends_agree(film: Path) -> None:
    a, b = (decode_clip(film.read_bytes(), start=50, num_frames=8, backend=name) for name in BACKENDS)  # type: ignore[arg-type]
    assert a.shape == b.shape == (8, 96, 128, 3)
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 2


def test_a_reader_numbers_frames_in_order_of_presentation(film: Path) -> None:
    with decode.FrameReader(film.read_bytes()) as reader:
        assert [number for number, _ in reader.frames(95, 98)] == [95, 96, 97]
        assert len(reader) == 200


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [16, 24, 48, 72])
def test_narrow_clips_decode(backend: str, width: int) -> None:
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 255, (6, 1, 1, 3), dtype=np.uint8), 32, 1).repeat(width, 2)
    decoded = decode_clip(encode_video(frames, 8, crf=4), start=2, num_frames=3, backend=backend)  # type: ignore[arg-type]
    assert np.abs(decoded.astype(int) - frames[2:5]).mean() < 4


def test_probe_reads_sizes(film: Path) -> None:
    assert probe(film.read_bytes(), "mp4") == decode.MediaInfo("video", 128, 96, 200, 24.0)
    assert probe(encode_image(np.zeros((5, 7, 3), dtype=np.uint8)), "png") == decode.MediaInfo("image", 7, 5, 1, 0.0)
    assert probe(film.read_bytes()).kind == "video"


def test_bad_media_say_what_they_are(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = film.read_bytes()
    still = encode_image(np.zeros((9, 9, 3), dtype=np.uint8))
    cases: list[tuple[str, Callable[[], object]]] = [
        ("empty", lambda: probe(b"", "mp4")),
        ("empty", lambda: decode_clip(b"", start=0, num_frames=1)),
        ("undecodable", lambda: probe(b"no video at all" * 50, "mp4")),
        ("undecodable", lambda: decode_clip(data[: len(data) // 2], start=0, num_frames=4)),
        ("undecodable", lambda: decode_image(data)),
        ("wrong_kind", lambda: decode_clip(still, start=0, num_frames=2)),
        ("undecodable", lambda: decode_image(still[:40])),
        ("too_short", lambda: decode_clip(data, start=198, num_frames=3)),
        ("too_short", lambda: decode_clip(data, start=198, num_frames=3, backend="pyav")),
    ]
    for cause, call in cases:
        with pytest.raises(BadSampleError) as caught:
            call()
        assert caught.value.cause == cause
    monkeypatch.setattr(decode, "MAX_PIXELS", 80)
    with pytest.raises(BadSampleError, match="9x9 is more than the limit of 80 pixels"):
        decode_image(still)


def test_a_decoder_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, film: Path) -> None:
    monkeypatch.setattr(decode, "available_backends", lambda: ("pyav",))
    assert decode.choose_backend() == "pyav"
    with pytest.raises(ConfigError, match=r"data.decoder: got 'decord', which is not installed \(found: pyav\)"):
        decode_clip(film.read_bytes(), start=0, num_frames=1, backend="decord")
