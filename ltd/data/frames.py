"""Frames of one video by number, decoded with PyAV.

The only importer of PyAV's decoders. A clip is decoded from the key frame before its first frame on; on the way there
the frames that no other refers to are passed over, which leaves the wanted ones bit for bit as they are.
"""

from __future__ import annotations

import bisect
import io
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ltd.data.batch import BadSampleError
from ltd.data.h264 import IDR, read_head, read_picture
from ltd.data.mp4 import read_track, read_turn
from ltd.data.transforms import cover_size, cut_offset

#: Frames of a video of more pixels than this are refused: 8192x4352, above 8K. A decoder holds up to 17 of them.
MAX_VIDEO_PIXELS = 8192 * 4352
#: Codecs whose decoder drops exactly those frames that no other refers to. HEVC's would drop some that others need.
_SKIPPING_CODECS = ("h264", "mpeg4")
#: Opening a file otherwise decodes its first frames, to learn what the decoder tells anyhow.
_OPEN_OPTIONS = {"skip_frame": "all", "max_pixels": str(MAX_VIDEO_PIXELS), "threads": "1"}
_MAX_STREAMS = 32
#: Duration of a frame in an excerpt, in seconds; which one does not matter.
_TICK = Fraction(1, 24)
#: Where the frame asked for does not come, decoding starts again from the key frame before this many frames earlier.
_RETRY_FRAMES = 32


def check_size(width: int, height: int, limit: int) -> None:
    """Refuse a picture without pixels or with too many.

    Args:
        width: Columns.
        height: Rows.
        limit: Pixels allowed.

    Raises:
        BadSampleError: If there are none or more.
    """
    if width < 1 or height < 1:
        raise BadSampleError("undecodable", f"media of {width}x{height} pixels")
    if width * height > limit:
        raise BadSampleError("too_large", f"{width}x{height} is more than the limit of {limit} pixels")


def _check_rate(rate: float) -> float:
    """Refuse a stated rate that cannot be true; 0 is a rate that is not stated."""
    if rate != 0 and not 0.1 <= rate <= 1000:
        raise BadSampleError("absurd_fps", f"tells {rate:.6g} frames per second; needed 0.1 to 1000")
    return rate


class FrameReader:
    """Frames of one video by number in order of presentation.

    Args:
        source: Bytes of the file, or its path.
        threads: Decoder threads; 0 lets the decoder choose.

    Raises:
        BadSampleError: If it cannot be opened or holds no video frames.
    """

    def __init__(self, source: bytes | str, *, threads: int = 1) -> None:
        import av

        self._av = av
        # Whatever libav, or PyAV on top of it, finds wrong: a damaged file must not end the run.
        self._errors = (av.error.FFmpegError, ValueError, OSError, ArithmeticError, LookupError, UnicodeError)
        self._data = source if isinstance(source, bytes) else _map(source)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        try:
            self._container = av.open(file, stream_options=[_OPEN_OPTIONS] * _MAX_STREAMS)
        except self._errors as error:
            raise BadSampleError("undecodable", f"video does not open: {first_line(error)}") from error
        try:
            self._open_stream(threads)
        except self._errors as error:
            self._container.close()
            if isinstance(error, BadSampleError):
                raise
            raise BadSampleError("undecodable", f"video does not read: {first_line(error)}") from error

    def _open_stream(self, threads: int) -> None:
        # FFmpeg opens a still image as a video of one frame, by a demuxer of its own for each format.
        name = str(self._container.format.name)
        if name.endswith("_pipe") or name == "image2":
            raise BadSampleError("wrong_kind", f"a {name.removesuffix('_pipe').upper()} image, not a video")
        if not self._container.streams.video:
            raise BadSampleError("undecodable", "no video in it")
        self._stream: Any = self._container.streams.video[0]
        context = self._stream.codec_context
        if context is None:
            raise BadSampleError("undecodable", "no decoder for its video")
        self.width, self.height = context.width, context.height
        check_size(self.width, self.height, MAX_VIDEO_PIXELS)
        self.fps = _check_rate(float(self._stream.average_rate or 0))
        #: Degrees clockwise by which players turn the picture; frames are yielded as stored.
        self.turn = read_turn(self._data)
        context.skip_frame = "DEFAULT"
        context.options = {"max_pixels": str(MAX_VIDEO_PIXELS)}
        context.thread_count = threads
        self._stream.thread_type = "NONE" if threads == 1 else "AUTO"
        self._pts = self._list_pts()
        if not self._pts:
            raise BadSampleError("undecodable", "video holds no frames")

    def _list_pts(self) -> list[int]:
        """List the times of all frames, in order: from an mp4's table where it is plain, else from all packets."""
        track = read_track(self._data)
        if track is not None and self._table_holds(track.timescale, track.dts):
            return np.unique(track.pts).tolist()
        packets = self._container.demux(self._stream)
        return sorted({p.pts for p in packets if p.pts is not None and not p.is_discard})

    def _table_holds(self, timescale: int, dts: np.ndarray) -> bool:
        """Tell whether libav reads the same table, and whether the file reaches to its end."""
        entries = self._stream.index_entries
        if len(entries) != len(dts) or self._stream.time_base != Fraction(1, timescale):
            return False
        first, last = entries[0], entries[len(dts) - 1]
        return first.timestamp == dts[0] and last.timestamp == dts[-1] and last.pos + last.size <= len(self._data)

    @property
    def color(self) -> Any:
        """The ``av`` codec context, which holds the colour tags of the stream."""
        return self._stream.codec_context

    @property
    def codec(self) -> str:
        """Name of the codec, such as ``h264``."""
        return str(self._stream.codec_context.codec.canonical_name)

    @property
    def display_size(self) -> tuple[int, int]:
        """Width and height once turned, in pixels."""
        return (self.height, self.width) if self.turn in (90, 270) else (self.width, self.height)

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
        except self._errors as error:
            raise BadSampleError("undecodable", f"video does not decode: {first_line(error)}") from error

    def pick(self, numbers: Sequence[int], convert: Callable[[Any], np.ndarray]) -> np.ndarray:
        """Decode some frames and no more than they need.

        Args:
            numbers: Numbers of the frames, ascending.
            convert: Makes an array of an ``av.VideoFrame``.

        Returns:
            The arrays, stacked.

        Raises:
            BadSampleError: If a frame is not there or does not decode.
        """
        self.check_range(numbers)
        found: dict[int, np.ndarray] = {}
        try:
            for back, skip in ((0, self.codec in _SKIPPING_CODECS), (_RETRY_FRAMES, False)):
                wanted = {self._pts[number] for number in numbers} - found.keys()
                for frame in self._decode(wanted, back=back, skip=skip):
                    if frame.pts in wanted and frame.pts not in found:
                        found[frame.pts] = convert(frame)
                if len(found) == len(set(numbers)):
                    return np.stack([found[self._pts[number]] for number in numbers])
        except self._errors as error:
            raise BadSampleError("undecodable", f"video does not decode: {first_line(error)}") from error
        missing = [number for number in numbers if self._pts[number] not in found]
        raise BadSampleError("undecodable", f"frames {missing[:5]} do not decode")

    def check_range(self, numbers: Sequence[int]) -> None:
        """Refuse numbers of frames that the video does not have.

        Args:
            numbers: Numbers of frames, ascending.

        Raises:
            BadSampleError: If there are such.
        """
        if numbers[0] < 0 or numbers[-1] >= len(self._pts):
            raise BadSampleError(
                "too_short", f"asked for frames {numbers[0]}..{numbers[-1]} of a clip of {len(self._pts)}"
            )

    def _packets(self, wanted: set[int], *, back: int = 0) -> Iterator[Any]:
        """Read from a key frame on until the packets of all wanted times have passed."""
        first = self._pts[max(0, bisect.bisect_left(self._pts, min(wanted)) - back)]
        self._container.seek(first, stream=self._stream, backward=True, any_frame=False)
        left = set(wanted)
        for packet in self._container.demux(self._stream):
            if packet.size == 0:  # PyAV's mark of the end
                return
            yield packet
            left.discard(packet.pts)
            if not left:
                return

    def _decode(self, wanted: set[int], *, back: int, skip: bool) -> Iterator[Any]:
        context = self._stream.codec_context
        for packet in self._packets(wanted, back=back):
            context.skip_frame = "NONREF" if skip and packet.pts not in wanted else "DEFAULT"
            yield from self._stream.decode(packet)
        yield from self._stream.decode(None)  # what the decoder still holds back

    def excerpt(self, numbers: Sequence[int]) -> tuple[bytes, list[int]] | None:
        """Copy what some frames need, undecoded, into a file of its own.

        Args:
            numbers: Numbers of the frames, ascending.

        Returns:
            Bytes of an mp4, and the numbers of the frames in it. None for anything but H.264 of 8 bits that begins
            where decoding can, and keeps to the size and parameters of its head.

        Raises:
            BadSampleError: If a frame is not there, or the file cannot be read to there.
        """
        self.check_range(numbers)
        head = read_head(self._stream.codec_context.extradata or b"") if self.codec == "h264" else None
        if head is None or not head.is_8_bit or head.width * head.height > MAX_VIDEO_PIXELS:
            return None
        wanted = {self._pts[number] for number in numbers}
        packets: list[Any] = []
        try:
            for packet in self._packets(wanted):
                picture = read_picture(bytes(packet), head)
                if picture is None or packet.pts is None or (not packets and picture.kind != IDR):
                    return None
                if packet.pts in wanted or picture.is_reference:
                    packets.append(packet)
            times = sorted(packet.pts for packet in packets)
            return self._mux(packets, times), [bisect.bisect_left(times, self._pts[number]) for number in numbers]
        except self._errors as error:
            raise BadSampleError("undecodable", f"video does not read: {first_line(error)}") from error

    def _mux(self, packets: list[Any], times: list[int]) -> bytes:
        """Write packets, in order of decoding, into an mp4 of one frame a tick; ``times`` are theirs, sorted."""
        ranks = [bisect.bisect_left(times, packet.pts) for packet in packets]
        delay = max(position - rank for position, rank in enumerate(ranks))
        buffer = io.BytesIO()
        with self._av.open(buffer, "w", format="mp4") as output:
            target = output.add_stream_from_template(self._stream)
            target.set_display_rotation(0)  # turned by us, like every other frame
            for position, (packet, rank) in enumerate(zip(packets, ranks, strict=True)):
                packet.stream, packet.time_base = target, _TICK
                packet.pts, packet.dts, packet.duration = rank, position - delay, 1
                output.mux(packet)
        return buffer.getvalue()


def _map(path: str) -> Any:
    """Map a file into memory, to look at its tables; b"" where that cannot be done."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return b""


def first_line(error: BaseException) -> str:
    """Take the first line of an error's message, without addresses in memory: messages must repeat."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", line)[:200]


class Scaler:
    """Turn decoded frames into RGB arrays of one size, scaled in the decoder's own colour planes.

    Args:
        height: Rows to cover; None, as ``width``, keeps the source's.
        width: Columns to cover.
        crop: Position of the cut in (height, width) as a share of the slack.
        turn: Degrees clockwise by which the picture is to be turned: 0, 90, 180 or 270.
    """

    def __init__(self, height: int | None, width: int | None, crop: tuple[float, float], turn: int = 0) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self._height, self._width, self._crop, self._turn = height, width, crop, turn
        self._reformatter = VideoReformatter()  # kept: it holds the filter's tables
        self._interpolation = Interpolation.BICUBIC

    def __call__(self, frame: Any) -> np.ndarray:
        """Convert one frame.

        Args:
            frame: An ``av.VideoFrame`` of any pixel format.

        Returns:
            uint8 ``(h, w, 3)``.
        """
        check_size(frame.width, frame.height, MAX_VIDEO_PIXELS)
        sideways = self._turn in (90, 270)
        shown = (frame.width, frame.height) if sideways else (frame.height, frame.width)
        height, width = self._height or shown[0], self._width or shown[1]
        scaled = cover_size(*shown, height, width)
        top, left = cut_offset(scaled, height, width, self._crop)
        if scaled == shown:
            pixels = self._reformat(frame, frame.height, frame.width, "rgb24").to_ndarray()
            return np.rot90(pixels, -self._turn // 90)[top : top + height, left : left + width]
        # Planar RGB: libswscale is three times as fast at it as at the interleaved form.
        stored = scaled[::-1] if sideways else scaled
        planes = self._reformat(frame, *stored, "gbrp").planes
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        for channel, plane in zip((1, 2, 0), planes, strict=True):
            rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
            pixels[..., channel] = np.rot90(rows, -self._turn // 90)[top : top + height, left : left + width]
        return pixels

    def _reformat(self, frame: Any, height: int, width: int, pixel_format: str) -> Any:
        return self._reformatter.reformat(
            frame,
            width,
            height,
            pixel_format,
            interpolation=self._interpolation,
            threads=1,
        )
