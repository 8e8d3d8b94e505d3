"""The autoencoder stage: reconstruct clips and images, measure held-out PSNR, export with the latents' statistics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ltd import autoencoders, storage
from ltd.autoencoders import (
    AutoencoderLoss,
    AutoencoderLossConfig,
    CausalVaeConfig,
    LatentStatistics,
    Posterior,
    initialize_from_data,
)
from ltd.autoencoders.sensitivity import pixel_scaled_std, pixel_sensitivity
from ltd.config import ConfigError
from ltd.data import Batch, MicroBatch, PackedBatch, evaluation_batches
from ltd.encoders.perceptual import build_perceptual
from ltd.evaluation.fidelity import Psnr
from ltd.inference.media import pixels_to_video, video_to_pixels
from ltd.parallel.heartbeat import Heartbeat
from ltd.parallel.interface import Engine
from ltd.parallel.layout import Layout
from ltd.rng import DrawRandom, generator
from ltd.training.loop import fit
from ltd.training.run import RunConfig, check_views, heldout_batches
from ltd.training.session import Session, open_layout, start_session
from ltd.training.toy import ToyDataConfig, with_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun(RunConfig):
    """Train an autoencoder on clips and images."""

    kind: Literal["autoencoder"] = "autoencoder"
    model: CausalVaeConfig
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    #: Training samples per view from which a new run sets the linear path in closed form; 0 leaves that path off.
    initialize_from: int = 0
    #: Exported unit scale: ``channel`` divides each latent channel by its own std; ``shared`` all by one number, which
    #: keeps their proportions; ``pixels`` gives each a spread in proportion to what it changes in the pixels.
    latent_scale: Literal["channel", "shared", "pixels"] = "channel"
    #: Training samples per view from which the exported latent mean and std are computed.
    statistics_from: int = 512
    #: Synthetic data to make when ``data.shards`` is null; null refuses.
    toy_data: ToyDataConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initialize_from < 0:
            raise ConfigError(f"initialize_from: must be at least 0, got {self.initialize_from}")
        if self.statistics_from < 1:
            raise ConfigError(f"statistics_from: must be at least 1, got {self.statistics_from}")
        if self.parallel.activation_checkpointing != "none":
            raise ConfigError(
                "parallel.activation_checkpointing: autoencoders have no blocks to recompute; set it to none"
            )
        if self.parallel.compile != "none":
            raise ConfigError("parallel.compile: autoencoders have no blocks to compile; set it to none")
        if self.parallel.sequence != 1:
            raise ConfigError(f"parallel.sequence: autoencoders train with 1, got {self.parallel.sequence}")
        if self.data.batching.kind == "packed":
            raise ConfigError("data.batching.kind: packed is for denoisers, autoencoders train with fixed or buckets")


class AutoencoderStage:
    """One step of autoencoder training."""

    name = "autoencoder"

    def __init__(self, run: AutoencoderRun, engine: Engine, layout: Layout) -> None:
        self.run, self.engine, self.layout = run, engine, layout
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
        if run.loss.perceptual_weight > 0:
            perceptual = build_perceptual().to(layout.device)
        self.loss = AutoencoderLoss(run.loss, perceptual)
        self.latent_channels = run.model.latent_channels
        self.compression = run.model.compression

    def prepare(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Take pixels and weights as they are."""
        draws = torch.tensor(batch.draws, device=batch.weight.device)
        return {"pixels": _pixels(batch), "weight": batch.weight, "draws": draws}

    def terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reconstruct from a posterior sample and compare.

        Args:
            tensors: ``pixels`` uint8 (b, t, h, w, c), ``draws`` (b,).

        Returns:
            Per-sample ``loss`` and its parts, (b,) each.
        """
        video = pixels_to_video(tensors["pixels"])
        noise = self._noise(video, tensors["draws"])
        reconstruction, posterior = self.engine(video, noise)
        values = self.loss(reconstruction, video, posterior)
        return {"loss": values.pop("total"), **values}

    def num_tokens(self, tensors: dict[str, Tensor]) -> int:
        """Count the latent cells of the micro-batch."""
        b, t, h, w, _ = tensors["pixels"].shape
        return int(b * self.compression.latent_frames(t) * (h // self.compression.h) * (w // self.compression.w))

    @torch.no_grad()
    def heldout(self) -> dict[str, float]:
        """Reconstruct every held-out sample from its latent mean.

        Returns:
            Mean PSNR in dB over clips and over images.
        """
        scores = {"video": Psnr(), "image": Psnr()}
        for batch in heldout_batches(self.run, self.layout):
            pixels = _pixels(batch)
            video = pixels_to_video(pixels.to(self.layout.device))
            reconstruction, _ = self.engine(video, self._noise(video, None))
            kept = batch.weight > 0
            if kept.any():
                scores[batch.kinds[0]].update(video_to_pixels(reconstruction).cpu()[kept], pixels[kept])
        result = {}
        for kind, score in scores.items():
            total = Psnr()
            for state in self.layout.gather_objects(score.state()):
                total.merge(state)
            if total.num_clips:
                result[f"heldout/psnr_{kind}_db"] = total.clip_mean
        return result

    def _noise(self, video: Tensor, draws: Tensor | None) -> Tensor:
        b, _, t, h, w = video.shape
        c = self.compression
        shape = (self.latent_channels, c.latent_frames(t), h // c.h, w // c.w)
        if draws is None:
            return video.new_zeros(b, *shape)
        return DrawRandom(self.run.seed, draws.tolist()).normal(shape, "posterior").to(video.device)


def start(config: AutoencoderRun, layout: Layout, beat: Heartbeat) -> tuple[Session, AutoencoderStage] | None:
    """Build a run up to its first step, or take it up where its checkpoint stands.

    Args:
        config: The run; its ``data.shards`` are set.
        layout: Processes of the run.
        beat: Their heartbeat.

    Returns:
        The session, which the caller closes, and the stage; None when the run has all its steps.
    """
    session = start_session(config, layout, beat, lambda fresh: _build(config, fresh))
    return None if session is None else (session, AutoencoderStage(config, session.engine, layout))


def run(config: AutoencoderRun) -> None:
    """Train (or go on training) an autoencoder and export it with its latent statistics.

    Args:
        config: The run.
    """
    with open_layout(config) as (layout, beat):
        config = with_data(config, config.toy_data, layout)
        started = start(config, layout, beat)
        finished = True
        if started is not None:
            with started[0]:
                finished = fit(*started)
        if finished:
            beat.enter("evaluate", config.steps)
            _export(config, layout)


def _build(config: AutoencoderRun, fresh: bool) -> nn.Module:
    model = autoencoders.build_autoencoder(config.model)
    check_views(config.data, model.compression)
    if fresh and config.initialize_from:
        # Every process computes the same start from the same samples.
        samples = _training_pass(config, config.initialize_from)
        videos = (pixels_to_video(_pixels(batch)[batch.weight > 0]) for batch in samples)
        try:
            initialize_from_data(model, videos)
        except ValueError as error:
            raise ConfigError(f"initialize_from: {error}") from None
    return model


def _training_pass(config: AutoencoderRun, max_samples: int, layout: Layout | None = None) -> Iterator[Batch]:
    """Pass over training samples at the centre cut, all of them on every process or dealt over the layout's."""
    return evaluation_batches(
        config.data,
        batch_size=config.evaluation.batch_size,
        global_rank=layout.global_rank if layout else 0,
        world_size=layout.world_size if layout else 1,
        max_samples=max_samples,
    )


def _pixels(batch: MicroBatch) -> Tensor:
    if isinstance(batch, PackedBatch) or batch.pixels is None:
        raise ConfigError("data.shards: holds latents; an autoencoder trains on media shards")
    return batch.pixels


@torch.no_grad()
def _export(config: AutoencoderRun, layout: Layout) -> None:
    """Write RUN/model: the averaged weights of the last checkpoint and the statistics of the training latents."""
    target = Path(config.run_dir) / "model"
    checkpoint = storage.latest_checkpoint(config.run_dir)
    assert checkpoint is not None
    lineage = {
        "run": config.run_dir,
        "step": storage.read_manifest(checkpoint)["step"],
        "weights": storage.fingerprint(checkpoint),
        "latent_scale": config.latent_scale,
        "statistics_from": config.statistics_from,
    }
    if layout.any(_exported_lineage(target) == lineage):
        return
    model = autoencoders.load(checkpoint, weights="ema", device=layout.device)
    statistics = LatentStatistics()
    for batch in _training_pass(config, config.statistics_from, layout):
        posterior = model.encode(pixels_to_video(_pixels(batch)))
        kept = (batch.weight > 0).to(layout.device)
        statistics.update(Posterior(posterior.mean[kept], posterior.logvar[kept]))
    total = LatentStatistics()
    for state in layout.gather_objects(statistics.state()):
        total.merge(state)
    model.set_latent_norm(total.mean.float(), _unit_scale(config, model, total.std).float())
    if layout.is_main:
        autoencoders.save(model, target, lineage=lineage)
        logger.info("exported %s: averaged weights, statistics of %d latent cells", target, int(total.count))
    layout.barrier()


def _unit_scale(config: AutoencoderRun, model: autoencoders.CausalVae, std: Tensor) -> Tensor:
    """Choose what the export's latents are divided by, per channel; every process computes the same."""
    match config.latent_scale:
        case "channel":
            return std
        case "shared":
            return std.square().mean().sqrt().expand_as(std)
        case "pixels":
            video = pixels_to_video(_pixels(next(_training_pass(config, config.evaluation.batch_size))))
            latents = model.encode(video).mean
            draw = torch.randint(0, 2, latents[:, 0].shape, generator=generator(config.seed, "sensitivity"))
            return pixel_scaled_std(std, pixel_sensitivity(model, latents, std, draw * 2 - 1))


def _exported_lineage(folder: Path) -> dict[str, Any] | None:
    try:
        _, config = storage.load_model(folder)
    except storage.StorageError:
        return None
    return config.get("lineage")
