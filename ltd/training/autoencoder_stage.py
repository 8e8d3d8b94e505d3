"""One step of autoencoder training: reconstruct, compare, judge; and what is measured on held-out clips."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ltd.autoencoders import (
    Autoencoder,
    AutoencoderLoss,
    AutoencoderLossConfig,
    DiscriminatorConfig,
    build_discriminator,
)
from ltd.autoencoders.adversarial import balance, generator_loss, hinge_discriminator_loss
from ltd.autoencoders.alignment import AlignmentConfig, LatentAlignment, teacher_features
from ltd.autoencoders.equivariance import (
    EquivarianceConfig,
    EquivarianceDraw,
    Transform,
    draw_transforms,
    equivariance_error,
    transform_latents,
    transform_video,
)
from ltd.autoencoders.flops import decode_flops, encode_flops
from ltd.config import ConfigError
from ltd.data import MicroBatch, PackedBatch
from ltd.encoders.perceptual import PerceptualConfig, PerceptualDistance, StLpipsConfig, build_perceptual
from ltd.encoders.vision import VisionTeacher, VisionTeacherConfig
from ltd.inference.media import pixels_to_video
from ltd.parallel.interface import Engine
from ltd.parallel.layout import Layout
from ltd.rng import DrawRandom
from ltd.shapes import VideoShape
from ltd.training.autoencoder_heldout import Heldout
from ltd.training.metrics import write_rows
from ltd.training.optim import OptimConfig
from ltd.training.run import RunConfig, heldout_batches
from ltd.training.work import Work, count_real

logger = logging.getLogger(__name__)

#: What the equivariance error is measured under: a quarter turn, and three quarters of the size.
_PROBES = {"turned": Transform(quarter_turns=1), "shrunk": Transform(scale=(0.75, 0.75))}


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A discriminator that is trained beside the autoencoder, on an engine of its own.

    Reference: Esser et al. (2020), arXiv 2012.09841, Sec. 3.1 and Eq. 6-7.
    """

    discriminator: DiscriminatorConfig
    #: Its optimiser.
    optim: OptimConfig
    #: Weight of the autoencoder's adversarial term.
    weight: float = 0.5
    #: ``adaptive`` scales the term so that its gradient at the reconstruction is as large as that of the pixel terms.
    balance: Literal["adaptive", "constant"] = "adaptive"
    #: Largest adaptive scale.
    limit: float = 1e4
    #: Steps before the discriminator is trained, and before the term counts.
    start_step: int = 0

    def __post_init__(self) -> None:
        for name in ("weight", "limit", "start_step"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 0 or more")


@dataclass(frozen=True, kw_only=True)
class AlignmentRun:
    """Alignment of the latents with a frozen vision network.

    Reference: Yao et al. (2025), arXiv 2501.01423 (VA-VAE).
    """

    teacher: VisionTeacherConfig
    loss: AlignmentConfig = field(default_factory=AlignmentConfig)
    #: Largest adaptive scale.
    limit: float = 1e8


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What an autoencoder is trained for."""

    #: Terms that compare a reconstruction with its video.
    loss: AutoencoderLossConfig
    #: Network of the perceptual term.
    perceptual: PerceptualConfig = field(default_factory=StLpipsConfig)
    #: Network of the held-out samples' LPIPS; None measures none.
    lpips: PerceptualConfig | None = None
    #: A discriminator; None without one.
    adversarial: AdversarialConfig | None = None
    #: Latents that are moved; None leaves them alone.
    equivariance: EquivarianceConfig | None = None
    #: Alignment, whose projection is the model's ``alignment``; None without it.
    alignment: AlignmentRun | None = None


@dataclass
class _Made:
    """What ``terms`` made of a micro-batch, for the discriminator."""

    video: Tensor
    reconstruction: Tensor


class AutoencoderStage:
    """One step of autoencoder training.

    Args:
        run: Configuration of the run.
        objective: What it is trained for.
        engine: Engine of the autoencoder.
        layout: This process's position.
        critic: Engine of the discriminator.
        frames_per_chunk: Frames that are encoded and decoded at a time; None for whole clips.
    """

    name = "autoencoder"

    def __init__(
        self,
        run: RunConfig,
        objective: Objective,
        engine: Engine,
        layout: Layout,
        *,
        critic: Engine | None = None,
        frames_per_chunk: int | None = None,
    ) -> None:
        self.run, self.engine, self.layout, self.critic = run, engine, layout, critic
        self.adversarial, self.equivariance = objective.adversarial, objective.equivariance
        self.alignment = objective.alignment
        assert isinstance(engine.module, Autoencoder)
        self.model = engine.module
        perceptual: PerceptualDistance | None = None
        self._distances: dict[str, PerceptualDistance] = {}
        if objective.loss.perceptual_weight > 0:
            perceptual = build_perceptual(objective.perceptual, device=layout.device)
            logger.info("perceptual distance: %s", perceptual.name)
            self._distances["perceptual"] = perceptual
        if objective.lpips is not None:
            same = perceptual is not None and objective.lpips == objective.perceptual
            lpips = perceptual if same else build_perceptual(objective.lpips, device=layout.device, field="lpips")
            assert lpips is not None
            logger.info("lpips of held-out samples: %s", lpips.name)
            self._distances["lpips"] = lpips
        self.loss = AutoencoderLoss(objective.loss, perceptual)
        self.frames_per_chunk = frames_per_chunk
        # The discriminator's own engine must not hear of the autoencoder's pass through it: that goes through a copy.
        self._judge: nn.Module | None = None
        if self.adversarial is not None:
            with torch.device(layout.device):
                self._judge = build_discriminator(self.adversarial.discriminator).requires_grad_(False)
        self._teacher: VisionTeacher | None = None
        if self.alignment is not None:
            self._teacher = VisionTeacher(self.alignment.teacher).to(layout.device)
        self._work: Work | None = None
        self._step = 0
        self._draw = EquivarianceDraw()
        self._made: _Made | None = None
        quantizer: Any = self.model.quantizer
        learns = any(p.requires_grad for name, p in self.model.named_parameters() if name.startswith("encoder."))
        # Codes that an untrained encoder's latents are mapped to stay what they are.
        self._trains_encoder = learns
        self._codebook = quantizer if hasattr(quantizer, "update") and learns else None
        if self._codebook is not None:
            self._codebook.reduce_sum, self._codebook.gather_rows = layout.sum_, layout.gather_rows

    def begin(self, step: int) -> None:
        """Draw what is done to the latents of the step's samples: one transform for all, a function of the step."""
        self._step = step
        if self._criticized:
            assert self.critic is not None and self._judge is not None
            self.critic.copy_weights(self._judge)
        if self.equivariance is not None:
            self._draw = draw_transforms(self.equivariance, self.run.seed, step)

    def end(self, *, applied: bool) -> None:
        """Move the codebook, if there is one, as the samples of the step say."""
        self._made = None
        if self._codebook is not None:
            if applied:
                self._codebook.update()
            else:
                self._codebook.discard()

    def prepare(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Take pixels and weights as they are."""
        draws = torch.tensor(batch.draws, device=batch.weight.device)
        return {"pixels": media_pixels(batch), "weight": batch.weight, "draws": draws}

    def terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reconstruct from a posterior sample and compare.

        Args:
            tensors: ``pixels`` uint8 (b, t, h, w, c), ``draws`` (b,), ``weight`` (b,).

        Returns:
            Per-sample ``loss`` and its parts, (b,) each.
        """
        video = pixels_to_video(tensors["pixels"])
        video = transform_video(video, self._draw.input, self.model.compression)
        change = None if self._draw.latents.is_identity else self._draw.latents
        decoded: list[Tensor] = []
        reconstruction, posterior = self.engine(
            video,
            self._noise(video, tensors["draws"]),
            draws=None if self._codebook is None else tensors["draws"],
            weight=tensors["weight"],
            change=None if change is None else lambda latents: transform_latents(latents, change),
            frames_per_chunk=self.frames_per_chunk,
            tap=decoded.append,
        )
        # Engines hang hooks on what they return, which may fire in the step's own backward pass only. The balances
        # differentiate up to this view, and on from what the decoder gave.
        reconstruction = reconstruction.view_as(reconstruction)
        seen = video
        self._work = self._count(video, reconstruction, tensors["weight"])
        if change is not None:
            video = transform_video(video, change, self.model.compression)
        values = self.loss(reconstruction, video, posterior)
        total, compared = values.pop("total"), values.pop("pixels")
        if self.alignment is not None:
            joint = (decoded.pop(), reconstruction)
            terms = self._alignment_terms(posterior.mean, seen, compared * tensors["weight"], tensors, joint)
            total = total + (terms["align_cosine"] + terms["align_distance"]) * terms["align_weight"]
            values |= terms
        if self._criticized:
            values |= self._adversarial_terms(reconstruction, compared * tensors["weight"], tensors["weight"])
            total = total + values["adversarial"] * values["adversarial_weight"]
            self._made = _Made(video, reconstruction.detach())
        return {"loss": total, **values}

    def critic_terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Judge real clips and their reconstructions.

        Args:
            tensors: What ``terms`` was given.

        Returns:
            Per-sample ``loss``, the same as ``discriminator``, and the mean logits of both, (b,) each; None before the
            discriminator's first step.
        """
        if not self._criticized:
            return None
        assert self._made is not None and self.critic is not None
        made, self._made = self._made, None
        count = len(made.video)
        # One call: an engine gathers sharded weights once, and its hooks see one forward pass per backward pass.
        logits = self.critic(torch.cat([made.video.to(made.reconstruction), made.reconstruction]))
        real, fake = logits[:count], logits[count:]
        loss = hinge_discriminator_loss(real, fake)
        means = {"logits_real": real.detach().float().flatten(1).mean(1)}
        means |= {"logits_fake": fake.detach().float().flatten(1).mean(1)}
        return {"loss": loss, "discriminator": loss.detach(), **means}

    def work(self) -> Work:
        """Count what the last call of ``terms`` amounted to: of the autoencoder, not of the networks of its losses."""
        assert self._work is not None, "terms comes first"
        return self._work

    def encoder_flops(self) -> float:
        """Have no frozen encoder."""
        return 0.0

    def _count(self, video: Tensor, reconstruction: Tensor, weight: Tensor) -> Work:
        """Count a pass from clips ``(b, c, t, h, w)`` to reconstructions, which may be smaller."""
        config, rows = self.model.config, len(video)
        latents = [self.model.compression.latent(VideoShape(*x.shape[2:])) for x in (video, reconstruction)]
        encoder = encode_flops(config, VideoShape(*video.shape[2:]), rows)
        decoder = decode_flops(config, latents[1], rows, leaf=not self._trains_encoder)
        again = encoder.forward + decoder.forward if self.frames_per_chunk is not None else 0.0
        scores = decoder.scores_again + (encoder.scores_again if self._trains_encoder else 0.0)
        cells = latents[0].num_cells
        return Work(
            tokens=rows * cells,
            computed=rows * cells,
            real=count_real(weight, [cells] * rows),
            model_flops=(encoder.training if self._trains_encoder else encoder.forward) + decoder.training,
            repeated_flops=again + scores,
        )

    @torch.no_grad()
    def heldout(self) -> dict[str, float]:
        """Reconstruct every held-out sample from its latent mean.

        Returns:
            Mean PSNR in dB, SSIM, the perceptual term's distance and LPIPS where there are networks for them, over
            clips and over images, whose rows the main process writes into the run's ``evaluation.json``; artefacts of
            both, and the state of the latents.
        """
        found = Heldout(self.model, self._distances)
        self.model.eval()
        for batch in heldout_batches(self.run, self.layout):
            pixels = media_pixels(batch)
            video = pixels_to_video(pixels.to(self.layout.device))
            with found.watching(batch.weight > 0):
                reconstruction, posterior = self.engine(video, None)
            errors = self._equivariance(video)
            found.add(batch.kinds[0], batch.weight > 0, pixels, video, reconstruction, posterior, errors)
        self.model.train()
        values, rows = found.merged(self.layout, self._step)
        if rows and self.layout.is_main:
            write_rows(Path(self.run.run_dir), rows)
        return values

    @property
    def _criticized(self) -> bool:
        return self.adversarial is not None and self._step > self.adversarial.start_step

    def _adversarial_terms(self, reconstruction: Tensor, compared: Tensor, weight: Tensor) -> dict[str, Tensor]:
        assert self.adversarial is not None and self._judge is not None
        term = generator_loss(self._judge(reconstruction))
        scale = reconstruction.new_tensor(self.adversarial.weight, dtype=torch.float32)
        if self.adversarial.balance == "adaptive":
            other = term * weight.to(term)
            scale = scale * balance(compared, other, reconstruction, self.layout.mean, self.adversarial.limit)
        return {"adversarial": term, "adversarial_weight": scale.expand_as(term)}

    def _alignment_terms(
        self,
        latents: Tensor,
        video: Tensor,
        compared: Tensor,
        tensors: dict[str, Tensor],
        joint: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        assert self.alignment is not None and self._teacher is not None
        config, alignment = self.alignment.loss, self.model.alignment
        assert isinstance(alignment, LatentAlignment)
        features = teacher_features(self._teacher, video, self.model.compression.t, config.frames)
        terms = alignment(latents, features, draws=tensors["draws"], seed=self.run.seed)
        scale = latents.new_tensor(config.weight, dtype=torch.float32)
        if config.adaptive:
            other = (terms["align_cosine"] + terms["align_distance"]) * tensors["weight"]
            scale = scale * balance(compared, other, latents, self.layout.mean, self.alignment.limit, joint)
        return {**terms, "align_weight": scale.expand_as(terms["align_cosine"])}

    def _equivariance(self, video: Tensor) -> dict[str, Tensor]:
        def encode(clip: Tensor) -> Tensor:
            return self.model.encode(clip).mean

        c = self.model.compression
        probes = {name: probe for name, probe in _PROBES.items() if name != "turned" or c.h == c.w}
        return {name: equivariance_error(encode, video, c, probe) for name, probe in probes.items()}

    def _noise(self, video: Tensor, draws: Tensor) -> Tensor:
        _, _, t, h, w = video.shape
        c = self.model.compression
        shape = (self.model.latent_channels, c.latent_frames(t), h // c.h, w // c.w)
        return DrawRandom(self.run.seed, draws.tolist()).normal(shape, "posterior").to(video.device)


def media_pixels(batch: MicroBatch) -> Tensor:
    """Take the pixels of a batch of media.

    Args:
        batch: What the loader gave.

    Returns:
        uint8 ``(b, t, h, w, c)``.

    Raises:
        ConfigError: If the batch holds latents.
    """
    if isinstance(batch, PackedBatch) or batch.pixels is None:
        raise ConfigError("data.shards: holds latents; an autoencoder trains on media shards")
    return batch.pixels
