"""Generate images and videos with a trained denoiser: prompts and a seed -> frames.

A sample's noise is a function of (seed, prompt, repetition, shape): the same whatever is generated beside it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ltd import autoencoders, denoisers
from ltd.config import ConfigError
from ltd.denoisers import Conditioning, Frames
from ltd.diffusion import (
    Denoiser,
    GuidanceConfig,
    Guided,
    LinearPathConfig,
    PathConfig,
    PrepareSteps,
    SamplerConfig,
    sample,
    with_known,
)
from ltd.encoders.joined import build_text
from ltd.encoders.text import TextEncoder, check_lengths
from ltd.inference.conditions import check_guidance, conditions_of
from ltd.inference.known import Given, Tail, batch_frames, check_given, check_known, tail_frames
from ltd.inference.media import video_to_pixels
from ltd.inference.requests import Request, batches
from ltd.inference.run_parts import check_autoencoder, read_run_parts
from ltd.inference.tiling import TilingConfig, check_tiles, tiled_decode
from ltd.rng import DrawRandom, derive_seed
from ltd.shapes import VideoShape, num_tokens

__all__ = [
    "Generator",
    "Request",
    "batches",
    "check_guide",
    "load_generator",
]

logger = logging.getLogger(__name__)


class Generator:
    """A denoiser with the autoencoder and text encoder it was trained with.

    Args:
        denoiser: In evaluation mode.
        autoencoder: Decodes latents; its ``latent_norm`` is what the denoiser was trained under.
        text: Embeds prompts; None for a denoiser without text.
        sampler: Solver, steps, guidance; the path is the denoiser's.
        negative: Prompt that guidance leads away from; "" is what dropped captions were trained with.
        guide: A weaker denoiser that guidance leads away from instead (autoguidance).
        tiling: Tiles that frames are decoded in, chunk by chunk in time; None decodes whole.

    Raises:
        ConfigError: If the three do not fit together.
    """

    def __init__(
        self,
        denoiser: denoisers.Dit | denoisers.Parametrized,
        autoencoder: autoencoders.Autoencoder,
        text: TextEncoder | None,
        *,
        sampler: SamplerConfig,
        negative: str = "",
        guide: denoisers.Dit | denoisers.Parametrized | None = None,
        tiling: TilingConfig | None = None,
    ) -> None:
        if denoiser.config.latent_channels != autoencoder.latent_channels:
            raise ConfigError(
                f"autoencoder: makes {autoencoder.latent_channels} latent channels, "
                f"the denoiser was trained with {denoiser.config.latent_channels}"
            )
        guided = sampler.guidance.channels
        if guided is not None and guided > autoencoder.latent_channels:
            raise ConfigError(
                f"guidance.channels: got {guided}, needed at most the latents' {autoencoder.latent_channels} channels"
            )
        dim = None if text is None else text.dim
        if denoiser.config.text_dim not in (None, dim):
            raise ConfigError(f"text: makes {dim} features, the denoiser takes {denoiser.config.text_dim}")
        if guide is None:
            check_guidance(sampler.guidance.scale, denoiser.config, "guidance")
        if denoiser.config.image_dim is not None:
            logger.warning("model.image_dim: samples are made without an image encoder's tokens; none is given here")
        self.denoiser, self.autoencoder, self.text = denoiser, autoencoder, text
        self.sampler, self.negative, self.guide, self.tiling = sampler, negative, guide, tiling
        self.device = next(denoiser.parameters()).device

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Refuse prompts, the negative one too, that the text encoder would cut.

        Args:
            prompts: What is to be sampled.

        Raises:
            ConfigError: If one is too long; names it and by how much.
        """
        if self.text is not None:
            check_lengths(self.text, prompts, "--prompts", ", or have it cut by --cut-prompts")
            check_lengths(self.text, [self.negative], "--negative", ", or have it cut by --cut-prompts")

    def check(self, shape: VideoShape, given: Given | None = None) -> None:
        """Say before any work whether samples of a shape can be made.

        Args:
            shape: Frames, height and width in pixels.
            given: What is known of them.

        Raises:
            ConfigError: If the denoiser takes no known frames, or the media are too short.
            ValueError: If it does not fit the compression or the patch, or tiles do not fit the autoencoder.
        """
        num_tokens(self.autoencoder.compression.latent(shape), self.denoiser.config.patch)
        if given is not None:
            check_known([self.denoiser, self.guide])
            check_given(given, shape, self.autoencoder.compression, self.denoiser.config.patch)
        if self.tiling is not None:
            check_tiles(self.autoencoder, self.tiling, "decode")

    def generate(
        self, requests: Sequence[Request], *, seed: int, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Make a batch of samples of one shape.

        Args:
            requests: One or more, all of the same shape.
            seed: Seed of the noise.
            progress: Called with (steps done, steps).

        Returns:
            ``(b, t, h, w, 3)``, uint8, CPU.

        Raises:
            ValueError: If the shapes differ or do not fit the compression or the patch.
        """
        conditions = self.condition(requests)
        latents = self.draw_latents(requests, conditions, seed=seed, progress=progress)
        return video_to_pixels(self.decode(latents)).cpu()

    @torch.no_grad()
    def condition(self, requests: Sequence[Request]) -> tuple[Conditioning, Conditioning]:
        """Make what the denoiser is told of a batch.

        Args:
            requests: One or more.

        Returns:
            The conditions of the requests, and as many of what guidance leads away from.
        """
        return conditions_of(requests, self.denoiser.config, self.text, self.negative, self.device)

    @torch.no_grad()
    def draw_latents(
        self,
        requests: Sequence[Request],
        conditions: tuple[Conditioning, Conditioning],
        *,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        tail: Tail | None = None,
    ) -> Tensor:
        """Sample the latents of a batch of one shape.

        Args:
            requests: One or more, all of the same shape.
            conditions: What ``condition`` gave for their prompts.
            seed: Seed of the noise.
            progress: Called with (steps done, steps).
            tail: The segment before, whose end this one begins with; None for the first.

        Returns:
            ``(b, c, t, h, w)`` raw latents, as the autoencoder decodes them.

        Raises:
            ValueError: If the shapes differ or do not fit the compression or the patch.
        """
        shapes = {request.shape for request in requests}
        if len(shapes) != 1:
            raise ValueError(f"a batch has one shape, got {sorted(map(str, shapes))}")
        latent = self.autoencoder.compression.latent(shapes.pop())
        labels = [] if tail is None else [tail.segment]
        draws = [derive_seed(0, r.prompt, r.repetition, str(r.shape), *r.seeds, *labels) for r in requests]
        size = (self.autoencoder.latent_channels, latent.num_frames, latent.height, latent.width)
        random = DrawRandom(seed, draws)
        noise = random.normal(size, "sample").to(self.device)
        cond, null_cond = conditions
        config = self.denoiser.config
        if tail is None:
            frames = batch_frames([r.given for r in requests], requests[0].shape, self.autoencoder, config.patch)
        else:
            frames = tail_frames(tail, requests[0].shape, self.autoencoder, config.patch)
        if frames is not None:
            form = denoisers.told(frames, config.frames, config.frame_mask_channels)
            cond, null_cond = (dataclasses.replace(one, frames=form) for one in (cond, null_cond))
        sampler = dataclasses.replace(self.sampler, guidance=GuidanceConfig(), path=_path(self.denoiser))
        denoiser, ready = self._guided(null_cond, frames)
        latents = sample(denoiser, noise, cond, sampler, random=random, prepare_steps=ready, progress=progress)
        if frames is not None:
            latents = torch.where(frames.mask, frames.latents.to(latents), latents)  # the very bits
        return self.autoencoder.denormalize(latents)

    def _guided(self, null_cond: Conditioning, frames: Frames | None) -> tuple[Denoiser, PrepareSteps]:
        """Wrap the denoiser with guidance, and known frames around it and within: guidance looks at all cells.

        Args:
            null_cond: What guidance leads away from.
            frames: What is known.

        Returns:
            The denoiser, and what makes conditions ready for it.
        """

        def around(one: Denoiser) -> Denoiser:
            return one if frames is None else with_known(one, frames.latents, frames.mask, _path(self.denoiser))

        denoiser = Guided(
            around(self.denoiser),
            null_cond,
            self.sampler.guidance,
            guide=None if self.guide is None else around(self.guide),
            stack=denoisers.stack,
            prepare_steps=self.denoiser.prepare_steps,
        )
        return around(denoiser), denoiser.ready

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode raw latents, in tiles where there are some.

        Args:
            latents: ``(b, c, t, h, w)`` raw.

        Returns:
            Video ``(b, 3, t', h', w')``, about [-1, 1].
        """
        if self.tiling is None:
            return self.autoencoder.decode(latents)
        tiled = tiled_decode(self.autoencoder, latents, self.tiling)
        if tiled.num_tiles > 1:
            kind = "exact" if tiled.exact else "blended"
            logger.info("decoded in %d tiles, %s; seams: %s", tiled.num_tiles, kind, tiled.seams)
        return tiled.output


def load_generator(  # noqa: PLR0913 - each is a choice of its own, and all but two have a default
    run_dir: str | Path,
    *,
    sampler: SamplerConfig,
    weights: str = "ema",
    negative: str = "",
    autoencoder: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | str = "cpu",
    tiling: TilingConfig | None = None,
    guide: str | Path | None = None,
) -> Generator:
    """Load everything that sampling from a run needs.

    Args:
        run_dir: Run directory of a denoiser, one checkpoint inside it, or a converted folder.
        sampler: Solver, steps, guidance.
        weights: ``ema``, ``raw``, or the name of one average.
        negative: Prompt that guidance leads away from.
        autoencoder: Where the autoencoder is now; what the run's configuration says by default.
        precision: Of the denoiser; the sampler's state, the text encoder and the autoencoder stay in fp32.
        device: Where to compute.
        tiling: Tiles that frames are decoded in; None decodes whole.
        guide: Run of a weaker denoiser that guidance leads away from (autoguidance), read like ``run_dir``.

    Returns:
        The generator.

    Raises:
        ConfigError: If the autoencoder is not of the denoiser's latents, or the guide was not trained alike.
    """
    if guide is not None:
        check_guide(run_dir, guide)
    parts = read_run_parts(run_dir)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    denoiser = denoisers.load(run_dir, weights=weights, device=device, dtype=dtype)
    decoder = autoencoders.load(autoencoder or parts.autoencoder, device=device)
    check_autoencoder(decoder, parts, autoencoder)
    return Generator(
        denoiser,
        decoder,
        build_text(parts.text, parts.text_join, device=device),
        sampler=sampler,
        negative=negative,
        guide=None if guide is None else denoisers.load(guide, weights=weights, device=device, dtype=dtype),
        tiling=tiling,
    )


def check_guide(run_dir: str | Path, guide: str | Path) -> None:
    """Refuse a weaker denoiser that is asked and answers otherwise than the one it is to guide; loads neither.

    Args:
        run_dir: Run directory of the denoiser that is guided, one checkpoint inside it, or a converted folder.
        guide: That of the weaker one.

    Raises:
        ConfigError: If the two were not trained on the same latents, texts, classes and numbers.
    """
    ours, theirs = read_run_parts(run_dir), read_run_parts(guide)
    if (theirs.text, theirs.text_join, theirs.num_classes) != (ours.text, ours.text_join, ours.num_classes):
        raise ConfigError(f"guide: {guide} was trained with another text encoder or other classes than {run_dir}")
    if theirs.scalars != ours.scalars:
        raise ConfigError(
            f"guide: {guide} is told the numbers {list(theirs.scalars)} (model.scalars), {run_dir} "
            f"{list(ours.scalars)}; needed one trained alike"
        )
    for name in ("time", "autoencoder_hash", "latent_norm"):
        if theirs.lineage.get(name) != ours.lineage.get(name):
            raise ConfigError(f"guide: {name} of {guide} is another than that of {run_dir}; needed one trained alike")
    if theirs.path != ours.path:
        raise ConfigError(f"guide: {guide} was trained on path {theirs.path}, {run_dir} on {ours.path}")


def _path(denoiser: torch.nn.Module) -> PathConfig:
    """Say which path a denoiser's velocities are of."""
    return denoiser.parametrization.path if isinstance(denoiser, denoisers.Parametrized) else LinearPathConfig()
