"""Samples on a schedule while training: fixed prompts or classes and seeds, whose files are kept and logged by step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ltd.config import ConfigError
from ltd.denoisers import DitConfig
from ltd.inference.conditions import label_prompts
from ltd.inference.generate import Request
from ltd.inference.media import video_to_pixels
from ltd.inference.sample_folder import SampleFolder
from ltd.shapes import VideoShape
from ltd.tracking.tracker import Tracker
from ltd.training.drawing import DrawConfig, Drawer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplesConfig(DrawConfig):
    """Samples of fixed prompts or classes while training."""

    #: Text file, one prompt per line; null for a model without text.
    prompts: str | None = None
    #: Classes, numbers or names: one for each prompt, or one for all; without prompts a list of its own.
    labels: tuple[int | str, ...] = ()
    #: Frames, height and width in pixels; empty takes the training views. Needed with buckets and packs.
    shapes: tuple[tuple[int, int, int], ...] = ()
    #: Frames per second of the videos that are written.
    fps: float = 24.0
    #: Samples of each prompt and shape.
    per_prompt: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_prompt < 1:
            raise ConfigError(f"per_prompt: got {self.per_prompt}, needed 1 or more")
        if not self.fps > 0:
            raise ConfigError(f"fps: got {self.fps}, needed above 0")
        for shape in self.shapes:
            if min(shape) < 1:
                raise ConfigError(f"shapes: got {shape}, needed frames, height and width of 1 or more")


class Sampling:
    """Make the samples of a step and log them; an evaluator of the loop.

    Args:
        drawer: Makes them.
        requests: What is made.
        tracker: Told of the files, which go to ``samples/step-*`` of its run directory.
    """

    def __init__(self, drawer: Drawer, requests: Sequence[Request], tracker: Callable[[], Tracker]) -> None:
        self.drawer, self.requests, self.tracker = drawer, list(requests), tracker
        self.layout = drawer.layout

    @property
    def every(self) -> int:
        """Steps between samplings."""
        return self.drawer.config.every

    def run(self, step: int) -> dict[str, float]:
        """Sample; called by all processes after a step.

        Args:
            step: Steps done.

        Returns:
            Metrics: none of its own.
        """
        out = self.tracker().run_dir / "samples" / f"step-{step:08d}"
        folder = SampleFolder(out, self.requests, {"step": step, **self._made_with()})
        if self.layout.is_main:
            folder.begin({"step": str(step), "prompts": "\n".join(r.title for r in self.requests)})
        self.layout.barrier()

        def write(numbers: list[int], video: Tensor) -> None:
            for number, frames in zip(numbers, video_to_pixels(video).cpu().numpy(), strict=True):
                folder.write(number, frames)

        self.drawer.draw(self.requests, write)
        self.layout.barrier()
        if self.layout.is_main:
            failed = folder.finish({})
            for number, why in failed.items():
                logger.warning("step %d: sample %d is missing: %s", step, number, why)
            files = [
                (folder.out / folder.name(number), request.title)
                for number, request in enumerate(self.requests)
                if number not in failed
            ]
            self.tracker().log_media(step, "eval/samples", files)
            if files:
                self.tracker().log_media(step, "eval/samples_grid", [(folder.grid, "grid")])
        return {}

    def _made_with(self) -> dict[str, Any]:
        """Say in the columns of ``sample.py`` how these samples are made."""
        config = self.drawer.config
        weights = config.weights(self.drawer.ema.config)
        chosen = {name: getattr(config, name) for name in ("seed", "steps", "solver", "guidance", "negative")}
        return {**chosen, "weights": weights}


def read_requests(
    config: SamplesConfig,
    views: Sequence[tuple[VideoShape, float | None]],
    model: DitConfig,
    classes: Sequence[str] = (),
) -> list[Request]:
    """List what a run samples.

    Args:
        config: Prompts, shapes and numbers.
        views: Training views (size, frames per second) for where no shapes are given.
        model: Says whether it takes text and classes.
        classes: Names of the classes by number.

    Returns:
        Requests, shapes outermost.

    Raises:
        ConfigError: If the file of prompts is missing or empty, or there is no shape.
    """
    prompts = [""] * max(1, len(config.labels))
    if config.prompts is not None:
        path = Path(config.prompts)
        if not path.is_file():
            raise ConfigError(f"samples.prompts: {path} does not exist")
        try:
            prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"samples.prompts: {path} is no text that can be read ({error})") from None
        if not prompts:
            raise ConfigError(f"samples.prompts: {path} holds no prompt; needed one per line")
    if model.text_dim is not None and config.prompts is None:
        raise ConfigError("samples.prompts: got null for a model with text; needed a file with one prompt per line")
    if model.num_classes is not None and model.text_dim is None and not config.labels:
        raise ConfigError("samples.labels: got none for a model with classes; needed numbers or names of classes")
    told = label_prompts(prompts, config.labels, model.num_classes, classes, "samples.labels")
    shapes = [(VideoShape(*shape), config.fps) for shape in config.shapes]
    shapes = shapes or [(shape, fps or config.fps) for shape, fps in views]
    if not shapes:
        raise ConfigError("samples.shapes: got none, and the run has no views; needed [[frames, height, width], ...]")
    return [
        Request(prompt=prompt, repetition=k, shape=shape, fps=fps, label=label, class_name=name)
        for shape, fps in shapes
        for prompt, (label, name) in zip(prompts, told, strict=True)
        for k in range(config.per_prompt)
    ]
