from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tools.quickstart_media import FILM, MANIFEST, stills_of

FPS = 24
FILM_FRAMES = 14_315
SHORTEST_CLIP = 17  # frames: what the quickstart trains on


def frame(seconds: float) -> int:
    number = round(seconds * FPS)
    assert abs(number / FPS - seconds) < 1e-6, f"{seconds} s is between frames"
    return number


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in MANIFEST.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def clips(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["path"] == FILM]


@pytest.fixture(scope="module")
def stills(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["path"] != FILM]


def test_rows_have_exactly_the_documented_fields(clips: list[dict], stills: list[dict]) -> None:
    assert {tuple(row) for row in clips} == {("path", "caption", "start", "end", "split")}
    assert {tuple(row) for row in stills} == {("path", "caption", "split")}
    assert {row["split"] for row in clips + stills} == {"train", "heldout"}


def test_clips_lie_in_the_film_in_order_and_never_overlap(clips: list[dict]) -> None:
    previous_end = 0
    for row in clips:
        start, end = frame(row["start"]), frame(row["end"])
        assert previous_end <= start
        assert end - start >= SHORTEST_CLIP
        previous_end = end
    assert previous_end <= FILM_FRAMES


def test_captions_are_one_per_shot_and_of_moderate_length(clips: list[dict], stills: list[dict]) -> None:
    captions = [row["caption"].lower() for row in clips]
    assert len(set(captions)) == len(captions)
    assert all(8 <= len(caption.split()) <= 25 for caption in captions)
    per_shot = Counter(row["caption"] for row in stills)
    assert all(per_shot[row["caption"]] == 4 for row in clips), "every clip has four stills"
    only_stills = per_shot.keys() - {row["caption"] for row in clips}
    assert all(per_shot[caption] == 2 for caption in only_stills)


def test_a_still_carries_the_caption_and_split_of_the_shot_it_is_in(clips: list[dict], stills: list[dict]) -> None:
    numbers = stills_of(MANIFEST)
    assert len(numbers) == len(stills)
    assert numbers[-1] < FILM_FRAMES
    shots = {row["caption"]: (frame(row["start"]), frame(row["end"]), row["split"]) for row in clips}
    owner = {n: caption for caption, (start, end, _) in shots.items() for n in range(start, end)}
    for row in stills:
        number = int(Path(row["path"]).stem)
        if row["caption"] in shots:
            start, end, split = shots[row["caption"]]
            assert start <= number < end
            assert row["split"] == split
        else:
            assert number not in owner
            assert row["split"] == "train"


def test_held_out_shots_are_whole_apart_and_spread_over_the_film(clips: list[dict]) -> None:
    heldout = {n for row in clips if row["split"] == "heldout" for n in range(frame(row["start"]), frame(row["end"]))}
    train = {n for row in clips if row["split"] == "train" for n in range(frame(row["start"]), frame(row["end"]))}
    assert not heldout & train
    assert sum(row["split"] == "heldout" for row in clips) == 12
    per_quarter = Counter(frame(row["start"]) * 4 // 11_728 for row in clips if row["split"] == "heldout")  # credits
    assert min(per_quarter[quarter] for quarter in range(4)) >= 2


def test_prompts_are_16_training_captions(clips: list[dict]) -> None:
    prompts = (MANIFEST.parent / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(prompts)) == len(prompts) == 16
    assert set(prompts) <= {row["caption"] for row in clips if row["split"] == "train"}
