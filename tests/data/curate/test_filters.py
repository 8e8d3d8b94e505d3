from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data.curate.filters import FilterOptions, probe_file, refusal
from ltd.data.decode import MediaInfo
from ltd.data.index import open_index
from ltd.data.manifest import Row
from ltd.data.shards import ShardOptions, make_shards, summary
from ltd.data.write import encode_image, encode_video

CLIP = MediaInfo("video", 160, 80, 50, 25.0)


@pytest.mark.parametrize(
    ("name", "kept", "refused"),
    [
        ("min_side", 80, 81),
        ("max_side", 80, 79),
        ("min_aspect", 2.0, 2.01),
        ("max_aspect", 2.0, 1.99),
        ("min_frames", 30, 31),
        ("max_frames", 30, 29),
        ("min_duration_s", 1.2, 1.21),
        ("max_duration_s", 1.2, 1.19),
    ],
)
def test_every_limit_keeps_its_own_value_and_nothing_beyond(name: str, kept: float, refused: float) -> None:
    row = Row(number=0, path="a.mp4", start=0.8)  # frames 20 to 50
    assert refusal(row, CLIP, FilterOptions(**{name: kept})) is None  # type: ignore[arg-type]
    found = refusal(row, CLIP, FilterOptions(**{name: refused}))  # type: ignore[arg-type]
    assert found is not None and found[0] == name and f"needed {refused}" in found[1]
    still = MediaInfo("image", 160, 80, 1, 0.0)
    alike = refusal(Row(number=0, path="a.png"), still, FilterOptions(**{name: refused}))  # type: ignore[arg-type]
    assert (alike is None) == (name.endswith("frames") or name.endswith("_s"))  # stills have no length


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_side": 0}, "min_side: got 0, needed more than 0"),
        ({"max_duration_s": float("nan")}, "max_duration_s: got nan, needed more than 0"),
        ({"min_side": 9, "max_side": 8}, "max_side: got 8, needed min_side = 9 or more"),
        ({"dedupe_bits": -1}, "dedupe_bits: got -1, needed 0 or more"),
        ({"dedupe_bits": 17}, "dedupe_bits: got 17, needed 0 to 16"),
    ],
)
def test_wrong_limits_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FilterOptions(**options)


def test_each_filter_is_counted_apart_from_what_fails(write_film: Callable[..., Path], tmp_path: Path) -> None:
    media = write_film("long.mp4", (30,)).parent
    write_film("short.mp4", (6,))
    noise = np.random.default_rng(0).integers(0, 255, (90, 300, 3), dtype=np.uint8)
    (media / "wide.png").write_bytes(encode_image(noise))
    (media / "small.png").write_bytes(encode_image(noise[:20, :20]))
    (media / "good.png").write_bytes(encode_image(noise[:, :120]))
    (media / "zero.mp4").touch()
    options = FilterOptions(min_side=64, max_aspect=2.0, min_frames=10)
    report = make_shards(media, tmp_path / "out", options=ShardOptions(filters=options))
    assert report["filters"] == {"min_frames": 1, "min_side": 1, "max_aspect": 1}
    assert report["causes"] == {"empty": 1}
    assert report["filtered"][0] == {
        "path": "short.mp4",
        "number": 2,
        "filter": "min_frames",
        "message": "6 frames, needed 10 or more",
    }
    assert [e.key[9:] for e in open_index(str(tmp_path / "out" / "train")).entries] == ["good", "long"]
    assert summary(report).endswith("left out: 1 empty; filtered: 1 min_frames, 1 min_side, 1 max_aspect")
    assert json.loads((tmp_path / "out" / "make_shards.json").read_text()) == report
    with pytest.raises(ConfigError, match="none of the 6 samples is left: 1 empty, 5 min_side"):
        make_shards(media, tmp_path / "none", options=ShardOptions(filters=FilterOptions(min_side=1000)))


def test_limits_that_all_keep_change_no_byte(write_film: Callable[..., Path], tmp_path: Path) -> None:
    media = write_film("a.mp4", (12,)).parent
    for name, options in (("plain", FilterOptions()), ("loose", FilterOptions(min_side=1, dedupe_bits=0))):
        make_shards(media, tmp_path / name, options=ShardOptions(filters=options))
    tars = [(tmp_path / name / "train" / "000000.tar").read_bytes() for name in ("plain", "loose")]
    assert tars[0] == tars[1]


def test_a_turned_video_is_probed_as_it_is_shown(tmp_path: Path) -> None:
    data = bytearray(encode_video(np.zeros((3, 32, 64, 3), dtype=np.uint8), 24.0))
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = b"".join(
        value.to_bytes(4, "big", signed=True) for value in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    )
    (tmp_path / "a.mp4").write_bytes(data)
    info = probe_file(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames) == (32, 64, 3)
