"""A tar of 480p mp4 to 17-frame clips of 256x256 pixels from anywhere: ours against WebDataset with each decoder.

The films are as cameras and sites write them: x264's defaults, B-frames, a key frame every 250 frames or at a cut. Ours
is the whole training loader; the peers read the same tar in order and decode the same windows. All use one thread
(decord brings a second one of its own), all end in uint8 arrays.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import logging
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.dlpack import from_dlpack

from ltd.data import DataConfig, ViewConfig, build_loader
from ltd.data.decode import Backend, available_backends, choose_backend, decode_clip
from ltd.data.index import index_tar, open_index
from ltd.data.plan import random_placement
from ltd.data.transforms import cover_size, cut_offset
from tools.benches.table import Row, System, interleave
from tools.quickstart_media import fetch_film

logger = logging.getLogger(__name__)

KIND = "data"
NAME = "decode"
LAYOUT = "one process, one thread"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "bench"
CLIPS, CLIP_FRAMES = 12, 360
WIDTH, HEIGHT, FPS = 854, 480, 24
VIEW = ViewConfig(num_frames=17, height=256, width=256)
SHAPES = f"{CLIPS} films of {CLIP_FRAMES} frames of {WIDTH} x {HEIGHT} pixels to clips of 17 x 256 x 256"
#: Passes over the tar in each round, each with other windows.
PASSES = 2
#: Peers below this are no alternative, however fast.
PSNR_LIMIT_DB = 40.0
_BATCH = 4
TINY_SHAPES = f"{_BATCH} films of {FPS} frames of {WIDTH} x {HEIGHT} pixels to clips of 17 x 256 x 256"

Decode = Callable[[bytes, int], np.ndarray]


def make_tar(folder: Path, *, tiny: bool = False) -> Path:
    """Make the tar of films, unless it is there, and its index.

    Args:
        folder: Where it and the film it is cut from are kept.
        tiny: A few short films of moving bars, made here, instead.

    Returns:
        The tar's path.
    """
    tar = folder / f"bbb_{HEIGHT}p_{CLIPS}x{CLIP_FRAMES}.tar"
    if not tar.exists():
        film = None if tiny else fetch_film(folder)
        part = tar.with_suffix(".incomplete")
        with tarfile.open(part, "w") as archive:
            for number in range(CLIPS if film else _BATCH):
                logger.info("encoding film %d of %d", number + 1, CLIPS)
                for extension, data in (
                    ("mp4", _encode(film, 600 + 1050 * number) if film else _bars()),
                    ("txt", b"a rabbit"),
                ):
                    member = tarfile.TarInfo(f"{number:03d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        part.rename(tar)
    index_tar(tar)
    return tar


def _bars() -> bytes:
    """Encode a second of moving bars."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=FPS, options={"g": "250", "threads": "2", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        columns = np.arange(WIDTH)
        for number in range(FPS):
            row = ((columns + 8 * number) % 256).astype(np.uint8)
            pixels = np.ascontiguousarray(np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)))
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def _encode(film: Path, start: int) -> bytes:
    import av
    from av.video.reformatter import Interpolation

    buffer = io.BytesIO()
    with av.open(str(film)) as source, av.open(buffer, "w", format="mp4") as output:
        stream = source.streams.video[0]
        target = output.add_stream("libx264", rate=FPS, options={"g": "250", "threads": "2"})
        target.width, target.height, target.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        source.seek(int(start / FPS / stream.time_base), stream=stream)
        count = 0
        for frame in source.decode(stream):
            if round(frame.time * FPS) < start:
                continue
            small = frame.reformat(WIDTH, HEIGHT, "yuv420p", interpolation=Interpolation.BICUBIC)
            small.pts, small.time_base, small.pict_type = count, Fraction(1, FPS), 0
            output.mux(target.encode(small))
            count += 1
            if count == CLIP_FRAMES:
                break
        output.mux(target.encode())
    return buffer.getvalue()


def exact(data: bytes, start: int) -> np.ndarray:
    """Decode whole frames with interpolated colour, scale them with Pillow's antialiased bicubic filter, and cut."""
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    reformatter = VideoReformatter()
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    frames = []
    with av.open(io.BytesIO(data)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number >= start + VIEW.num_frames:
                break
            if number >= start:
                frames.append(reformatter.reformat(frame, format="rgb24", interpolation=flags).to_ndarray())
    return _cut(_pillow(np.stack(frames)))


_SCALED = cover_size(HEIGHT, WIDTH, VIEW.height, VIEW.width)


def _cut(frames: np.ndarray) -> np.ndarray:
    top, left = cut_offset(_SCALED, VIEW.height, VIEW.width, (0.5, 0.5))
    return np.ascontiguousarray(frames[:, top : top + VIEW.height, left : left + VIEW.width])


def _pillow(frames: np.ndarray) -> np.ndarray:
    size = _SCALED[::-1]
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def _torch(frames: torch.Tensor) -> np.ndarray:
    scaled = functional.interpolate(frames.permute(0, 3, 1, 2), _SCALED, mode="bicubic", antialias=True)
    return _cut(scaled.permute(0, 2, 3, 1).numpy())


def _numbers(start: int) -> list[int]:
    return list(range(start, start + VIEW.num_frames))


def _decord_pillow(data: bytes, start: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    return _cut(_pillow(reader.get_batch(_numbers(start)).asnumpy()))


def _decord_torch(data: bytes, start: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    return _torch(from_dlpack(reader.get_batch(_numbers(start)).to_dlpack()))


def _decord_scaled(data: bytes, start: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1, height=_SCALED[0], width=_SCALED[1])
    return _cut(reader.get_batch(_numbers(start)).asnumpy())


def _torchcodec(data: bytes, start: int, *, transforms: Sequence[Any] | None) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    settings: dict[str, Any] = {"seek_mode": "approximate", "num_ffmpeg_threads": 1, "dimension_order": "NHWC"}
    decoder = VideoDecoder(data, **settings, **({"transforms": transforms} if transforms else {}))
    return decoder.get_frames_in_range(start, start + VIEW.num_frames).data


def _torchcodec_scaled(data: bytes, start: int) -> np.ndarray:
    from torchcodec.transforms import Resize

    return _cut(_torchcodec(data, start, transforms=[Resize(_SCALED)]).numpy())


def _torchcodec_torch(data: bytes, start: int) -> np.ndarray:
    return _torch(_torchcodec(data, start, transforms=None))


def _pyav_scaled(data: bytes, start: int) -> np.ndarray:
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    reformatter, frames = VideoReformatter(), []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        container.seek(int(start / FPS / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            number = round(frame.time * FPS)
            if number >= start:
                small = reformatter.reformat(
                    frame, _SCALED[1], _SCALED[0], "rgb24", interpolation=Interpolation.BICUBIC, threads=1
                )
                frames.append(small.to_ndarray())
            if number >= start + VIEW.num_frames - 1:
                break
    return _cut(np.stack(frames))


#: Name, packages it needs, and how it decodes a window.
PEERS: tuple[tuple[str, tuple[str, ...], Decode], ...] = (
    ("decord, whole frames, Pillow (plain)", ("decord",), _decord_pillow),
    ("decord, whole frames, torch's uint8 resize", ("decord",), _decord_torch),
    ("decord, its own scaling", ("decord",), _decord_scaled),
    ("torchcodec approximate, its own Resize", ("torchcodec",), _torchcodec_scaled),
    ("torchcodec approximate, torch's uint8 resize", ("torchcodec",), _torchcodec_torch),
    ("PyAV, swscale to the size", ("av",), _pyav_scaled),
)
PLAIN = PEERS[0][0]


@dataclass(frozen=True)
class Work:
    """What every system does in a round."""

    tar: Path
    starts: dict[str, list[int]]  #: First frames by key, one per pass.

    @property
    def num_clips(self) -> int:
        """Windows of a round."""
        return sum(len(starts) for starts in self.starts.values())

    def config(self, backend: Backend) -> DataConfig:
        """Configure our loader for it."""
        return DataConfig(shards=str(self.tar), global_batch=_BATCH, views=(VIEW,), decoder=backend, num_workers=1)

    def ours(self, backend: Backend) -> int:
        """Run the training loader over it."""
        loader, seen = build_loader(self.config(backend), seed=0, global_rank=0, world_size=1), 0
        steps = iter(loader)
        while seen < self.num_clips:
            batches, info = next(steps)
            if info.bad:
                raise RuntimeError(f"{backend}: {info.bad[0]}")
            seen += sum(len(batch) for batch in batches)
        loader.close()
        return seen

    def peer(self, decode: Decode) -> int:
        """Read the tar with WebDataset and decode with a peer."""
        import webdataset

        seen = 0
        for number in range(PASSES):
            for sample in webdataset.WebDataset(str(self.tar), shardshuffle=False, empty_check=False):
                decode(sample["mp4"], self.starts[sample["__key__"]][number])
                seen += 1
        return seen

    def windows(self) -> Iterator[tuple[bytes, int]]:
        """Yield bytes and first frame of every window."""
        index = open_index(str(self.tar))
        for entry in index.entries:
            data = index.read(entry, entry.media)
            for start in self.starts[entry.key]:
                yield data, start


def make_work(tar: Path) -> Work:
    """Find the windows that the first epochs of our loader draw, so that the peers decode the same ones."""
    starts: dict[str, list[int]] = {}
    config = DataConfig(shards=str(tar), global_batch=_BATCH, views=(VIEW,))
    frames = {entry.key: (entry.frames, entry.fps) for entry in open_index(str(tar)).entries}
    loader = build_loader(config, seed=0, global_rank=0, world_size=1)
    steps = iter(loader)
    for _ in range(PASSES * len(frames) // _BATCH):
        (batch,), _ = next(steps)
        for key, draw in zip(batch.keys, batch.draws, strict=True):
            count, fps = frames[key]
            place = random_placement(VIEW, frames=count, fps=fps, seed=0, draw=draw, flip=False)
            starts.setdefault(key, []).append(place.start)
    loader.close()
    return Work(tar, starts)


def lowest_psnr(windows: Sequence[tuple[bytes, int]], wanted: Sequence[np.ndarray], decode: Decode) -> float:
    """Compare a decoder with the exact clips.

    Args:
        windows: Bytes and first frame.
        wanted: Their exact clips.
        decode: The decoder.

    Returns:
        PSNR of its worst clip, in dB.
    """
    errors = [
        float(np.mean((decode(*window).astype(np.float64) - exact_clip) ** 2))
        for window, exact_clip in zip(windows, wanted, strict=True)
    ]
    return 10 * float(np.log10(255**2 / max(errors)))


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _unusable(package: str) -> str:
    """Say why a package cannot be used; "" where it can."""
    if find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError):  # torchcodec without FFmpeg's shared libraries
        return f"{package} is installed but does not load"
    return ""


def _systems(work: Work) -> Iterator[System]:
    windows = list(work.windows())
    wanted = [exact(*window) for window in windows]
    for backend in available_backends():
        package = {"decord": "decord", "pyav": "av"}[backend]

        def ours(data: bytes, start: int, backend: Backend = backend) -> np.ndarray:
            return decode_clip(data, start=start, num_frames=17, height=256, width=256, backend=backend)

        yield System(
            name=f"ltd loader, {backend} ({package} {_version(package)})",
            run=lambda backend=backend: work.ours(backend),
            ours=backend == choose_backend(),
            psnr_db=lowest_psnr(windows, wanted, ours),
        )
    for name, packages, decode in PEERS:
        missing = [reason for package in ("webdataset", *packages) if (reason := _unusable(package))]
        if missing:
            yield System(name=f"webdataset + {name}", run=None, missing=", ".join(missing))
            continue
        yield System(
            name=f"webdataset + {name} ({packages[0]} {_version(packages[0])})",
            run=lambda decode=decode: work.peer(decode),
            psnr_db=lowest_psnr(windows, wanted, decode),
        )


def measure(repeats: int, *, tiny: bool = False) -> list[Row]:
    """Time all systems over the same windows.

    Args:
        repeats: Rounds.
        tiny: The smallest sizes, to see that it runs.

    Returns:
        Rows per 1,000 clips.
    """
    torch.set_num_threads(1)
    title = f"{HEIGHT}p mp4 to {VIEW.num_frames}x{VIEW.height}x{VIEW.width} clips"
    if not tiny:
        return interleave(title, list(_systems(make_work(make_tar(FOLDER)))), repeats=repeats)
    with tempfile.TemporaryDirectory(prefix="ltd-bench-decode-") as folder:
        return interleave(title, list(_systems(make_work(make_tar(Path(folder), tiny=True)))), repeats=repeats)


def _median(clock: str, row: Row) -> float:
    return statistics.median(getattr(row, clock))


def summary(rows: Sequence[Row]) -> list[str]:
    """Say what each of our backends reaches against the plain way, and against the best peer that is exact enough.

    Args:
        rows: What ``measure`` returned.

    Returns:
        Lines of Markdown.
    """
    peers = [row for row in rows if not row.missing and not row.system.startswith("ltd ")]
    eligible = [row for row in peers if (row.psnr_db or 0) >= PSNR_LIMIT_DB]
    lines = []
    for own in (row for row in rows if row.system.startswith("ltd ")):
        for clock, word in (("cpu_s", "CPU"), ("wall_s", "wall")):
            named = {"plain": [row for row in peers if PLAIN in row.system], "the best": eligible}
            for title, found in named.items():
                if not found:
                    continue
                best = min(found, key=partial(_median, clock))
                pairs = [a / b for a, b in zip(getattr(best, clock), getattr(own, clock), strict=True)]
                limit = "" if title == "plain" else f" of at least {PSNR_LIMIT_DB:g} dB"
                lines.append(
                    f"- {own.system}: {statistics.median(pairs):.2f} times as fast in {word} time as {title}{limit} "
                    f"({best.system})."
                )
    return lines
