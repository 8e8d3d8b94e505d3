"""Cut samples out of media: shots of a film in one pass over it, images to a size. Knows no shards."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.decode import decode_image, probe
from ltd.data.frames import FrameReader
from ltd.data.manifest import Row, extension_of
from ltd.data.mp4 import read_turn
from ltd.data.transforms import FILTER, resize
from ltd.data.write import VideoEncoder, encode_image

#: Source frames without a shot that are decoded rather than sought over.
_GAP = 250


@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """How samples are stored."""

    size: int | None = None  #: Short side in pixels that larger media are scaled down to; None keeps the source's.
    crf: int = 16  #: Constant rate factor of x264, 0 (lossless) to 51.
    keyframe_every: int = 12  #: Frames between key frames, >= 1.
    quality: int = 95  #: Quality of re-encoded jpg and webp, 1 to 100.

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 16:
            raise ConfigError(f"size: got {self.size}, needed a short side of 16 pixels or more")
        if not 0 <= self.crf <= 51:
            raise ConfigError(f"crf: got {self.crf}, needed 0 to 51")
        if self.keyframe_every < 1:
            raise ConfigError(f"keyframe_every: got {self.keyframe_every}, needed 1 or more frames")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality: got {self.quality}, needed 1 to 100")


@dataclass(frozen=True)
class Piece:
    """One finished sample, or the reason why there is none."""

    row: Row  #: What it was made from.
    extension: str  #: Extension of the media member.
    data: bytes  #: Its bytes.
    provenance: dict[str, Any]  #: What the json member says.
    error: str | None = None  #: Why there is no sample; None for a good one.


def failed(row: Row, error: Exception) -> Piece:
    """Make the piece of a row that gave no sample."""
    cause = error.cause if isinstance(error, BadSampleError) else type(error).__name__
    message = str(error).replace(str(row.file), row.path)  # a report tells nothing of where the media lay
    return Piece(row, "", b"", {}, error=f"{cause}: {message}")


@lru_cache(maxsize=1024)
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_hash(path: Path) -> str:
    """Compute the sha256 of a file, once per state of it."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


def scaled(width: int, height: int, size: int | None, *, even: bool) -> tuple[int, int]:
    """Scale a picture down to a short side, never up.

    Args:
        width: Pixels.
        height: Pixels.
        size: Short side; None keeps it.
        even: Whether both sides must be even (yuv420p).

    Returns:
        (width, height).
    """
    factor = 1.0 if size is None else min(1.0, size / min(width, height))
    unit = 2 if even else 1
    return tuple(max(unit, round(side * factor / unit) * unit) for side in (width, height))  # type: ignore[return-value]


def turn_of(path: Path) -> int:
    """Read by how many degrees clockwise players turn a video: 0, 90, 180 or 270."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return read_turn(data)  # type: ignore[arg-type]  # a map reads like bytes and does not fill the memory


def upright(size: tuple[int, int], turn: int) -> tuple[int, int]:
    """Give the (width, height) of a picture once it is turned."""
    return (size[1], size[0]) if turn in (90, 270) else size


def frame_range(row: Row, *, frames: int, fps: float) -> tuple[int, int]:
    """Convert seconds to frames.

    Args:
        row: The row.
        frames: Frames of the source.
        fps: Frames per second of the source.

    Returns:
        First frame, ``round(start * fps)``, and the frame after the last, ``round(end * fps)`` or the source's end; a
        detected shot has frames already.

    Raises:
        BadSampleError: If the range holds less than two frames of the source, or the source tells no frame rate.
    """
    if row.span is not None:
        start, stop = row.span[0], min(row.span[1], frames)
    elif (row.start or row.end) and fps <= 0:
        raise BadSampleError("no_fps", f"{row.path} tells no frame rate, so start and end in seconds mean nothing")
    else:
        start = round((row.start or 0) * fps)
        stop = frames if row.end is None else min(frames, round(row.end * fps))
    if start >= stop:
        raise BadSampleError("outside_source", f"frames {start}..{stop} of a source of {frames} frames")
    if stop - start == 1:
        raise BadSampleError("one_frame", f"frame {start} alone is no clip, needed two frames or more")
    return start, stop


def cut_image(row: Row, options: CutOptions) -> Piece:
    """Make one image sample; an image that need not be scaled is copied byte for byte.

    Args:
        row: What to make.
        options: How to store it.

    Returns:
        The piece, with ``error`` set where the image cannot be used.
    """
    path = row.file
    extension = {"jpeg": "jpg"}.get(extension_of(path), extension_of(path))
    try:
        data = path.read_bytes()
        frame = decode_image(data)[0]
        source_height, source_width = frame.shape[:2]
        width, height = scaled(source_width, source_height, options.size, even=False)
        copied = (width, height) == (source_width, source_height)
        if not copied:
            data = encode_image(resize(frame[None], height, width)[0], extension, quality=options.quality)
    except (BadSampleError, OSError, ValueError) as error:
        return failed(row, error)
    transform: dict[str, Any] = {"copied": True} if copied else {"resize": FILTER, "quality": options.quality}
    provenance = {
        "source": row.path,
        "source_sha256": source_hash(path),
        "source_size": [source_width, source_height],
        "width": width,
        "height": height,
        "frames": 1,
        "transform": transform,
    }
    return Piece(row, extension, data, provenance)


@dataclass
class _Shot:
    """One shot while the film runs."""

    row: Row
    start: int
    stop: int
    encoder: VideoEncoder | None = None
    written: int = 0


class FilmCutter:
    """Cut any number of shots out of one video, decoding it once.

    Args:
        path: The video.
        options: How to store shots.
        threads: Decoder threads; 0 lets the decoder choose.
    """

    def __init__(self, path: Path, options: CutOptions, *, threads: int = 0) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        self._path, self._options = path, options
        self._reader = FrameReader(str(path), threads=threads)
        self._size = scaled(self._reader.width, self._reader.height, options.size, even=True)  # before it is turned
        self._turn = turn_of(path)
        self._reformatter = VideoReformatter()
        self._interpolation = av.video.reformatter.Interpolation.BICUBIC

    def cut(self, rows: Sequence[Row]) -> Iterator[Piece]:
        """Cut shots in the order in which they end.

        Args:
            rows: The shots; they may overlap.

        Yields:
            A piece per row, with ``error`` set where there is no sample.
        """
        shots: list[_Shot] = []
        with self._reader as reader:
            for row in rows:
                try:
                    start, stop = frame_range(row, frames=len(reader), fps=reader.fps)
                    shots.append(_Shot(row, start, stop))
                except BadSampleError as error:
                    yield failed(row, error)
            for run in _runs(shots):
                yield from self._cut_run(run)

    def _cut_run(self, shots: list[_Shot]) -> Iterator[Piece]:
        waiting, active = list(shots), []
        try:
            for number, frame in self._reader.frames(shots[0].start, max(shot.stop for shot in shots)):
                while waiting and waiting[0].start <= number:
                    active.append(waiting.pop(0))
                for shot in active:
                    if number < shot.stop:
                        self._add(shot, self._convert(frame))
                for shot in [shot for shot in active if shot.stop <= number + 1]:
                    active.remove(shot)
                    yield self._finish(shot)
            rest = BadSampleError("undecodable", "the video ends before the shot does")
        except BadSampleError as error:
            rest = error
        for shot in (*active, *waiting):
            yield failed(shot.row, rest)

    def _convert(self, frame: Any) -> Any:
        """Scale a frame, and turn it upright as players do."""
        kind = "rgb24" if self._turn else "yuv420p"
        scaled_frame = self._reformatter.reformat(frame, *self._size, kind, interpolation=self._interpolation)
        return np.rot90(scaled_frame.to_ndarray(), -self._turn // 90) if self._turn else scaled_frame

    def _add(self, shot: _Shot, frame: Any) -> None:
        if shot.encoder is None:
            width, height = upright(self._size, self._turn)
            shot.encoder = VideoEncoder(
                height=height,
                width=width,
                fps=self._reader.fps or 25.0,
                crf=self._options.crf,
                keyframe_every=self._options.keyframe_every,
                # A turned frame comes as RGB, which the encoder tags itself.
                color=None if self._turn else self._reader.color,
            )
        shot.encoder.add(frame)
        shot.written += 1

    def _finish(self, shot: _Shot) -> Piece:
        if shot.encoder is None or shot.written != shot.stop - shot.start:
            message = f"{shot.written} of {shot.stop - shot.start} frames decode"
            return failed(shot.row, BadSampleError("undecodable", message))
        stored = (self._reader.width, self._reader.height)
        width, height = upright(self._size, self._turn)
        provenance = {
            "source": shot.row.path,
            "source_sha256": source_hash(self._path),
            "source_size": list(upright(stored, self._turn)),
            "source_frames": len(self._reader),
            "start": shot.row.start if shot.row.span is None else shot.start / self._reader.fps,
            "end": shot.row.end if shot.row.span is None else shot.stop / self._reader.fps,
            **({} if shot.row.shot is None else {"shot": shot.row.shot}),
            "start_frame": shot.start,
            "end_frame": shot.stop,
            "width": width,
            "height": height,
            "frames": shot.written,
            "fps": self._reader.fps,
            "transform": {
                "resize": "none" if self._size == stored else "swscale-bicubic",
                **({"turn": self._turn} if self._turn else {}),
                "crf": self._options.crf,
                "keyframe_every": self._options.keyframe_every,
            },
        }
        return Piece(shot.row, "mp4", shot.encoder.finish(), provenance)


def _runs(shots: Sequence[_Shot]) -> Iterator[list[_Shot]]:
    """Group shots, by start, such that no group has a long gap that is cheaper to seek over."""
    run: list[_Shot] = []
    reach = 0
    for shot in sorted(shots, key=lambda shot: (shot.start, shot.stop, shot.row.number)):
        if run and shot.start > reach + _GAP:
            yield run
            run = []
        run.append(shot)
        reach = max(reach, shot.stop)
    if run:
        yield run


def _copy_video(row: Row, path: Path, options: CutOptions) -> Piece | None:
    """Take an mp4 as it is where nothing is cut or scaled; None where it must be encoded."""
    if extension_of(path) not in ("mp4", "m4v") or row.start or row.end is not None or row.span:
        return None
    data = path.read_bytes()
    info = probe(data, "mp4")
    if options.size is not None and min(info.width, info.height) > options.size:
        return None
    provenance = {
        "source": row.path,
        "source_sha256": source_hash(path),
        "source_size": [info.width, info.height],
        "source_frames": info.frames,
        "width": info.width,
        "height": info.height,
        "frames": info.frames,
        "fps": info.fps,
        "transform": {"copied": True},
    }
    return Piece(row, "mp4", data, provenance)


def cut_video(rows: Sequence[Row], options: CutOptions, *, threads: int = 0) -> Iterator[Piece]:
    """Make the samples of one video; an mp4 that is neither cut nor scaled is copied byte for byte.

    Args:
        rows: What to make; all of one file.
        options: How to store it.
        threads: Decoder threads; 0 lets the decoder choose.

    Yields:
        A piece per row, with ``error`` set where there is no sample.
    """
    path = rows[0].file
    left: list[Row] = []
    try:
        for row in rows:
            piece = _copy_video(row, path, options)
            if piece is None:
                left.append(row)
            else:
                yield piece
        cutter = FilmCutter(path, options, threads=threads) if left else None
    except (BadSampleError, OSError) as error:
        yield from (failed(row, error) for row in rows)
        return
    if cutter is not None:
        yield from cutter.cut(left)
