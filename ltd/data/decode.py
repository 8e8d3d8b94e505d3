"""Media bytes to frames: probing, clips and stills.

The only importer of decord and PyAV's decoders. A clip is decoded from the key frame before its first frame on, no
other frames are touched, and the decoder is closed with the clip (decord leaks otherwise).
"""

from __future__ import annotations

import bisect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.transforms import resize

logger = logging.getLogger(__name__)

#: Images and frames of more pixels than this are refused before they are decoded.
MAX_PIXELS = 64_000_000
VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm", "avi")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
Backend = Literal["decord", "pyav"]
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class MediaInfo:
    """What a media file holds."""

    kind: Literal["image", "video"]  #: Kind of sample.
    width: int  #: Pixels.
    height: int  #: Pixels.
    frames: int  #: Frames; 1 for an image.
    fps: float  #: Frames per second; 0 for an image and where the file tells none that can be true.


def available_backends() -> tuple[Backend, ...]:
    """List the video decoders that are installed, the preferred one first."""
    found: list[Backend] = []
    if find_spec("decord") is not None:
        found.append("decord")
    if find_spec("av") is not None:
        found.append("pyav")
    return tuple(found)


def choose_backend(backend: Backend | None = None) -> Backend:
    """Resolve a decoder's name.

    Args:
        backend: Asked-for decoder; None takes decord, or PyAV where decord is not installed.

    Returns:
        The decoder to use.

    Raises:
        ConfigError: If it is not installed.
    """
    found = available_backends()
    if backend is None:
        if not found:
            raise ConfigError(
                "data.decoder: no video decoder is installed; install the extra: pip install 'ltd[video]'"
            )
        return found[0]
    if backend not in found:
        raise ConfigError(
            f"data.decoder: got {backend!r}, which is not installed (found: {', '.join(found) or 'none'}); "
            "install the extra: pip install 'ltd[video]'"
        )
    return backend


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadSampleError("undecodable", f"media of {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise BadSampleError("too_large", f"{width}x{height} is more than the limit of {MAX_PIXELS} pixels")


def _check_bytes(data: bytes) -> None:
    if not data:
        raise BadSampleError("empty", "zero bytes")


def decode_image(data: bytes) -> np.ndarray:
    """Decode a still; transparency is laid on white and the EXIF orientation applied.

    Args:
        data: Bytes of a JPEG, PNG or WebP file.

    Returns:
        uint8 ``(1, h, w, 3)``, RGB.

    Raises:
        BadSampleError: If the bytes are no such image or it is larger than ``MAX_PIXELS``.
    """
    image = _open_image(data)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return np.asarray(image.convert("RGB"))[None]
    except Exception as error:  # Pillow's decoders raise a dozen types on corrupt bytes.
        raise BadSampleError("undecodable", f"image does not decode: {error}") from error


def _open_image(data: bytes) -> Image.Image:
    _check_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_large", str(error)) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise BadSampleError("undecodable", f"not a JPEG, PNG or WebP image: {error}") from error
    _check_size(*image.size)
    return image


def probe(data: bytes, extension: str | None = None) -> MediaInfo:
    """Read what a media file holds without decoding it.

    Args:
        data: Bytes of the file.
        extension: Its extension without the dot; None tries both kinds.

    Returns:
        Kind, size, frames and rate. Bytes that do not open, hold no frame, or too large a one, give ``BadSampleError``.
    """
    _check_bytes(data)
    if extension in IMAGE_EXTENSIONS:
        return _probe_image(data)
    if extension in VIDEO_EXTENSIONS:
        return _probe_video(data)
    try:
        return _probe_image(data)
    except BadSampleError:
        return _probe_video(data)


def _probe_image(data: bytes) -> MediaInfo:
    image = _open_image(data)
    width, height = image.size
    if image.getexif().get(0x0112) in (5, 6, 7, 8):  # orientations that turn the picture by a quarter
        width, height = height, width
    return MediaInfo("image", width, height, 1, 0.0)


def _plausible_rate(rate: float) -> float:
    return rate if 0.1 <= rate <= 1000 else 0.0


def _probe_video(data: bytes) -> MediaInfo:
    with FrameReader(data) as reader:
        return MediaInfo("video", reader.width, reader.height, len(reader), reader.fps)


class FrameReader:
    """Frames of one video by number in order of presentation, with PyAV.

    Args:
        source: Bytes of the file, or its path.
        threads: Decoder threads; 0 lets the decoder choose.

    Raises:
        BadSampleError: If it cannot be opened or holds no video frames.
    """

    def __init__(self, source: bytes | str, *, threads: int = 1) -> None:
        import av

        self._av = av
        try:
            self._container = av.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            self._stream = self._container.streams.video[0]
        except (av.error.FFmpegError, IndexError, ValueError, OSError) as error:
            raise BadSampleError("undecodable", f"video does not open: {error}") from error
        self.width, self.height = self._stream.codec_context.width, self._stream.codec_context.height
        _check_size(self.width, self.height)
        self.fps = _plausible_rate(float(self._stream.average_rate or 0))
        self._stream.codec_context.thread_count = threads
        self._stream.thread_type = "NONE" if threads == 1 else "AUTO"
        self._pts = self._list_pts()
        if not self._pts:
            raise BadSampleError("undecodable", "video holds no frames")

    def _list_pts(self) -> list[int]:
        try:
            packets = self._container.demux(self._stream)
            return sorted(p.pts for p in packets if p.pts is not None and not p.is_discard)
        except self._av.error.FFmpegError as error:
            raise BadSampleError("undecodable", f"video does not read: {error}") from error

    @property
    def color(self) -> Any:
        """The ``av`` codec context, which holds the colour tags of the stream."""
        return self._stream.codec_context

    def __len__(self) -> int:
        return len(self._pts)

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def frames(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Decode consecutive frames, from the key frame before the first.

        Args:
            start: Number of the first frame.
            stop: Number after the last.

        Yields:
            ``(number, av.VideoFrame)`` of the frames that decode; a number may be missing in a damaged file.

        Raises:
            BadSampleError: If the decoder gives up.
        """
        stop = min(stop, len(self._pts))
        if start >= stop:
            return
        last = self._pts[stop - 1]
        try:
            self._container.seek(self._pts[start], stream=self._stream, backward=True, any_frame=False)
            for frame in self._container.decode(self._stream):
                pts = frame.pts  # kept: whoever takes the frame may re-time it
                if pts is None or pts < self._pts[start]:
                    continue
                if pts > last:
                    return
                yield bisect.bisect_left(self._pts, pts), frame
                if pts == last:
                    return
        except self._av.error.FFmpegError as error:
            raise BadSampleError("undecodable", f"video does not decode: {error}") from error


def _decode_pyav(data: bytes, numbers: list[int]) -> np.ndarray:
    with FrameReader(data) as reader:
        _check_range(numbers, len(reader))
        wanted = set(numbers)
        found: dict[int, np.ndarray] = {}
        for number, frame in reader.frames(numbers[0], numbers[-1] + 1):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
    missing = sorted(wanted - found.keys())
    if missing:
        raise BadSampleError("undecodable", f"frames {missing[:5]} do not decode")
    return np.stack([found[number] for number in numbers])


@lru_cache(maxsize=1)
def _decord() -> Any:
    import decord

    decord.logging.set_level(decord.logging.FATAL)
    return decord


def _decode_decord(data: bytes, numbers: list[int]) -> np.ndarray:
    # decord prints the bytes it cannot open to stderr, so it gets only what looks like a video.
    if data[4:8] not in (b"ftyp", b"moov", b"mdat") and data[:4] not in (b"\x1aE\xdf\xa3", b"RIFF"):
        return _decode_pyav(data, numbers)
    decord = _decord()
    try:
        reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
        _check_range(numbers, len(reader))
        frames = reader.get_batch(numbers).asnumpy()
    except BadSampleError:
        raise
    except Exception as error:
        # decord 0.6 cannot hand out frames of some widths (16, 24, 48, 72): its row padding. PyAV has the last word.
        logger.debug("decord failed (%s); decoding with PyAV", str(error).splitlines()[0] if str(error) else error)
        return _decode_pyav(data, numbers)
    del reader
    return frames


def _check_range(numbers: list[int], frames: int) -> None:
    if numbers[0] < 0 or numbers[-1] >= frames:
        raise BadSampleError("too_short", f"asked for frames {numbers[0]}..{numbers[-1]} of a clip of {frames}")


def decode_clip(
    data: bytes,
    *,
    start: int,
    num_frames: int,
    stride: int = 1,
    height: int | None = None,
    width: int | None = None,
    backend: Backend | None = None,
) -> np.ndarray:
    """Decode part of a video.

    Args:
        data: Bytes of the file.
        start: Number of the first frame.
        num_frames: Frames to return.
        stride: Source frames per returned frame.
        height: Rows to resize to, antialiased; None keeps the source's.
        width: Columns to resize to; None keeps the source's.
        backend: Decoder; None takes decord, or PyAV where decord is not installed.

    Returns:
        uint8 ``(t, h, w, 3)``, RGB. Bytes that do not decode, and a clip shorter than asked, give ``BadSampleError``;
        a decoder that is not installed gives ``ConfigError``.
    """
    _check_bytes(data)
    numbers = [start + i * stride for i in range(num_frames)]
    decoders: dict[str, Callable[[bytes, list[int]], np.ndarray]] = {"decord": _decode_decord, "pyav": _decode_pyav}
    frames = decoders[choose_backend(backend)](data, numbers)
    _check_size(frames.shape[2], frames.shape[1])
    if height is None and width is None:
        return frames
    return resize(frames, height or frames.shape[1], width or frames.shape[2])
