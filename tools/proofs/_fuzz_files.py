"""Small media of every kind, tars of them, and damage done to their bytes."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from PIL import Image

FRAMES = 40


def _film(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    still = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(still, 2 * step, axis=1)[:height, :width] for step in range(FRAMES)])


def _video(codec: str, container: str, *, fragments: bool = False, **options: str) -> bytes:
    import av

    buffer = io.BytesIO()
    muxing = {"fflags": "+bitexact"}
    if fragments:
        muxing["movflags"] = "frag_keyframe+empty_moov"
    with av.open(buffer, "w", format=container, options=muxing) as output:
        # Where it looks ahead x264 gives other bytes at times.
        ahead = "threads=1:lookahead-threads=1:sync-lookahead=0:rc-lookahead=0:mbtree=0"
        fixed = {"x264-params": ahead} if codec == "libx264" else {}
        stream = output.add_stream(codec, rate=24, options={"threads": "1", **fixed, **options})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for pixels in _film(64, 96):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def _image(kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_film(90, 130)[0]).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@lru_cache(maxsize=1)
def media_seeds() -> dict[str, bytes]:
    """Return one whole file of each kind, by ``name.extension``."""
    frames = [Image.fromarray(frame) for frame in _film(40, 60)[:3]]
    animated = io.BytesIO()
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "rgb.png": _image("PNG"),
        "palette.png": _image("PNG", "P", transparency=3),
        "turned.jpg": _image("JPEG", exif=exif),
        "cmyk.jpg": _image("JPEG", "CMYK"),
        "progressive.jpg": _image("JPEG", progressive=True),
        "lossy.webp": _image("WEBP"),
        "animated.webp": animated.getvalue(),
        "h264.mp4": _video("libx264", "mp4", crf="30", g="25"),
        "fragments.mp4": _video("libx264", "mp4", fragments=True, crf="30", g="25"),
        "mpeg4.avi": _video("mpeg4", "avi", qscale="8"),
        "h264.mkv": _video("libx264", "matroska", crf="30", g="25"),
        "vp9.webm": _video("libvpx-vp9", "webm", **{"cpu-used": "8", "deadline": "realtime"}),
    }


def make_tar(members: Mapping[str, bytes], kinds: Mapping[str, tuple[bytes, str]] | None = None) -> bytes:
    """Make a tar.

    Args:
        members: Contents by name.
        kinds: Type flag and link target of members that are no plain files, by name.

    Returns:
        Its bytes.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (kinds or {}).get(name, (tarfile.REGTYPE, ""))
            member.size = len(data) if member.type == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(data) if member.size else None)
    return buffer.getvalue()


@lru_cache(maxsize=1)
def tar_seeds() -> dict[str, bytes]:
    """Return whole tars: an honest one, and ones whose names and links reach for the file system."""
    seeds = media_seeds()
    honest = {}
    for number, name in enumerate(("rgb.png", "h264.mp4", "turned.jpg", "lossy.webp")):
        honest[f"{number:03d}.{name.rsplit('.', 1)[1]}"] = seeds[name]
        honest[f"{number:03d}.txt"] = b"a caption"
    names = ["../escape", "/absolute", "a/../../up", "nul\x01l", "x" * 300, "dir/../in", "~root", "C:\\drive"]
    tricks = {f"{name}.{kind}": data for name in names for kind, data in (("png", seeds["rgb.png"]), ("txt", b"t"))}
    links = {"link.png": b"", "hard.png": b"", "device.png": b"", "pipe.png": b"", "link.txt": b"t", "hard.txt": b"t"}
    kinds = {
        "link.png": (tarfile.SYMTYPE, "/etc/hostname"),
        "hard.png": (tarfile.LNKTYPE, "../../escape"),
        "device.png": (tarfile.CHRTYPE, ""),
        "pipe.png": (tarfile.FIFOTYPE, ""),
    }
    return {
        "honest.tar": make_tar(honest),
        "tricks.tar": make_tar({**honest, **tricks}),
        "links.tar": make_tar({**honest, **links}, kinds),
    }


def _flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 4, 32))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _flip_head(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 3, 8))):
        data[rng.randrange(min(len(data), 256))] = rng.randrange(256)
    return data


def _cut(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def _zero(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.choice((8, 100, 2000)))
    data[start : start + length] = bytes(length)
    return data


def _remove(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 16, 500))]
    return data


def _large(data: bytearray, rng: random.Random) -> bytearray:
    """Write an extreme 32-bit number somewhere: sizes, counts and times."""
    value = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000, 20_000))
    start = rng.randrange(max(1, len(data) - 4))
    data[start : start + 4] = value.to_bytes(4, rng.choice(("big", "little")))
    return data


def _splice(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def _swap_header(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    length = rng.choice((4, 16, 64, 512))
    return bytearray(other[:length]) + data[length:]


_ALONE: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "bit flips": _flip,
    "header bytes": _flip_head,
    "cut": _cut,
    "zeroed span": _zero,
    "removed span": _remove,
    "extreme number": _large,
}
_WITH_OTHER: dict[str, Callable[[bytearray, random.Random, bytes], bytearray]] = {
    "splice": _splice,
    "swapped header": _swap_header,
}


def mutate(seeds: Mapping[str, bytes], number: int) -> tuple[str, str, bytes]:
    """Damage a seed; a function of its number alone.

    Args:
        seeds: Whole files by name.
        number: Which damaged file to make.

    Returns:
        Name of the seed, name of the damage, and the bytes.
    """
    rng = random.Random(number)
    names = sorted(seeds)
    name, other = names[number % len(names)], rng.choice(names)
    damages = sorted([*_ALONE, *_WITH_OTHER])
    damage = damages[number // len(names) % len(damages)]
    data = bytearray(seeds[name])
    if damage in _ALONE:
        return name, damage, bytes(_ALONE[damage](data, rng))
    return name, damage, bytes(_WITH_OTHER[damage](data, rng, seeds[other]))
