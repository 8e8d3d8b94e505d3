"""Samples on a schedule while training: fixed prompts and seeds from averaged weights, shared out over the processes.

Training goes on bit for bit as if nothing had been sampled: the weights come back exactly, and every random number
belongs to a sample.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ltd import autoencoders
from ltd.config import ConfigError
from ltd.denoisers import Dit, DitConfig, Parametrized
from ltd.diffusion import GuidanceConfig, ParametrizationConfig, SamplerConfig, ShiftConfig
from ltd.encoders.text import TextEncoder
from ltd.inference.conditions import label_prompts
from ltd.inference.generate import Generator, Request, batches
from ltd.inference.media import video_to_pixels
from ltd.inference.sample_folder import SampleFolder
from ltd.parallel.ema import Ema, group_of
from ltd.parallel.layout import Layout
from ltd.shapes import VideoShape
from ltd.tracking.tracker import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Samples of fixed prompts or classes while training."""

    #: Text file, one prompt per line; null for a model without text.
    prompts: str | None = None
    #: Classes, numbers or names: one for each prompt, or one for all; without prompts a list of its own.
    labels: tuple[int | str, ...] = ()
    #: Steps between samplings, and at the last step; 0 is never.
    every: int = 1000
    #: Frames, height and width in pixels; empty takes the training views. Needed with buckets and packs.
    shapes: tuple[tuple[int, int, int], ...] = ()
    #: Frames per second of the videos that are written.
    fps: float = 24.0
    #: Samples of each prompt and shape.
    per_prompt: int = 1
    #: Seed of the noise: the same at every step.
    seed: int = 0
    #: Solver.
    solver: Literal["euler", "heun", "dpmpp_2m", "unipc"] = "euler"
    #: Solver steps; the shift of their times is the objective's.
    steps: int = 20
    #: Scale of classifier-free guidance; 1 is off.
    guidance: float = 4.0
    #: Prompt to lead away from.
    negative: str = ""
    #: Decay of the average to sample from; null is the first of ``ema.decays``, 0 the raw weights.
    decay: float | None = None
    #: Most samples made at once on a process.
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name in ("every", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 0 or more")
        for name in ("per_prompt", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 1 or more")
        if not self.fps > 0:
            raise ConfigError(f"fps: got {self.fps}, needed above 0")
        for shape in self.shapes:
            if min(shape) < 1:
                raise ConfigError(f"shapes: got {shape}, needed frames, height and width of 1 or more")


class RememberedText:
    """Embeddings of a few prompts, made once, in the place of the encoder that made them.

    Args:
        encoder: Makes them.
        prompts: All that will be asked for.
    """

    def __init__(self, encoder: TextEncoder, prompts: Sequence[str]) -> None:
        self.name, self.hash, self.dim = encoder.name, encoder.hash, encoder.dim
        self.max_length, self.num_truncated = encoder.max_length, encoder.num_truncated
        self._rows = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        self._text, self._mask = encoder.encode(list(self._rows))

    def to(self, device: torch.device | str) -> RememberedText:
        """Stay where it is: a table look-up is all there is."""
        del device
        return self

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Look up embeddings ``(b, n, d)`` and their mask ``(b, n)``."""
        rows = [self._rows[caption] for caption in captions]
        return self._text[rows], self._mask[rows]


class Sampling:
    """Make the samples of a step and log them; an evaluator of the loop.

    Args:
        config: What, when and how.
        model: The module that is trained, with its hooks and seams, which all processes call equally often; what it
            predicts; its averages.
        text: Requests, and embeddings of their prompts and of the negative one.
        decoder: Loads the autoencoder; it is kept only while a step is sampled.
        shift: Shift of the solver's times.
        layout: This process's position.
        tracker: Told of the files, which go to ``samples/step-*`` of its run directory.
    """

    def __init__(
        self,
        config: SamplesConfig,
        model: tuple[Dit, ParametrizationConfig, Ema],
        text: tuple[Sequence[Request], RememberedText | None],
        decoder: Callable[[], autoencoders.Autoencoder],
        shift: ShiftConfig,
        layout: Layout,
        tracker: Callable[[], Tracker],
    ) -> None:
        self.config, self.decoder = config, decoder
        self.requests, self.text = list(text[0]), text[1]
        self.network, self.parametrization, self.ema = model
        self.layout, self.tracker = layout, tracker
        self.sampler = SamplerConfig(
            kind=config.solver, steps=config.steps, shift=shift, guidance=GuidanceConfig(scale=config.guidance)
        )

    @property
    def every(self) -> int:
        """Steps between samplings."""
        return self.config.every

    @torch.no_grad()
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
        denoiser = self.network
        if self.parametrization != ParametrizationConfig():
            denoiser = Parametrized(self.network, self.parametrization)  # type: ignore[assignment]
        training = self.network.training
        self.network.eval()
        try:
            decoder = self.decoder()
            generator = Generator(denoiser, decoder, self.text, sampler=self.sampler, negative=self.config.negative)
            if self.config.decay == 0:
                self._make(generator, folder)
            else:
                with self.ema.applied(self.config.decay):
                    self._make(generator, folder)
        finally:
            self.network.train(training)
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
        decay = self.ema.config.decays[0] if self.config.decay is None else self.config.decay
        weights = group_of(decay) if decay else "raw"
        chosen = {name: getattr(self.config, name) for name in ("seed", "steps", "solver", "guidance", "negative")}
        return {**chosen, "weights": weights}

    def _make(self, generator: Generator, folder: SampleFolder) -> None:
        """Make this process's batches; under ZeRO-3 all must call the network equally often, so some repeat one."""
        numbered = iter(range(len(self.requests)))
        all_batches = [[(next(numbered), r) for r in batch] for batch in batches(self.requests, self.config.batch_size)]
        groups = self.layout.world_size // self.layout.sequence
        own = self.layout.global_rank // self.layout.sequence
        for first in range(0, len(all_batches), groups):
            index = first + own
            batch = all_batches[min(index, len(all_batches) - 1)]
            requests = [request for _, request in batch]
            conditions = generator.condition(requests)
            latents = generator.draw_latents(requests, conditions, seed=self.config.seed)
            if index >= len(all_batches) or self.layout.sequence_rank != 0:
                continue
            pixels = video_to_pixels(generator.decode(latents)).cpu().numpy()
            for (number, _), frames in zip(batch, pixels, strict=True):
                folder.write(number, frames)


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
        prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
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
