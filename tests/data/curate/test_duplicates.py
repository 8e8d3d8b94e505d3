from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ltd.data.curate.duplicates import NearDuplicates, media_hashes, picture_hash
from ltd.data.curate.filters import FilterOptions
from ltd.data.index import open_index
from ltd.data.shards import ShardOptions, make_shards
from ltd.data.write import encode_image, encode_video


def photos() -> list[np.ndarray]:
    data = pytest.importorskip("skimage.data")
    return [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]


def jpeg(picture: np.ndarray, quality: int, width: int) -> np.ndarray:
    image = Image.fromarray(picture)
    image = image.resize((width, round(image.height * width / image.width)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def test_copies_are_near_and_other_pictures_far() -> None:
    pictures = photos()
    hashes = [picture_hash(picture) for picture in pictures]
    for picture, expected in zip(pictures, hashes, strict=True):
        for altered in (jpeg(picture, 40, 180), np.clip(picture.astype(int) * 0.8 + 20, 0, 255).astype(np.uint8)):
            assert (picture_hash(altered) ^ expected).bit_count() <= 4
        assert (picture_hash(picture[:, ::-1]) ^ expected).bit_count() > 16  # a mirror image is another picture
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 16


def test_the_hash_is_the_one_defined() -> None:
    """Against the transform written out as sums, on a picture that needs no scaling."""
    grey = np.random.default_rng(1).integers(0, 255, (32, 32), dtype=np.uint8)
    n = np.arange(32)
    low = [
        (np.outer(np.cos(np.pi * (n + 0.5) * i / 32), np.cos(np.pi * (n + 0.5) * j / 32)) * grey).sum()
        for i in range(8)
        for j in range(8)
    ]
    bits = [False] + [value > np.median(low[1:]) for value in low[1:]]
    assert picture_hash(np.repeat(grey[..., None], 3, 2)) == int("".join("01"[int(bit)] for bit in bits), 2)
    assert picture_hash(np.full((50, 40, 3), 77, dtype=np.uint8)) == 0


def test_a_clip_is_hashed_in_the_middle_of_its_thirds(write_film: Callable[..., Path]) -> None:
    frames = np.stack([np.roll(photos()[0][:64, :64], 3 * shift, axis=1) for shift in range(12)])
    got = media_hashes(encode_video(frames, 24.0, crf=2), "mp4", frames=12)
    for found, place in zip(got, (2, 6, 10), strict=True):
        distances = [(found ^ picture_hash(frame)).bit_count() for frame in frames]
        assert int(np.argmin(distances)) == place
    one = media_hashes(encode_video(frames[:1], 24.0), "mp4", frames=1)
    assert len(one) == 3 and len(set(one)) == 1


@pytest.mark.parametrize("bits", [0, 3, 4, 7, 10])
def test_the_lookup_finds_what_comparing_all_pairs_finds(bits: int) -> None:
    rng = random.Random(bits)
    hashes: list[tuple[int, ...]] = []
    for _ in range(400):
        count = rng.choice((1, 3))
        base = rng.choice(hashes) if hashes and rng.random() < 0.6 else ()
        values = list(base) if len(base) == count else [rng.getrandbits(64) for _ in range(count)]
        for place in range(count):
            for bit in rng.sample(range(64), rng.randint(0, bits + 2)):
                values[place] ^= 1 << bit
        hashes.append(tuple(values))
    finder, kept, matches = NearDuplicates(bits), dict[int, tuple[int, ...]](), 0
    for number, values_ in enumerate(hashes):
        near = (
            other
            for other, theirs in kept.items()
            if len(theirs) == len(values_)
            and all((a ^ b).bit_count() <= bits for a, b in zip(theirs, values_, strict=True))
        )
        expected = next(near, None)
        assert finder.find_or_add(number, values_) == expected
        if expected is None:
            kept[number] = values_
        matches += expected is not None
    assert matches > 10


def test_the_earliest_match_counts_whatever_band_finds_it() -> None:
    finder = NearDuplicates(4)
    assert finder.find_or_add("first", [0xF]) is None  # apart in band 0
    assert finder.find_or_add("second", [0xF0000]) is None  # apart in band 1
    assert finder.find_or_add("between", [0]) == "first"
    assert finder.find_or_add("clip", [0, 0, 0]) is None  # three hashes are never one


def test_the_first_of_near_duplicates_stays(write_film: Callable[..., Path], tmp_path: Path) -> None:
    media = write_film("m.mp4", (12,)).parent
    write_film("n.mp4", (12,), first=1)
    (media / "z").mkdir()
    (media / "z" / "again.mp4").write_bytes((media / "m.mp4").read_bytes())
    first, other = photos()[:2]
    (media / "a.png").write_bytes(encode_image(first[::2, ::2]))
    (media / "b.jpg").write_bytes(encode_image(first, "jpg", quality=60))
    (media / "c.png").write_bytes(encode_image(other[::2, ::2]))
    report = make_shards(media, tmp_path / "out", options=ShardOptions(filters=FilterOptions(dedupe_bits=6)))
    assert report["filters"] == {"dedupe_bits": 2}
    assert [(item["path"], item["message"]) for item in report["filtered"]] == [
        ("b.jpg", "looks like 00000000_a"),
        ("z/again.mp4", "looks like 00000003_m"),
    ]
    assert [e.key[9:] for e in open_index(str(tmp_path / "out" / "train")).entries] == ["a", "c", "m", "n"]
