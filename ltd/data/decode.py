"""Media bytes to frames: probing, clips and stills.

The only importer of decord and PyAV's decoders. A clip is decoded from the key frame before its first frame on, no
other frames are touched, and the decoder is closed with the clip (decord leaks otherwise).
"""

from __future__ import annotations

import ctypes
import io
import logging
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.dlpack import from_dlpack

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.frames import FrameReader, Scaler, check_size, first_line
from ltd.data.transforms import cover, cover_size, cut_offset

logger = logging.getLogger(__name__)
# Once and for all, since `catch_warnings` is not safe in threads: sizes are checked here, EXIF may be damaged.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")

#: Images and frames of more pixels than this are refused before they are decoded.
MAX_PIXELS = 64_000_000
VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm", "avi")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
Backend = Literal["decord", "pyav"]
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_M_ARENA_MAX = -8  # of malloc.h
_ARENAS = 2
#: Pixels that decord hands out at a time, at full size.
_CHUNK_PIXELS = 20_000_000


class _View(NamedTuple):
    height: int | None
    width: int | None
    crop: tuple[float, float]


@dataclass(frozen=True)
class MediaInfo:
    """What a media file holds."""

    kind: Literal["image", "video"]  #: Kind of sample.
    width: int  #: Pixels.
    height: int  #: Pixels.
    frames: int  #: Frames; 1 for an image.
    fps: float  #: Frames per second; 0 for an image and where the file tells none.


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


def _check_bytes(data: bytes) -> None:
    if not data:
        raise BadSampleError("empty", "zero bytes")


def decode_image(
    data: bytes,
    *,
    height: int | None = None,
    width: int | None = None,
    crop: tuple[float, float] = (0.5, 0.5),
) -> np.ndarray:
    """Decode a still; transparency is laid on white and the EXIF orientation applied.

    Args:
        data: Bytes of a JPEG, PNG or WebP file.
        height: Rows to cover, antialiased; None, as ``width``, keeps the source's.
        width: Columns to cover.
        crop: Position of the cut in (height, width) as a share of the slack; (0.5, 0.5) is the centre.

    Returns:
        uint8 ``(1, h, w, 3)``, RGB.

    Raises:
        BadSampleError: If the bytes are no such image or it is larger than ``MAX_PIXELS``.
    """
    image = _open_image(data)
    turn = _orientation(image)
    stored = image.size
    shown = stored if turn in _SIDEWAYS else stored[::-1]
    if height is None or width is None:
        return np.asarray(_upright(_to_rgb(image), turn))[None]
    scaled = cover_size(*shown, height, width)
    check_size(*scaled, MAX_PIXELS)
    size = scaled if turn in _SIDEWAYS else scaled[::-1]
    # A JPEG can be decoded at a half, quarter or eighth of its size; twice the wanted size is enough to filter well.
    image.draft(None, (2 * size[0], 2 * size[1]))
    reduced = round(stored[0] / image.size[0]) if image.size != stored else 1
    image = _to_rgb(image)
    if size != stored:  # the last column and row of a reduced JPEG may lie partly outside of the picture
        box = (0.0, 0.0, stored[0] / reduced, stored[1] / reduced)
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    top, left = cut_offset(scaled, height, width, crop)
    pixels = np.asarray(_upright(image, turn))
    return np.ascontiguousarray(pixels[None, top : top + height, left : left + width])


#: EXIF orientations that turn the picture by a quarter.
_SIDEWAYS = (5, 6, 7, 8)
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # EXIF is a container of its own, and damage there leaves the pixels whole
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Load an opened image (its first frame, where it is animated) as RGB, laid on white."""
    try:
        if image.mode.startswith("I"):  # 16 bits of grey
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(image, mask=image.getchannel("A"))
            return white
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen types on corrupt bytes.
        raise BadSampleError("undecodable", f"image does not decode: {first_line(error)}") from error


def _open_image(data: bytes) -> Image.Image:
    _check_bytes(data)
    try:
        image = Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        # Pillow's own limit, which is higher than ours and not ours to change; its message begins with the pixels.
        pixels = re.search(r"\d+", str(error))
        size = f"{pixels[0]} pixels" if pixels else "its size"
        raise BadSampleError("too_large", f"{size} is more than the limit of {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:  # says no more than the name of a buffer
        raise BadSampleError("undecodable", "not a JPEG, PNG or WebP image") from error
    except Exception as error:  # as many types as there are ways to damage a header
        raise BadSampleError("undecodable", f"not a JPEG, PNG or WebP image: {first_line(error)}") from error
    check_size(*image.size, MAX_PIXELS)
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
    except BadSampleError as error:
        if error.cause != "undecodable":
            raise
        try:
            return _probe_video(data)
        except BadSampleError as second:
            raise error if second.cause == "wrong_kind" else second from None  # an image, and it is damaged


def _probe_image(data: bytes) -> MediaInfo:
    image = _open_image(data)
    width, height = image.size[::-1] if _orientation(image) in _SIDEWAYS else image.size
    return MediaInfo("image", width, height, 1, 0.0)


def _probe_video(data: bytes) -> MediaInfo:
    with FrameReader(data) as reader:
        if len(reader) == 1:
            raise BadSampleError("one_frame", "a video of one frame, needed two or more; store a still as an image")
        return MediaInfo("video", *reader.display_size, len(reader), reader.fps)


def _decode_pyav(data: bytes, numbers: list[int], view: _View) -> np.ndarray:
    with FrameReader(data) as reader:
        return reader.pick(numbers, Scaler(*view, reader.turn))


@lru_cache(maxsize=1)
def _decord() -> Any:
    import decord

    decord.logging.set_level(decord.logging.FATAL)
    _limit_arenas()
    return decord


def _limit_arenas() -> None:
    """Keep glibc from giving the threads that decord starts for each clip heaps of their own, which never shrink."""
    try:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)
    except (AttributeError, OSError, TypeError):  # another libc
        logger.debug("no mallopt; decord's memory may grow")


def _decode_decord(data: bytes, numbers: list[int], view: _View) -> np.ndarray:
    """Let decord decode an excerpt that PyAV made: no pass over the file, no frames that none refers to.

    decord thus sees neither damaged containers nor codecs that it gets wrong (10 bits, B-frames of MPEG-4), and its own
    scaling, which is bilinear, is not used.
    """
    with FrameReader(data) as reader:
        found = reader.excerpt(numbers)
        if found is None:
            return reader.pick(numbers, Scaler(*view, reader.turn))
        excerpt, inside = found
        chunk = max(1, _CHUNK_PIXELS // (reader.width * reader.height))
        turn, size = reader.turn, reader.display_size[::-1]
    if view.height is not None and view.width is not None:
        check_size(*cover_size(*size, view.height, view.width), MAX_PIXELS)
    decord = _decord()
    parts: list[np.ndarray] = []
    try:
        decoder = decord.VideoReader(io.BytesIO(excerpt), ctx=decord.cpu(0), num_threads=1)
        for start in range(0, len(inside), chunk):
            pixels = from_dlpack(decoder.get_batch(inside[start : start + chunk]).to_dlpack()).numpy()
            pixels = np.rot90(pixels, -turn // 90, axes=(1, 2))
            if view.height is not None and view.width is not None:
                pixels = cover(pixels, view.height, view.width, crop=view.crop)
            parts.append(pixels)
        del decoder  # decord leaks what is not closed with the clip
    except Exception as error:
        # decord 0.6 cannot hand out frames of some widths (16, 24, 48, 72): its row padding. PyAV has the last word.
        logger.debug("decord failed (%s); decoding with PyAV", str(error).splitlines()[0] if str(error) else error)
        return _decode_pyav(data, numbers, view)
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def decode_clip(
    data: bytes,
    *,
    start: int,
    num_frames: int,
    stride: int = 1,
    height: int | None = None,
    width: int | None = None,
    crop: tuple[float, float] = (0.5, 0.5),
    backend: Backend | None = None,
) -> np.ndarray:
    """Decode part of a video.

    Args:
        data: Bytes of the file.
        start: Number of the first frame.
        num_frames: Frames to return.
        stride: Source frames per returned frame.
        height: Rows to cover, antialiased; None, as ``width``, keeps the source's.
        width: Columns to cover.
        crop: Position of the cut in (height, width) as a share of the slack; (0.5, 0.5) is the centre.
        backend: Decoder; None takes decord, or PyAV where decord is not installed.

    Returns:
        uint8 ``(t, h, w, 3)``, RGB. Bytes that do not decode, and a clip shorter than asked, give ``BadSampleError``;
        a decoder that is not installed gives ``ConfigError``.
    """
    _check_bytes(data)
    numbers = [start + i * stride for i in range(num_frames)]
    decoders = {"decord": _decode_decord, "pyav": _decode_pyav}
    return decoders[choose_backend(backend)](data, numbers, _View(height, width, crop))
