"""Tasks of known frames as masks over latent cells: what is given, in training as in sampling."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.denoisers.conditioning import Frames
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
    fewest = 2 if task == "interpolation" else 1
    if frames < least or known < fewest:
        raise ValueError(
            f"task {task}: got {frames} frames of latents (in patches) and known = {known}, needed at least {least} "
            f"frames and known of {fewest} or more"
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
    masks: list[Tensor] = []
    tasks: list[Task] = []
    for numbers in random.uniform((6,), "frames").tolist():
        task = _chosen(config, numbers[0])
        mask = _drawn_mask(task, cells, patch, numbers)
        masks.append(torch.zeros(cells, dtype=torch.bool) if mask is None else mask)
        tasks.append("unconditional" if mask is None else task)
    return torch.stack(masks).unsqueeze(1), tasks


def draw_masks(
    task: Task, cells: tuple[int, int, int], patch: tuple[int, int, int], random: DrawRandom
) -> Tensor | None:
    """Draw what one task leaves open of each sample, as ``draw_tasks`` does when the task falls to it.

    Args:
        task: Of all samples.
        cells: Latent cells (t, h, w) of every sample.
        patch: Latent cells per token.
        random: Random numbers of the ``b`` samples; stream ``"frames"``.

    Returns:
        Bool ``(b, 1, t, h, w)``, True = given; None where samples of this size are too short for the task.
    """
    masks = [_drawn_mask(task, cells, patch, numbers) for numbers in random.uniform((6,), "frames").tolist()]
    found = [mask for mask in masks if mask is not None]
    return torch.stack(found).unsqueeze(1) if len(found) == len(masks) else None


def told(frames: Frames, mode: str, mask_channels: int) -> Frames:
    """Give known latents the form that a denoiser takes.

    Args:
        frames: Latents ``(b, c, t, h, w)``, known or not; bool mask ``(b, 1, t, h, w)``.
        mode: ``DitConfig.frames``.
        mask_channels: ``DitConfig.frame_mask_channels``; all say the same of a latent frame.

    Returns:
        The same for ``times``; for ``channels`` zeros where nothing is known, so that what is behind the mask is not
        seen, and the mask in its channels.
    """
    if mode != "channels":
        return frames
    return Frames(torch.where(frames.mask, frames.latents, 0), frames.mask.expand(-1, mask_channels, -1, -1, -1))


def _drawn_mask(
    task: Task, cells: tuple[int, int, int], patch: tuple[int, int, int], numbers: list[float]
) -> Tensor | None:
    """Make a task's mask ``(t, h, w)`` from numbers in [0, 1), the second to the sixth; None if cells are too few."""
    frames, height, width = token_grid(VideoShape(*cells), patch)
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
        return task_mask(task, cells, patch, known=known, box=box)
    except ValueError:
        return None


def _chosen(config: FrameTasksConfig, number: float) -> Task:
    names = TASKS[1:]
    ends = accumulate(getattr(config, name) for name in names)
    return next((name for name, end in zip(names, ends, strict=True) if number < end), "unconditional")
