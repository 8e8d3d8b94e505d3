"""The proof of known frames measures what it says: places found where they are, errors in cells."""

from __future__ import annotations

import pytest
import torch

from ltd.denoisers import Task
from tools.proofs import frames


def test_discs_are_found_where_they_were_drawn() -> None:
    clips, centres = frames.draw_clips(64, 3)
    distance = (frames.find_centres(clips) - centres).norm(dim=-1)
    assert distance.median() < 0.1 and distance.max() < frames.MEDIAN_LIMIT
    assert abs(float(clips.mean())) < 0.4 and abs(float(clips.std()) - 1) < 0.4
    nothing = torch.zeros_like(clips) - 0.4
    assert (frames.find_centres(nothing) == 2 * frames.SIDE).all(), "no disc is far from any"


@pytest.mark.parametrize(
    ("task", "known", "told"), [("first_last", 1, True), ("extension", 2, True), ("image_to_video", 1, False)]
)
def test_errors_are_distances_in_cells(monkeypatch: pytest.MonkeyPatch, task: Task, known: int, told: bool) -> None:
    clips, centres = frames.draw_clips(48, 3)
    monkeypatch.setattr(frames, "complete", lambda model, x0, mask: x0)
    (exact, median, tail, copied), _ = frames.evaluate(None, clips, centres, task, known, told)  # type: ignore[arg-type]
    assert exact is True and median < 0.15 and tail < 0.4
    assert copied > 4 * median
    shifted = torch.roll(clips, 1, dims=-1)  # one column off, where nothing is given
    monkeypatch.setattr(frames, "complete", lambda model, x0, mask: torch.where(mask, x0, shifted))
    (exact, median, *_), _ = frames.evaluate(None, clips, centres, task, known, told)  # type: ignore[arg-type]
    assert exact is True and (not told or 0.8 < median < 1.4)
    monkeypatch.setattr(frames, "complete", lambda model, x0, mask: shifted)
    assert frames.evaluate(None, clips, centres, task, known, told)[0][0] is False  # type: ignore[arg-type]


def test_every_task_that_is_measured_is_trained_and_so_are_free_clips() -> None:
    assert all(getattr(frames.RATES, task) > 0 for task, *_ in frames.CASES.values())
    assert frames.RATES.total < 1, "by chance: samples of which nothing is given"
