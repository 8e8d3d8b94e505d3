"""Masks of the frame tasks against tables drawn by hand, and how they are drawn and learned from."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from ltd import config
from ltd.config import ConfigError
from ltd.denoisers import TASKS, FrameTasksConfig, draw_tasks, task_mask
from ltd.diffusion import FlowMatching, FlowMatchingConfig
from ltd.nn.patch import patchify
from ltd.rng import DrawRandom
from ltd.training.denoiser import DenoiserRun
from tests.parallel.family_check import conditions, inputs, member

DEBUG = Path(__file__).resolve().parents[2] / "configs" / "debug" / "denoiser.yaml"
EQUAL = FrameTasksConfig(**dict.fromkeys(TASKS[1:], 1 / 7))


@pytest.mark.parametrize(
    ("task", "options", "given"),
    [
        ("unconditional", {}, "......"),
        ("image_to_video", {}, "#....."),
        ("first_last", {}, "#....#"),
        ("interpolation", {"known": 2}, "#.#.#."),
        ("interpolation", {"known": 3}, "#..#.."),
        ("extension", {"known": 4}, "####.."),
        ("retrodiction", {"known": 1}, ".....#"),
        ("retrodiction", {"known": 5}, ".#####"),
    ],
)
def test_frames_that_are_given(task, options, given) -> None:  # type: ignore[no-untyped-def]
    mask = task_mask(task, (6, 2, 4), (1, 2, 2), **options)
    expected = torch.tensor([mark == "#" for mark in given])[:, None, None].expand(6, 2, 4)
    assert torch.equal(mask, expected)


def test_a_patch_over_frames_is_given_whole() -> None:
    mask = task_mask("extension", (6, 2, 2), (2, 1, 1), known=2)
    assert mask[:, 0, 0].tolist() == [True] * 4 + [False] * 2


def test_the_hole_of_inpainting_runs_through_all_frames() -> None:
    mask = task_mask("inpainting", (2, 4, 8), (1, 1, 2), box=(1, 0, 2, 3))
    rows = ["########", "......##", "......##", "########"]
    expected = torch.tensor([[mark == "#" for mark in row] for row in rows])
    assert torch.equal(mask, expected.expand(2, 4, 8))
    middle = task_mask("inpainting", (1, 4, 4), (1, 1, 1))
    assert (~middle[0]).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("extension", {"known": 6}, "needed at least 7 frames"),
        ("retrodiction", {"known": 0}, "known of 1 or more"),
        ("inpainting", {"box": (0, 0, 5, 1)}, "lies outside 4x4"),
    ],
)
def test_masks_that_cannot_be_are_refused(task, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        task_mask(task, (6, 4, 4), (1, 1, 1), **options)


def test_tasks_are_drawn_at_their_rates_and_belong_to_the_sample() -> None:
    rates = FrameTasksConfig(image_to_video=0.3, inpainting=0.2, extension=0.1)
    masks, tasks = draw_tasks(rates, (5, 4, 4), (1, 2, 2), DrawRandom(0, range(4000)))
    counts = Counter(tasks)
    for name, share in (("image_to_video", 0.3), ("inpainting", 0.2), ("extension", 0.1), ("unconditional", 0.4)):
        assert abs(counts[name] / 4000 - share) < 0.03
    assert masks.shape == (4000, 1, 5, 4, 4) and not masks.flatten(1).all(1).any()
    some = draw_tasks(rates, (5, 4, 4), (1, 2, 2), DrawRandom(0, [7, 3000, 12]))
    assert some[1] == [tasks[7], tasks[3000], tasks[12]]
    assert torch.equal(some[0], masks[[7, 3000, 12]])
    tokens = patchify(masks.float(), (1, 2, 2))
    assert (tokens == tokens[..., :1]).all()  # whole patches
    known = {int(mask[0, :, 0, 0].sum()) for mask, task in zip(masks, tasks, strict=True) if task == "extension"}
    assert known == {1, 2, 3, 4}


def test_an_image_has_a_hole_or_nothing_given() -> None:
    _, tasks = draw_tasks(EQUAL, (1, 4, 4), (1, 1, 1), DrawRandom(0, range(300)))
    assert set(tasks) == {"unconditional", "inpainting"}


@pytest.mark.parametrize("name", ["frames in place", "frames beside"])
def test_targets_of_known_cells_change_no_loss(name: str) -> None:
    model, objective = member(name), FlowMatching(FlowMatchingConfig())
    random = DrawRandom(3, [1, 2])
    x0, _, _ = inputs(name, False, torch.float64)
    cond = conditions(name, 2, (3, 2, 6), torch.float64)
    assert cond.frames is not None
    known = cond.frames.mask[:, :1].expand_as(x0)

    def loss(truth: torch.Tensor) -> torch.Tensor:
        def denoiser(x_t, t, c):  # type: ignore[no-untyped-def]
            return model(x_t, t, c) + (truth - x0)  # a change of the target is one of the prediction, negated

        return objective.loss(denoiser, x0, cond, random, cell_weight=~known[:, 0])[0]

    expected = loss(x0)
    assert torch.equal(loss(torch.where(known, x0 + 7, x0)), expected)
    assert (loss(torch.where(known, x0, x0 + 7)) - expected).abs().min() > 0.1
    gone = dataclasses.replace(cond, frames=None)
    assert not torch.allclose(objective.loss(model, x0, gone, random, cell_weight=~known[:, 0])[0], expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["frame_tasks.extension=1.5"], r"frame_tasks.extension: got 1.5"),
        (["frame_tasks.extension=0.7", "frame_tasks.inpainting=0.7"], "the shares add up to 1.4"),
        (["frame_tasks.extension=0.5"], "frame_tasks: needs model.frames"),
        (
            ["frame_tasks.extension=0.5", "model.frames=times", "objective.prediction.kind=edm"],
            "objective.prediction.kind: got edm",
        ),
    ],
)
def test_bad_settings_name_the_field(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(DenoiserRun, DEBUG, overrides)
