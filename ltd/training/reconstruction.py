"""Reconstructions of real clips while an autoencoder trains, to be held against their originals: rFID, rFVD.

Training goes on bit for bit as if nothing had been reconstructed: the weights come back exactly, and the latent's mean
needs no random number.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ltd.config import ConfigError
from ltd.data.real_clips import RealClips
from ltd.inference.media import pixels_to_video
from ltd.parallel.ema import Ema
from ltd.parallel.interface import Engine
from ltd.progress import Progress
from ltd.training.later_stages import Need
from ltd.training.measures import build_measures
from ltd.training.metrics import (
    ComparedConfig,
    Making,
    Measuring,
    Take,
    build_measuring,
    draw_real_clips,
    measured_view,
)
from ltd.training.reference import ReferenceFeatures
from ltd.training.session import Session

if TYPE_CHECKING:
    from ltd.training.autoencoder import AutoencoderRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReconstructionMetricsConfig(ComparedConfig):
    """Metrics of reconstructions against their originals while training."""

    #: Tars of the clips; null takes those of ``evaluation.shards``, or without them the training data.
    reference: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for place in self.places("clip_score"):
            raise ConfigError(
                f"measures[{place}].metrics: clip_score holds samples against the captions that they were made from; "
                "reconstructions have none"
            )


class Reconstructor:
    """Reconstruct the clips of the reference from their latents' means.

    Args:
        config: Weights and batch size.
        engine: The autoencoder under training, which all processes call equally often.
        ema: Its averages.
    """

    def __init__(self, config: ReconstructionMetricsConfig, engine: Engine, ema: Ema) -> None:
        self.config, self.engine, self.ema = config, engine, ema

    @torch.no_grad()
    def __call__(self, reference: ReferenceFeatures, take: Take) -> None:
        """Reconstruct this process's share; called by all processes.

        Args:
            reference: Knows the clips, the processes, and which clips are the reference.
            take: Given the clips' numbers and reconstructions; a clip that cannot be read this time is left out.
        """
        layout = reference.layout
        with (
            self.config.evaluating(self.engine.module, self.ema),
            Progress(len(reference.numbers), "reconstruct", unit="clips", enabled=layout.is_main) as bar,
        ):
            for batch in reference.clips.batches(
                batch_size=self.config.batch_size,
                global_rank=layout.global_rank,
                world_size=layout.world_size,
                numbers=reference.numbers,
            ):
                reference.moved()
                assert batch.pixels is not None  # real clips are media
                reconstruction, _ = self.engine(pixels_to_video(batch.pixels.to(layout.device)), None)
                kept = (batch.weight > 0).cpu()
                if kept.any():
                    take(torch.tensor(batch.draws)[kept].tolist(), reconstruction[kept.to(layout.device)])
                bar.update(min(len(kept) * layout.world_size, bar.total - bar.done))


def build_reconstruction(run: AutoencoderRun, session: Session) -> list[Measuring]:
    """Build what an autoencoder's run measures of its reconstructions; called by all processes.

    Args:
        run: The run.
        session: Its engine and averages.

    Returns:
        The evaluator; none where there is no section, or its schedule is 0.

    Raises:
        ConfigError: If it cannot be as the configuration says.
    """
    config = run.metrics
    if config is None or not config.every:
        return []
    clips = _open_clips(run, config)
    shards = config.reference or run.evaluation.shards
    logger.info("metrics: reconstructions of %d clips of %s", config.num_samples, shards or "the training data")
    making = Making("reconstruction", "reconstructions", config.weights(run.ema), config.seed, paired=True)
    make = Reconstructor(config, session.engine, session.ema)
    return [build_measuring(run, config, session, clips, make, making)]


def reconstruction_needs(run: AutoencoderRun) -> Iterator[Need]:
    """List the clips and networks that a run's metrics of reconstructions open, for ``check_later_stages``."""
    config = run.metrics
    if config is not None and config.every:
        yield ("metrics", config, run.data, run.evaluation.shards), lambda: _open_clips(run, config)
        shape = measured_view(run, config).shape
        yield ("measures", config.measures, shape), lambda: build_measures(config.measures, shape, torch.device("cpu"))


def _open_clips(run: AutoencoderRun, config: ReconstructionMetricsConfig) -> RealClips:
    view = measured_view(run, config)
    try:
        run.model.compression.latent(view.shape)
    except ValueError as error:
        raise ConfigError(f"metrics.shape: {view.shape}: {error}") from None
    return draw_real_clips(run.data, config.reference or run.evaluation.shards, config, view)
