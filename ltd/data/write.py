"""Frames to files: mp4 (H.264) and stills. The same frames give the same bytes."""

from __future__ import annotations

import io
import logging
import os
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)
_BITEXACT = 1 << 23  # AV_CODEC_FLAG_BITEXACT: no encoder version in the stream


class VideoEncoder:
    """Encode frames into an mp4 in memory, one at a time: H.264, yuv420p, no B-frames.

    Args:
        height: Rows; made even by repeating the last row.
        width: Columns; made even likewise.
        fps: Frames per second, > 0.
        crf: Constant rate factor of x264, 0 (lossless) to 51.
        keyframe_every: Frames between key frames; small values make seeking cheap.
        color: ``av`` codec context whose colour tags the stream gets; None leaves them out (BT.601, as RGB arrays
            are converted).
    """

    def __init__(
        self, *, height: int, width: int, fps: float, crf: int = 16, keyframe_every: int = 12, color: Any = None
    ) -> None:
        import av

        self._av = av
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4", options={"fflags": "+bitexact"})
        options = {"crf": str(crf), "preset": "veryfast", "g": str(keyframe_every), "bf": "0", "threads": "1"}
        # x264's macroblock tree, in its AVX-512 form, reads memory that it never set where the width is not a multiple
        # of 16, so that the same frames came out with other bytes now and then. Nothing else looks ahead.
        options |= {"mbtree": "0", "rc-lookahead": "0"}
        rate = Fraction(fps).limit_denominator(100_000)
        self._stream: Any = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.flags |= _BITEXACT
        for tag in ("colorspace", "color_range", "color_primaries", "color_trc") if color is not None else ():
            setattr(self._stream.codec_context, tag, getattr(color, tag))
        self._time_base = 1 / rate
        self._count = 0

    def add(self, frame: Any) -> None:
        """Append a frame.

        Args:
            frame: uint8 ``(h, w, 3)`` RGB array, or an ``av.VideoFrame`` of the encoder's even size.
        """
        if isinstance(frame, np.ndarray):
            pad = (self._stream.height - frame.shape[0], self._stream.width - frame.shape[1])
            if any(pad):
                frame = np.pad(frame, ((0, pad[0]), (0, pad[1]), (0, 0)), mode="edge")
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        frame.pts = self._count
        frame.time_base = self._time_base
        frame.pict_type = 0  # the source's own key frames must not force ours
        self._count += 1
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """Close the stream and return the bytes of the file."""
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._buffer.getvalue()


def encode_video(frames: np.ndarray, fps: float, *, crf: int = 16, keyframe_every: int = 12) -> bytes:
    """Encode a clip as mp4.

    Args:
        frames: uint8 ``(t, h, w, 3)``, RGB.
        fps: Frames per second, > 0.
        crf: Constant rate factor, 0 to 51.
        keyframe_every: Frames between key frames.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: If the frames are not uint8 of that shape, or fps is not positive.
    """
    _check_frames(frames)
    if fps <= 0:
        raise ValueError(f"fps: got {fps}, needed a positive rate")
    encoder = VideoEncoder(
        height=frames.shape[1], width=frames.shape[2], fps=fps, crf=crf, keyframe_every=keyframe_every
    )
    for frame in frames:
        encoder.add(frame)
    return encoder.finish()


def encode_image(frame: np.ndarray, extension: str = "png", *, quality: int = 95) -> bytes:
    """Encode a still.

    Args:
        frame: uint8 ``(h, w, 3)``, RGB.
        extension: "png" (lossless), "jpg", "jpeg" or "webp".
        quality: Quality of the lossy formats, 1 to 100.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: If the extension is none of these.
    """
    formats = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
    if extension not in formats:
        raise ValueError(f"image extension: got {extension!r}, needed one of {', '.join(formats)}")
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if extension == "png" else {"quality": quality}
    if extension in ("jpg", "jpeg"):
        options["subsampling"] = 0
    Image.fromarray(frame).save(buffer, formats[extension], **options)
    return buffer.getvalue()


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames: got {frames.dtype} {frames.shape}, needed uint8 (t, h, w, 3) with t >= 1")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that it is either whole or absent.

    Args:
        path: File to write; its folder is made.
        data: Its bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.incomplete")  # one per writer
    part.write_bytes(data)
    os.replace(part, path)


def write_video(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Write a clip as mp4.

    Args:
        path: File to write.
        frames: uint8 ``(t, h, w, 3)``, RGB.
        fps: Frames per second, > 0.
    """
    write_bytes(path, encode_video(frames, fps))


def write_image(path: str | Path, frame: np.ndarray) -> None:
    """Write a still in the format of the file's extension.

    Args:
        path: File to write: .png, .jpg, .jpeg or .webp.
        frame: uint8 ``(h, w, 3)``, or ``(1, h, w, 3)``, RGB.
    """
    frame = frame[0] if frame.ndim == 4 else frame
    write_bytes(path, encode_image(frame, Path(path).suffix.lstrip(".").lower()))
