"""The sample table of an mp4, read from its bytes: when each frame is shown, without touching a packet.

A pass over all packets, which other containers need, costs as much as decoding many frames. Knows no decoder. Whatever
is unusual (fragments, several video tracks, edits beyond a shift) gives None, and the caller makes the pass.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Buffer = bytes | mmap.mmap
_MAX_SAMPLES = 20_000_000
_TURNS = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 90, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 270}


@dataclass(frozen=True)
class VideoTrack:
    """The one video track of a file."""

    timescale: int  #: Ticks per second.
    dts: np.ndarray  #: int64 (n,), decoding times in ticks, in order of decoding.
    pts: np.ndarray  #: int64 (n,), presentation times in ticks, in order of decoding.


@dataclass(frozen=True)
class _Box:
    kind: bytes
    start: int  #: first byte of the content
    stop: int


def _boxes(data: Buffer, start: int, stop: int) -> Iterator[_Box]:
    while start + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1 and start + 16 <= stop:
            (size,) = struct.unpack_from(">Q", data, start + 8)
            header = 16
        elif size == 0:
            size = stop - start
        if size < header:
            return
        yield _Box(kind, start + header, min(start + size, stop))
        start += size


def _find(data: Buffer, box: _Box, *path: bytes) -> _Box | None:
    for kind in path:
        found = next((inner for inner in _boxes(data, box.start, box.stop) if inner.kind == kind), None)
        if found is None:
            return None
        box = found
    return box


def _video_boxes(data: Buffer) -> tuple[_Box, list[_Box]] | None:
    if data[4:8] not in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return None
    movie = _find(data, _Box(b"", 0, len(data)), b"moov")
    if movie is None:
        return None
    tracks = []
    for track in _boxes(data, movie.start, movie.stop):
        handler = _find(data, track, b"mdia", b"hdlr") if track.kind == b"trak" else None
        if handler is not None and data[handler.start + 8 : handler.start + 12] == b"vide":
            tracks.append(track)
    return movie, tracks


def read_turn(data: Buffer) -> int:
    """Read how far the picture is to be turned, as phones record.

    Args:
        data: Bytes of the file, mp4 or not, or a map of it.

    Returns:
        0, 90, 180 or 270 degrees clockwise; 0 for anything but the matrix of an mp4 that turns by quarters.
    """
    try:
        found = _video_boxes(data)
        if found is None or not found[1]:
            return 0
        header = _find(data, found[1][0], b"tkhd")
        if header is None:
            return 0
        matrix = struct.unpack_from(">9i", data, header.start + (52 if data[header.start] == 1 else 40))
    except struct.error:
        return 0
    return _TURNS.get(tuple(round(matrix[i] / 65536) for i in (0, 1, 3, 4)), 0)


def read_track(data: Buffer) -> VideoTrack | None:
    """Read the times of all frames from an mp4's index.

    Args:
        data: Bytes of the file, or a map of it.

    Returns:
        The track; None where the file is no plain mp4 with one video track.
    """
    try:
        found = _video_boxes(data)
        if found is None or len(found[1]) != 1 or _find(data, found[0], b"mvex") is not None:
            return None
        return _read_times(data, found[1][0])
    except struct.error:
        return None


def _read_times(data: Buffer, track: _Box) -> VideoTrack | None:
    header, table = _find(data, track, b"mdia", b"mdhd"), _find(data, track, b"mdia", b"minf", b"stbl")
    durations = _find(data, table, b"stts") if table is not None else None
    if header is None or table is None or durations is None:
        return None
    (timescale,) = struct.unpack_from(">I", data, header.start + (20 if data[header.start] == 1 else 12))
    steps = _expand(data, durations)
    if steps is None or not len(steps) or timescale == 0:
        return None
    dts = np.concatenate([[0], np.cumsum(steps[:-1])])
    pts = dts
    offsets = _find(data, table, b"ctts")
    if offsets is not None:
        shifts = _expand(data, offsets)
        if shifts is None or len(shifts) != len(dts):
            return None
        pts = dts + shifts
    shift = _edit_shift(data, track)
    if shift is None or (shift and shift != pts.min()):
        return None
    return VideoTrack(timescale, dts - shift, pts - shift)


def _expand(data: Buffer, box: _Box) -> np.ndarray | None:
    """Read a table of (count, value) runs; None where it is damaged or absurd."""
    (runs,) = struct.unpack_from(">I", data, box.start + 4)
    if box.start + 8 + 8 * runs > box.stop:
        return None
    table = np.frombuffer(data, ">i4", 2 * runs, box.start + 8).reshape(runs, 2).astype(np.int64)
    counts = table[:, 0]
    if (counts < 0).any() or counts.sum() > _MAX_SAMPLES:
        return None
    return np.repeat(table[:, 1], counts)


def _edit_shift(data: Buffer, track: _Box) -> int | None:
    """Return the time at which the presentation starts; None for edits that do more than shift."""
    edits = _find(data, track, b"edts", b"elst")
    if edits is None:
        return 0
    (count,) = struct.unpack_from(">I", data, edits.start + 4)
    if count != 1:
        return None
    if data[edits.start] == 1:
        _, time, rate = struct.unpack_from(">Qqi", data, edits.start + 8)
    else:
        _, time, rate = struct.unpack_from(">Iii", data, edits.start + 8)
    return time if time >= 0 and rate == 65536 else None
