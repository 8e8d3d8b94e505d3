"""Samples out of a run under way: from its averaged weights, batches shared out over the processes.

Training goes on bit for bit as if nothing had been sampled: the weights come back exactly, and every random number
belongs to a sample. Knows neither files nor metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ltd import autoencoders
from ltd.config import ConfigError
from ltd.denoisers import Dit, Parametrized
from ltd.diffusion import GuidanceConfig, ParametrizationConfig, SamplerConfig, ShiftConfig
from ltd.encoders.text import TextEncoder
from ltd.inference.generate import Generator, Request, batches
from ltd.parallel.ema import Ema, EmaConfig
from ltd.parallel.layout import Layout
from ltd.progress import Progress


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
    """When clips are made while training, and from which weights."""

    #: Steps between evaluations, and at the last step; 0 is never.
    every: int = 1000
    #: Seed of what is drawn: the same at every step.
    seed: int = 0
    #: Decay of the average to make clips from; null is the first of ``ema.decays``, 0 the raw weights.
    decay: float | None = None
    #: Most clips made at once on a process.
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name in ("every", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 0 or more")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: got {self.batch_size}, needed 1 or more")

    def check(self, ema: EmaConfig, field: str) -> None:
        """Refuse an average that the run does not keep.

        Args:
            ema: Averages that the run keeps.
            field: Name of this section.

        Raises:
            ConfigError: If there is no such average.
        """
        if self.decay not in (None, 0, *ema.decays):
            raise ConfigError(f"{field}.decay: got {self.decay}, needed null, 0 or one of ema.decays")

    def weights(self, ema: EmaConfig) -> str:
        """Name the weights that clips are made from: ``raw``, or ``ema_`` and the decay."""
        return "raw" if self.decay == 0 else f"ema_{self.decay or ema.decays[0]}"

    @contextlib.contextmanager
    def evaluating(self, network: nn.Module, ema: Ema) -> Iterator[None]:
        """Put a network under training into evaluation mode, with these weights; called by all processes.

        Args:
            network: The module that the averages are of.
            ema: Its averages.

        Yields:
            Nothing; mode and weights come back exactly.
        """
        training = network.training
        network.eval()
        try:
            with contextlib.nullcontext() if self.decay == 0 else ema.applied(self.decay):
                yield
        finally:
            network.train(training)


@dataclass(frozen=True, kw_only=True)
class DrawConfig(EvaluatorConfig):
    """When samples are made while training, from which weights, and how."""

    #: Solver.
    solver: Literal["euler", "heun", "dpmpp_2m", "unipc"] = "euler"
    #: Solver steps; the shift of their times is the objective's.
    steps: int = 20
    #: Scale of classifier-free guidance, 0 or more; 1 is off.
    guidance: float = 4.0
    #: Prompt to lead away from.
    negative: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError(f"steps: got {self.steps}, needed 1 or more")
        if self.guidance < 0:
            raise ConfigError(f"guidance: got {self.guidance}, needed a scale of 0 or more; 1 is off")


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

    def excess(self, caption: str) -> int:
        """Find none: what is remembered was read."""
        del caption
        return 0

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Look up embeddings ``(b, n, d)`` and their mask ``(b, n)``."""
        rows = [self._rows[caption] for caption in captions]
        return self._text[rows], self._mask[rows]


def deal(requests: Sequence[Request], batch_size: int, layout: Layout) -> Iterator[tuple[list[int], bool]]:
    """Deal batches out to the processes, or sequence groups: the same batches for any number of them.

    All processes get equally many, as under ZeRO-3 all must call the network equally often: some repeat one.

    Args:
        requests: All that is made.
        batch_size: Largest batch.
        layout: This process's position.

    Yields:
        Numbers of the requests of a batch of this process, and whether it counts.
    """
    numbers = iter(range(len(requests)))
    all_batches = [[next(numbers) for _ in batch] for batch in batches(requests, batch_size)]
    groups = layout.world_size // layout.sequence
    own = layout.global_rank // layout.sequence
    for first in range(0, len(all_batches), groups):
        index = first + own
        yield all_batches[min(index, len(all_batches) - 1)], index < len(all_batches)


class Drawer:
    """Make samples from the weights of a run under way.

    Args:
        config: Sampler, seed, weights, batch size.
        model: The module that is trained, with its hooks and seams, which all processes call equally often; what it
            predicts; its averages.
        text: Embeddings of all prompts of this process's requests and of the negative one; None for a model without
            text.
        decoder: Loads the autoencoder; it is kept only while samples are made.
        shift: Shift of the solver's times.
        layout: This process's position.
        moved: Called at every batch, so that long work is seen to move.
    """

    def __init__(
        self,
        config: DrawConfig,
        model: tuple[Dit, ParametrizationConfig, Ema],
        text: RememberedText | None,
        decoder: Callable[[], autoencoders.Autoencoder],
        shift: ShiftConfig,
        layout: Layout,
        moved: Callable[[], None],
    ) -> None:
        self.config, self.text, self.decoder, self.layout, self.moved = config, text, decoder, layout, moved
        self.network, self.parametrization, self.ema = model
        self.sampler = SamplerConfig(
            kind=config.solver, steps=config.steps, shift=shift, guidance=GuidanceConfig(scale=config.guidance)
        )

    @torch.no_grad()
    def draw(self, requests: Sequence[Request], take: Callable[[list[int], Tensor], None]) -> None:
        """Make this process's share of the samples; called by all processes.

        Args:
            requests: All samples, the same on all processes.
            take: Given the numbers of a batch's requests and their videos ``(b, 3, t, h, w)``, about [-1, 1]; on one
                process of each sequence group. It must not communicate.
        """
        denoiser = self.network
        if self.parametrization != ParametrizationConfig():
            denoiser = Parametrized(self.network, self.parametrization)  # type: ignore[assignment]
        decoder = self.decoder()
        with self.config.evaluating(self.network, self.ema):
            generator = Generator(denoiser, decoder, self.text, sampler=self.sampler, negative=self.config.negative)
            self._draw(generator, requests, take)

    def _draw(
        self, generator: Generator, requests: Sequence[Request], take: Callable[[list[int], Tensor], None]
    ) -> None:
        groups = self.layout.world_size // self.layout.sequence
        with Progress(len(requests), "sample", unit="samples", enabled=self.layout.is_main) as bar:
            for numbers, counts in deal(requests, self.config.batch_size, self.layout):
                self.moved()
                batch = [requests[number] for number in numbers]
                latents = generator.draw_latents(batch, generator.condition(batch), seed=self.config.seed)
                if counts and self.layout.sequence_rank == 0:
                    take(numbers, generator.decode(latents))
                bar.update(min(len(numbers) * groups, bar.total - bar.done))
