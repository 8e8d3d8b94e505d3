"""Tasks of known frames as masks over latent cells: what is given, in training as in sampling."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.nn.patch import token_grid
from ltd.rng import DrawRandom
from ltd.shapes import VideoShape

Task: TypeAlias = Literal[
    "unconditional", "image_to_video", "first_last", "interpolation", "extension", "retrodiction", "inpainting"
]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True, kw_only=True)
class FrameTasksConfig:
    """Share of the training samples that each task is drawn for; the rest has nothing given."""

    #: The first latent frame is given.
    image_to_video: float = 0.0
    #: The first and the last.
    first_last: float = 0.0
    #: Every so-many-th (2 to 4, drawn), from the first on.
    interpolation: float = 0.0
    #: The first n, n drawn from 1 to all but one.
    extension: float = 0.0
    #: The last n.
    retrodiction: float = 0.0
    #: Everything but a box through all frames, each side between a quarter and three quarters of the frame's, drawn.
    inpainting: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise ConfigError(f"frame_tasks.{field.name}: got {getattr(self, field.name)}, needed within [0, 1]")
        if self.total > 1 + 1e-9:
            raise ConfigError(f"frame_tasks: the shares add up to {self.total:g}, needed at most 1")

    @property
    def total(self) -> float:
        """Share of the samples that something is given of."""
        return sum(getattr(self, field.name) for field in fields(self))


def task_mask(
    task: Task,
    cells: tuple[int, int, int],
    patch: tuple[int, int, int],
    *,
    known: int = 1,
    box: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Say which latent cells a task gives; whole patches only.

    Args:
        task: What is given.
        cells: Latent cells (t, h, w).
        patch: Latent cells per token.
        known: Frames (in patches) that extension and retrodiction give; of interpolation, every how many one is given.
        box: Hole of inpainting (top, left, height, width) in patches; the middle half by default.

    Returns:
        Bool ``(t, h, w)``, True = given.

    Raises:
        ValueError: If the clip is too short for the task, or the box lies outside.
    """
    frames, height, width = token_grid(VideoShape(*cells), patch)
    given = torch.zeros(frames, height, width, dtype=torch.bool)
    least = {"image_to_video": 2, "first_last": 3, "interpolation": 2}.get(task, 1)
    least = known + 1 if task in ("extension", "retrodiction") else least
    if frames < least or known < 1:
        raise ValueError(
            f"task {task}: got {frames} frames of latents (in patches) and known = {known}, needed at least {least} "
            "frames and known of 1 or more"
        )
    match task:
        case "image_to_video":
            given[0] = True
        case "first_last":
            given[0] = given[-1] = True
        case "interpolation":
            given[::known] = True
        case "extension":
            given[:known] = True
        case "retrodiction":
            given[-known:] = True
        case "inpainting":
            top, left, rows, columns = box or (height // 4, width // 4, max(1, height // 2), max(1, width // 2))
            if min(top, left) < 0 or min(rows, columns) < 1 or top + rows > height or left + columns > width:
                raise ValueError(f"task inpainting: box {(top, left, rows, columns)} lies outside {height}x{width}")
            given[:] = True
            given[:, top : top + rows, left : left + columns] = False
    return repeat_cells(given, patch)


def repeat_cells(tokens: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Spread what is held per token ``(..., t, h, w)`` over the cells of its patch."""
    for axis, size in zip((-3, -2, -1), patch, strict=True):
        tokens = tokens.repeat_interleave(size, dim=axis)
    return tokens


def draw_tasks(
    config: FrameTasksConfig, cells: tuple[int, int, int], patch: tuple[int, int, int], random: DrawRandom
) -> tuple[Tensor, list[Task]]:
    """Draw a task for each sample, and what it leaves open.

    Args:
        config: Shares.
        cells: Latent cells (t, h, w) of every sample.
        patch: Latent cells per token.
        random: Random numbers of the ``b`` samples; stream ``"frames"``.

    Returns:
        Bool ``(b, 1, t, h, w)``, True = given; the tasks. A clip that is too short for its task has nothing given.
    """
    frames, height, width = token_grid(VideoShape(*cells), patch)
    masks, tasks = [], []
    for numbers in random.uniform((6,), "frames").tolist():
        task = _chosen(config, numbers[0])
        known, box = 1, None
        if task in ("extension", "retrodiction"):
            known = 1 + int(numbers[1] * (frames - 1)) if frames > 1 else frames
        elif task == "interpolation":
            known = 2 + int(numbers[1] * 3)
        elif task == "inpainting":
            rows = max(1, round((0.25 + 0.5 * numbers[2]) * height))
            columns = max(1, round((0.25 + 0.5 * numbers[3]) * width))
            box = (int(numbers[4] * (height - rows + 1)), int(numbers[5] * (width - columns + 1)), rows, columns)
        try:
            mask = task_mask(task, cells, patch, known=known, box=box)
        except ValueError:
            task, mask = "unconditional", torch.zeros(cells, dtype=torch.bool)
        masks.append(mask)
        tasks.append(task)
    return torch.stack(masks).unsqueeze(1), tasks


def _chosen(config: FrameTasksConfig, number: float) -> Task:
    names = TASKS[1:]
    ends = accumulate(getattr(config, name) for name in names)
    return next((name for name, end in zip(names, ends, strict=True) if number < end), "unconditional")
