"""Limits on what becomes a sample, read from what a media file says of itself. Decodes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.cut import frame_range, turn_of, upright
from ltd.data.decode import IMAGE_EXTENSIONS, MediaInfo, probe
from ltd.data.frames import FrameReader
from ltd.data.manifest import Row, extension_of

#: Most bits in which the hashes of near-duplicates may differ: two unrelated pictures differ in 32 of 64 on average.
MAX_DEDUPE_BITS = 16


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """What is left out; None is no limit. Length limits are for clips only."""

    min_side: int | None = None  #: Short side of the source, pixels.
    max_side: int | None = None  #: Short side of the source, pixels.
    min_aspect: float | None = None  #: Width over height of the source.
    max_aspect: float | None = None  #: Width over height of the source.
    min_duration_s: float | None = None  #: Length of the clip, seconds.
    max_duration_s: float | None = None  #: Length of the clip, seconds.
    min_frames: int | None = None  #: Length of the clip, frames.
    max_frames: int | None = None  #: Length of the clip, frames.
    dedupe_bits: int | None = None  #: Bits in which the hashes of near-duplicates differ at most, 0 to 16.

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            low = 0 if item.name == "dedupe_bits" else math.ulp(0.0)
            if value is not None and not low <= value < math.inf:
                raise ConfigError(f"{item.name}: got {value}, needed {'0 or more' if low == 0 else 'more than 0'}")
        for name in ("side", "aspect", "duration_s", "frames"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None and most is not None and most < least:
                raise ConfigError(f"max_{name}: got {most}, needed min_{name} = {least} or more")
        if self.dedupe_bits is not None and self.dedupe_bits > MAX_DEDUPE_BITS:
            raise ConfigError(f"dedupe_bits: got {self.dedupe_bits}, needed 0 to {MAX_DEDUPE_BITS}")

    @property
    def probes(self) -> bool:
        """Whether any limit needs the size or length of the media."""
        return any(getattr(self, item.name) is not None for item in fields(self) if item.name != "dedupe_bits")


def probe_file(path: Path) -> MediaInfo:
    """Read what a media file holds without decoding it.

    Args:
        path: The file; videos are not read into memory.

    Returns:
        Kind, size, frames and rate. A file that does not open gives ``BadSampleError``.
    """
    if not path.stat().st_size:
        raise BadSampleError("empty", "zero bytes")
    if extension_of(path) in IMAGE_EXTENSIONS:
        return probe(path.read_bytes(), extension_of(path))
    with FrameReader(str(path)) as reader:
        width, height = upright((reader.width, reader.height), turn_of(path))
        return MediaInfo("video", width, height, len(reader), reader.fps)


def refusal(row: Row, info: MediaInfo, options: FilterOptions) -> tuple[str, str] | None:
    """Judge a row by the limits.

    Args:
        row: What would be cut.
        info: What its file holds.
        options: The limits.

    Returns:
        The first limit that it breaks and why, in words; None where it keeps all.

    Raises:
        BadSampleError: If its frames lie outside the source, or it tells no rate where a duration is asked for.
    """
    side, aspect = min(info.width, info.height), info.width / info.height
    values = [("side", side, f"short side of {side} pixels"), ("aspect", aspect, f"width over height of {aspect:.3f}")]
    if info.kind == "video":
        start, stop = frame_range(row, frames=info.frames, fps=info.fps)
        values.append(("frames", stop - start, f"{stop - start} frames"))
        if options.min_duration_s is not None or options.max_duration_s is not None:
            if info.fps <= 0:
                raise BadSampleError("no_fps", f"{row.path} tells no frame rate, so its duration is not known")
            seconds = (stop - start) / info.fps
            values.append(("duration_s", seconds, f"{seconds:.3f} s"))
    for name, value, words in values:
        least, most = getattr(options, f"min_{name}"), getattr(options, f"max_{name}")
        if least is not None and value < least:
            return f"min_{name}", f"{words}, needed {least} or more"
        if most is not None and value > most:
            return f"max_{name}", f"{words}, needed {most} or less"
    return None
