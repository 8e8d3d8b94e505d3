"""The autoencoder stage: reconstruct clips and images, measure held-out PSNR, export with the latents' statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ltd import autoencoders, storage
from ltd.autoencoders import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderLossConfig,
    CausalVae,
    CausalVaeConfig,
    ConvVae,
    EquivarianceConfig,
    KlConfig,
    LatentStatistics,
    Posterior,
    build_discriminator,
    inflate,
    initialize_from_data,
)
from ltd.autoencoders.alignment import LatentAlignment
from ltd.autoencoders.sensitivity import pixel_scaled_std, pixel_sensitivity
from ltd.config import ConfigError, to_dict
from ltd.data import Batch, evaluation_batches
from ltd.encoders.perceptual import PerceptualConfig, StLpipsConfig, build_perceptual
from ltd.encoders.vision import VisionTeacher
from ltd.inference.media import pixels_to_video
from ltd.parallel.heartbeat import Heartbeat
from ltd.parallel.layout import Layout
from ltd.rng import generator
from ltd.training.autoencoder_checks import check_lpips, check_lpips_data, check_media, warn_of_small_views
from ltd.training.autoencoder_heldout import LEAST_PIXELS
from ltd.training.autoencoder_stage import (
    AdversarialConfig,
    AlignmentRun,
    AutoencoderStage,
    Objective,
    media_pixels,
)
from ltd.training.later_stages import Need
from ltd.training.loop import train
from ltd.training.reconstruction import ReconstructionMetricsConfig, build_reconstruction, reconstruction_needs
from ltd.training.run import RunConfig, check_views
from ltd.training.session import Session, open_layout, start_session
from ltd.training.stages import at_step
from ltd.training.start import find_start
from ltd.training.toy import ToyDataConfig, with_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun(RunConfig):
    """Train an autoencoder on clips and images."""

    kind: Literal["autoencoder"] = "autoencoder"
    model: AutoencoderConfig
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    #: Network of ``loss.perceptual_weight``.
    perceptual: PerceptualConfig = field(default_factory=StLpipsConfig)
    #: Network of ``eval/lpips_video`` and ``eval/lpips_image`` of held-out samples of 32 x 32 pixels or more; null
    #: measures neither.
    lpips: PerceptualConfig | None = None
    #: A discriminator trained beside it; null trains none.
    adversarial: AdversarialConfig | None = None
    #: Latents are turned and scaled, and the video with them, so that a decoder of moved latents moves its frames
    #: (EQ-VAE); null leaves them alone.
    equivariance: EquivarianceConfig | None = None
    #: Latents are drawn towards a vision network's features (VA-VAE); null leaves them alone.
    alignment: AlignmentRun | None = None
    #: Run or exported folder whose weights a new run starts from. An image VAE becomes a video VAE by tail
    #: initialisation where the model is one.
    start_from: str | None = None
    #: What is trained: ``decoder`` leaves encoder and codes as they are, and so every latent.
    train: Literal["all", "decoder"] = "all"
    #: Frames that are encoded and decoded at a time, and again in the backward pass, so that memory does not grow with
    #: a clip's length; null takes clips whole.
    frames_per_chunk: int | None = None
    #: Training samples per view from which a new run sets the linear path in closed form; 0 leaves that path off.
    initialize_from: int = 0
    #: Exported unit scale: ``channel`` divides each latent channel by its own std; ``shared`` all by one number, which
    #: keeps their proportions; ``pixels`` gives each a spread in proportion to what it changes in the pixels.
    latent_scale: Literal["channel", "shared", "pixels"] = "channel"
    #: Training samples per view from which the exported latent mean and std are computed.
    statistics_from: int = 512
    #: Metrics of reconstructions against their originals while training; null measures none.
    metrics: ReconstructionMetricsConfig | None = None
    #: Synthetic data to make when ``data.shards`` is null; null refuses.
    toy_data: ToyDataConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initialize_from < 0:
            raise ConfigError(f"initialize_from: must be at least 0, got {self.initialize_from}")
        if self.initialize_from and not (isinstance(self.model, CausalVaeConfig) and self.model.linear_path):
            raise ConfigError("initialize_from: needs a model with a linear path (model.linear_path: true), or 0")
        if self.statistics_from < 1:
            raise ConfigError(f"statistics_from: must be at least 1, got {self.statistics_from}")
        self._check_parts()
        if self.metrics is not None:
            self.metrics.check(self.ema, "metrics")
        if self.parallel.activation_checkpointing != "none":
            raise ConfigError(
                "parallel.activation_checkpointing: is for denoisers; set it to none, and frames_per_chunk instead"
            )
        if self.parallel.compile != "none":
            raise ConfigError("parallel.compile: autoencoders have no blocks to compile; set it to none")
        if self.parallel.sequence != 1:
            raise ConfigError(f"parallel.sequence: autoencoders train with 1, got {self.parallel.sequence}")
        if self.data.batching.kind == "packed":
            raise ConfigError("data.batching.kind: packed is for denoisers, autoencoders train with fixed or buckets")
        check_lpips(self)

    def _check_parts(self) -> None:
        """Refuse parts that do not go together."""
        if self.start_from is not None and self.initialize_from:
            raise ConfigError("start_from: brings weights, and initialize_from computes them; set one of the two")
        if self.train == "decoder" and self.parallel.zero == 3:
            raise ConfigError("train: decoder holds frozen weights, which parallel.zero=3 does not take; use 2 or less")
        chunk, unit = self.frames_per_chunk, self.model.compression.t
        if chunk is not None:
            if chunk < 1 or chunk % unit:
                raise ConfigError(f"frames_per_chunk: got {chunk}, needed a multiple of {unit} (compression) or null")
            if not isinstance(self.model.bottleneck, KlConfig):
                raise ConfigError("frames_per_chunk: is for bottleneck.kind kl; set it to null")
            if self.parallel.zero == 3:
                raise ConfigError("frames_per_chunk: does not go with parallel.zero=3 yet; use 2 or less, or null")
        if self.model.in_channels != 3:
            raise ConfigError(f"model.in_channels: got {self.model.in_channels}, needed 3: data are RGB frames")
        if self.adversarial is not None and self.adversarial.discriminator.in_channels != 3:
            got = self.adversarial.discriminator.in_channels
            raise ConfigError(f"adversarial.discriminator.in_channels: got {got}, needed 3: it judges RGB frames")
        check_views(self.data, self.model.compression)
        if self.alignment is not None and self.parallel.zero == 3:
            raise ConfigError("alignment: does not go with parallel.zero=3 yet; use 2 or less, or null")
        if self.alignment is not None and self.train == "decoder":
            raise ConfigError("alignment: changes latents, and train=decoder keeps them; set it to null")
        if self.equivariance is not None and self.equivariance.rotate:
            factors = self.model.compression
            if factors.h != factors.w:
                raise ConfigError(
                    f"equivariance.rotate: needs equal compression of h and w, got {factors.h}, {factors.w}"
                )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Refuse views that a loss cannot look at, before work starts."""
        self._check_bands()
        needed = {"loss.perceptual_weight": LEAST_PIXELS} if self.loss.perceptual_weight else {}
        if self.adversarial is not None:
            needed["adversarial.discriminator"] = self.adversarial.discriminator.least_size
        if self.data.batching.kind != "fixed":
            return
        sides = [min(view.shape.height, view.shape.width) for view in self.data.views]
        scale = 1.0
        if self.equivariance is not None:
            scale = self.equivariance.scales[0] / self.equivariance.scale_unit
        for number, side in enumerate(sides):
            size = int(side * scale)
            for field_name, least in needed.items():
                if size < least:
                    why = f", times the least scale {scale:g} of equivariance.scales" if scale != 1 else ""
                    raise ConfigError(
                        f"data.views[{number}]: the shorter side{why} is {size} pixels, {field_name} needs {least}"
                    )

    def _check_bands(self) -> None:
        """Refuse sizes that cannot be halved as often as the high-frequency term asks."""
        levels, factors = self.loss.high_frequency_levels, self.model.compression
        if not self.loss.high_frequency_weight:
            return
        sizes: dict[str, tuple[int, int]] = {}
        if self.data.batching.kind == "fixed":
            views = enumerate(self.data.views)
            sizes |= {f"data.views[{number}]": (view.shape.height, view.shape.width) for number, view in views}
        else:
            _, height, width = self.data.batching.token
            sizes["data.batching.token"] = (height, width)
        if self.equivariance is not None:
            sizes["the compression, to multiples of which equivariance scales"] = (factors.h, factors.w)
        for name, (height, width) in sizes.items():
            if height % 2**levels or width % 2**levels:
                raise ConfigError(
                    f"loss.high_frequency_levels: got {levels}, but {height} x {width} ({name}) are no multiples of "
                    f"{2**levels}"
                )


def start(
    config: AutoencoderRun, layout: Layout, beat: Heartbeat, ahead: bool = False
) -> tuple[Session, AutoencoderStage] | None:
    """Build a run up to its first step, or take it up where its checkpoint stands.

    Args:
        config: The run; its ``data.shards`` are set.
        layout: Processes of the run.
        beat: Their heartbeat.
        ahead: Whether what later stages read is opened too, to see that it is there and fits.

    Returns:
        The session, which the caller closes, and the stage; None when the run has all its steps.
    """
    found = find_start(config, layout)
    if found is None:
        return None
    config, critic = found.run, None
    check_media(config)
    if config.adversarial is not None:
        settings = config.adversarial
        critic = (lambda: build_discriminator(settings.discriminator), settings.optim)
    session = start_session(
        found, layout, beat, lambda fresh: _build(config, fresh), critic, needs=_needs if ahead else None
    )
    if config.lpips is not None and layout.is_main:
        warn_of_small_views(session.loader.views)
    stage = AutoencoderStage(
        config,
        Objective(
            loss=config.loss,
            perceptual=config.perceptual,
            lpips=config.lpips,
            adversarial=config.adversarial,
            equivariance=config.equivariance,
            alignment=config.alignment,
        ),
        session.engine,
        layout,
        critic=None if session.critic is None else session.critic.engine,
        frames_per_chunk=config.frames_per_chunk,
    )
    session.evaluators += build_reconstruction(config, session)
    return session, stage


def run(config: AutoencoderRun) -> None:
    """Train (or go on training) an autoencoder and export it with its latent statistics.

    Args:
        config: The run.
    """
    with open_layout(config) as (layout, beat):
        config = with_data(config, config.toy_data, layout)
        check_lpips_data(config)
        if train(config, layout, beat, start):
            beat.enter("evaluate", config.steps)
            _export(config, layout)


def _needs(config: AutoencoderRun) -> Iterator[Need]:
    """List what a stage reads beside its samples, for ``check_later_stages``."""
    yield ("media", config.data.sets, config.evaluation.shards), lambda: check_media(config)
    if config.loss.perceptual_weight:
        yield ("network", config.perceptual), lambda: build_perceptual(config.perceptual)
    lpips = config.lpips
    if lpips is not None:
        yield ("network", lpips), lambda: build_perceptual(lpips, field="lpips")
    yield from reconstruction_needs(config)


def _build(config: AutoencoderRun, fresh: bool) -> nn.Module:
    if fresh and config.train == "decoder" and config.start_from is None:
        raise ConfigError("train: decoder needs an encoder that was trained; set start_from")
    model = autoencoders.build_autoencoder(config.model)
    check_views(config.data, model.compression)
    if fresh and config.start_from is not None:
        _take_weights(model, config.start_from)
    if config.alignment is not None:
        teacher = VisionTeacher(config.alignment.teacher)
        model.alignment = LatentAlignment(model.latent_channels, teacher.dim, config.alignment.loss)
    if config.train == "decoder":
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("decoder."))
    if fresh and config.initialize_from:
        assert isinstance(model, CausalVae)
        # Every process computes the same start from the same samples.
        samples = _training_pass(config, config.initialize_from)
        videos = (pixels_to_video(media_pixels(batch)[batch.weight > 0]) for batch in samples)
        try:
            initialize_from_data(model, videos)
        except ValueError as error:
            raise ConfigError(f"initialize_from: {error}") from None
    return model


def _take_weights(model: Autoencoder, source: str) -> None:
    """Copy the weights of another autoencoder of the same architecture, or of the image VAE that it grows from."""
    given = autoencoders.load(source)
    kernels = [x.config.temporal_kernel for x in (given, model) if isinstance(x, ConvVae)]
    if isinstance(given, ConvVae) and isinstance(model, ConvVae) and kernels == [1, 3]:
        given = inflate(given, halve_time=model.config.halve_time)
        logger.info("start_from: %s is an image VAE; it becomes a video VAE by tail initialisation", source)
    before, now = (to_dict(config) for config in (given.config, model.config))
    wrong = [name for name in now if before.get(name) != now[name] and name not in ("clamp", "odd_sizes")]
    if wrong:
        name = wrong[0]
        raise ConfigError(f"start_from: {source} has model.{name} = {before.get(name)}, this run {now[name]}")
    model.load_state_dict(given.float().state_dict())


def _training_pass(config: AutoencoderRun, max_samples: int, layout: Layout | None = None) -> Iterator[Batch]:
    """Pass over training samples at the centre cut, all of them on every process or dealt over the layout's."""
    return evaluation_batches(
        config.data,
        batch_size=config.evaluation.batch_size,
        global_rank=layout.global_rank if layout else 0,
        world_size=layout.world_size if layout else 1,
        max_samples=max_samples,
    )


@torch.no_grad()
def _export(base: AutoencoderRun, layout: Layout) -> None:
    """Write RUN/model: the averaged weights of the last checkpoint and the statistics of the training latents."""
    config = at_step(base, base.steps)[0]
    target = Path(config.run_dir) / "model"
    checkpoint = storage.latest_checkpoint(config.run_dir)
    assert checkpoint is not None
    manifest = storage.read_manifest(checkpoint)
    lineage = {
        "run": config.run_dir,
        "step": manifest["step"],
        "weights": storage.fingerprint(checkpoint),
        "latent_scale": config.latent_scale,
        "statistics_from": config.statistics_from,
    }
    if manifest.get("ancestors"):
        lineage["ancestors"] = manifest["ancestors"]
    origin = autoencoders.load(config.start_from) if config.start_from and _only_decoder(base) else None
    if origin is not None:
        lineage["latents_of"] = autoencoders.weights_hash(origin)
    if layout.any(_exported_lineage(target) == lineage):
        return
    model = autoencoders.load(checkpoint, weights="ema", device=layout.device)
    if origin is not None:  # latents, and the scale that denoisers know them at, are those it went on from
        model.latent_norm.load_state_dict(origin.latent_norm.state_dict())
        _save_export(model, target, lineage, layout)
        return
    statistics = LatentStatistics()
    for batch in _training_pass(config, config.statistics_from, layout):
        posterior = model.encode(pixels_to_video(media_pixels(batch)))
        kept = (batch.weight > 0).to(layout.device)
        statistics.update(Posterior(posterior.mean[kept], posterior.logvar[kept]))
    total = LatentStatistics()
    for state in layout.gather_objects(statistics.state()):
        total.merge(state)
    model.set_latent_norm(total.mean.float(), _unit_scale(config, model, total.std).float())
    logger.info("statistics of %d latent cells", int(total.count))
    _save_export(model, target, lineage, layout)


def _save_export(model: Autoencoder, target: Path, lineage: dict[str, Any], layout: Layout) -> None:
    if layout.is_main:
        autoencoders.save(model, target, lineage=lineage)
        logger.info("exported %s: averaged weights", target)
    layout.barrier()


def _only_decoder(run: AutoencoderRun) -> bool:
    """Say whether no stage of a run trains more than the decoder."""
    return all(at_step(run, step)[0].train == "decoder" for step in (0, *(stage.from_step for stage in run.stages)))


def _unit_scale(config: AutoencoderRun, model: autoencoders.Autoencoder, std: Tensor) -> Tensor:
    """Choose what the export's latents are divided by, per channel; every process computes the same."""
    match config.latent_scale:
        case "channel":
            return std
        case "shared":
            return std.square().mean().sqrt().expand_as(std)
        case "pixels":
            video = pixels_to_video(media_pixels(next(_training_pass(config, config.evaluation.batch_size))))
            latents = model.encode(video).mean
            draw = torch.randint(0, 2, latents[:, 0].shape, generator=generator(config.seed, "sensitivity"))
            return pixel_scaled_std(std, pixel_sensitivity(model, latents, std, draw * 2 - 1))


def _exported_lineage(folder: Path) -> dict[str, Any] | None:
    try:
        _, config = storage.load_model(folder)
    except storage.StorageError:
        return None
    return config.get("lineage")
