"""The denoiser stage: flow matching on the latents of images and videos under text, cached or encoded on the fly."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ltd import autoencoders
from ltd.autoencoders import AutoencoderConfig, LatentNorm
from ltd.config import ConfigError
from ltd.data import Batch, MicroBatch, PackedBatch
from ltd.data.latents import LatentCache, check_cache, check_source, is_cache
from ltd.denoisers import TIME_CONVENTION, Conditioning, Dit, DitConfig, build_denoiser
from ltd.diffusion import FlowMatching, FlowMatchingConfig, ParametrizationConfig, read_parametrization
from ltd.encoders.text import (
    TextEncoder,
    TextEncoderConfig,
    TransformersTextConfig,
    build_text_encoder,
    text_encoder_hash,
)
from ltd.inference.media import pixels_to_video
from ltd.parallel import sequence
from ltd.parallel.activation import checkpoint_blocks
from ltd.parallel.heartbeat import Heartbeat
from ltd.parallel.interface import Engine
from ltd.parallel.layout import Layout
from ltd.rng import DrawRandom, derive_seed
from ltd.training.denoiser_alignment import DenoiserAlignmentRun, build_aligner
from ltd.training.loop import train
from ltd.training.run import RunConfig, check_views, heldout_batches
from ltd.training.session import Session, open_layout, start_session
from ltd.training.start import find_start
from ltd.training.toy import ToyDataConfig, with_data

logger = logging.getLogger(__name__)

_HELDOUT_TIMES = 4


@dataclass(frozen=True, kw_only=True)
class DenoiserRun(RunConfig):
    """Train a denoiser on latents."""

    kind: Literal["denoiser"] = "denoiser"
    model: DitConfig
    objective: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    #: Run directory or exported folder of the autoencoder that the latents are of.
    autoencoder: str | None = None
    #: With ``autoencoder`` null: an autoencoder with random weights, for debug runs.
    untrained_autoencoder: AutoencoderConfig | None = None
    #: Text encoder of the captions; the latent cache must have been made with the same one.
    text: TextEncoderConfig = field(default_factory=TransformersTextConfig)
    #: Share of captions replaced by the empty caption, for classifier-free guidance, in [0, 1].
    caption_dropout: float = 0.1
    #: Tokens are drawn towards a vision network's features (REPA); null leaves them alone.
    alignment: DenoiserAlignmentRun | None = None
    #: Synthetic data to make when ``data.shards`` is null; null refuses.
    toy_data: ToyDataConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.caption_dropout <= 1:
            raise ConfigError(f"caption_dropout: must lie in [0, 1], got {self.caption_dropout}")
        if self.parallel.compile != "none" and self.data.batching.kind == "packed":
            raise ConfigError(
                "parallel.compile: the sizes of a pack are part of a compiled graph, nearly every pack would compile "
                "anew; set it to none, or data.batching.kind to buckets"
            )
        if (self.autoencoder is None) == (self.untrained_autoencoder is None):
            raise ConfigError("autoencoder: give a path, or untrained_autoencoder for debug runs, and not both")
        if self.alignment is not None and self.alignment.block > self.model.depth:
            raise ConfigError(
                f"alignment.block: got {self.alignment.block}, needed 1 to model.depth = {self.model.depth}"
            )
        kinds = self.objective.path.kind, self.objective.prediction.kind
        if self.model.prediction == "data" and kinds != ("linear", "velocity"):
            raise ConfigError(
                f"objective.prediction: got path {kinds[0]} and prediction {kinds[1]} for model.prediction data, which "
                "makes a velocity of the linear path; set model.prediction to velocity"
            )


class DenoiserStage:
    """One step of denoiser training."""

    name = "denoise"

    def __init__(self, run: DenoiserRun, engine: Engine, layout: Layout, inputs: LatentInputs | None = None) -> None:
        self.run, self.engine, self.layout = run, engine, layout
        self.objective = FlowMatching(run.objective)
        self.denoiser = self.objective.denoiser(engine)
        self.inputs = LatentInputs(run, layout) if inputs is None else inputs

    def begin(self, step: int) -> None:
        """Need nothing of the step."""

    def critic_terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Have no discriminator."""
        return None

    def end(self, *, applied: bool) -> None:
        """Keep nothing of the step."""

    def prepare(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Make unit-scale latents and text embeddings of this process's samples."""
        if isinstance(batch, PackedBatch):
            return pack([self._prepare(group) for group in batch.groups])
        return self._prepare(batch)

    def _prepare(self, batch: Batch) -> dict[str, Tensor]:
        prepared = self.inputs.prepare(batch, DrawRandom(self.run.seed, batch.draws))
        if self.inputs.aligner is not None:
            prepared["features"] = self.inputs.aligner.features(batch)
        return prepared

    def terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the flow-matching loss of each sample, some of them with their caption dropped.

        Args:
            tensors: What ``prepare`` made.

        Returns:
            ``loss``, (b,); with alignment also ``flow``, the loss without it, and ``align``, mean negative cosines.
        """
        random = DrawRandom(self.run.seed, tensors["draws"].tolist())
        cond = self.inputs.conditioning(tensors).drop(self.run.caption_dropout, self.inputs.null, random)
        aligner = self.inputs.aligner
        if aligner is None:
            losses, weight = self.objective.loss(self.denoiser, unpack(tensors), cond, random)
            return {"loss": losses * weight}
        tapped: list[Tensor] = []
        denoiser = self.objective.denoiser(functools.partial(self.engine, tap=tapped.append))
        losses, weight = self.objective.loss(denoiser, unpack(tensors), cond, random)
        term = aligner.loss(tapped.pop(), tensors)
        flow = losses * weight
        # 1 + the term, which changes no gradient: guards judge a loss by its ratio to others, so it stays above 0.
        return {"loss": flow + aligner.config.weight * (1 + term), "flow": flow, "align": term}

    def num_tokens(self, tensors: dict[str, Tensor]) -> int:
        """Count the denoiser's tokens in the micro-batch."""
        patch = torch.tensor(self.run.model.patch)
        if "shapes" in tensors:
            return int((tensors["shapes"][:, 1:] // patch).prod(dim=1).sum())
        latents = tensors["latents"]
        return len(latents) * int((torch.tensor(latents.shape[2:]) // patch).prod())

    @torch.no_grad()
    def heldout(self) -> dict[str, float]:
        """Evaluate the loss at fixed time quantiles on every held-out sample, with its caption.

        Returns:
            Mean over samples and quantiles, of all samples and by kind.
        """
        seed = derive_seed(self.run.seed, "heldout")
        sums = torch.zeros(2, 2, dtype=torch.float64, device=self.layout.device)
        for batch in heldout_batches(self.run, self.layout):
            prepared = self.inputs.prepare(batch.to(self.layout.device), DrawRandom(seed, batch.draws))
            for tensors in sequence.exchange(prepared, self.layout):
                random = DrawRandom(seed, tensors["draws"].tolist())
                cond = self.inputs.conditioning(tensors)
                latents, weight = tensors["latents"], tensors["weight"].double()
                channels, cells = latents.shape[1], latents[0, 0].numel()
                for time in self.objective.evaluation_times(_HELDOUT_TIMES, cells, channels).tolist():
                    losses = self.objective.loss_at(self.denoiser, latents, cond, random, time).double()
                    sums[int(latents.shape[2] == 1)] += torch.stack([(losses * weight).sum(), weight.sum()])
        self.layout.sum_(sums)
        (video, videos), (image, images) = sums.tolist()
        result = {"heldout/denoise": (video + image) / max(videos + images, 1.0)}
        result |= {"heldout/denoise_video": video / videos} if videos else {}
        return result | ({"heldout/denoise_image": image / images} if images else {})


class LatentInputs:
    """Turn batches of media or of cached latents into what a denoiser trains on.

    Args:
        run: The run.
        layout: This process's device.

    Raises:
        ConfigError: If the cache is of another autoencoder or text encoder, or the model does not fit them.
    """

    def __init__(self, run: DenoiserRun, layout: Layout) -> None:
        self.device = layout.device
        autoencoder = _autoencoder(run).to(layout.device)
        check_views(run.data, autoencoder.compression, run.model.patch)
        self.norm: LatentNorm = autoencoder.latent_norm
        self.hash = autoencoders.weights_hash(autoencoder)
        self.encoder: TextEncoder | None = None
        heldout = (run.evaluation.shards,) if run.evaluation.shards else ()
        shards = (*(dataset.shards for dataset in run.data.sets), *heldout)
        caches = [self._checked_cache(run, path, layout) for path in shards]
        trained = caches[: len(run.data.sets)]
        self.aligner = build_aligner(
            run.alignment,
            trained,
            autoencoder.compression,
            run.model.patch,
            layout.device,
            read_features=run.data.read_features,
        )
        all_cached = None not in caches
        self.autoencoder: autoencoders.Autoencoder | None = None if all_cached else autoencoder
        if not all_cached:
            self.encoder = build_text_encoder(run.text, device=layout.device)
        if caches[0] is not None:
            text, mask = _null_text(caches[0])
        else:
            assert self.encoder is not None
            text, mask = self.encoder.encode([""])
        self.null = Conditioning(text=text.to(self.device), text_mask=mask.to(self.device))
        _check_model(run, autoencoder, text.shape[-1])

    def _checked_cache(self, run: DenoiserRun, shards: str | tuple[str, ...], layout: Layout) -> LatentCache | None:
        """Open a latent cache and refuse one of another autoencoder, text encoder or data; None for media."""
        paths = (shards,) if isinstance(shards, str) else shards
        if len(paths) != 1 or not is_cache(paths[0]):
            return None
        cache = LatentCache(paths[0])
        check_cache(cache.manifest, autoencoder_hash=self.hash, text_encoder_hash=text_encoder_hash(run.text))
        problem = None
        if layout.is_main:  # reads the tars' indexes: once is enough
            try:
                check_source(cache.manifest)
            except ConfigError as error:
                problem = str(error)
        problem = layout.broadcast_object(problem)
        if problem is not None:
            raise ConfigError(problem)
        return cache

    def lineage(self) -> dict[str, Any]:
        """Say what the denoiser's latents depend on: a checkpoint keeps it, and sampling checks it."""
        return {
            "time": TIME_CONVENTION,
            "autoencoder_hash": self.hash,
            "latent_norm": self.norm.to_plain(),
        }

    def prepare(self, batch: Batch, random: DrawRandom) -> dict[str, Tensor]:
        """Make unit-scale latents and text embeddings.

        Args:
            batch: Media or cached latents, on the device.
            random: Random numbers of the batch; stream ``"posterior"``.

        Returns:
            ``latents`` (b, c, t, h, w) drawn from the posterior, ``text`` (b, n, d), ``text_mask`` (b, n),
            ``weight`` (b,) and ``draws`` (b,).
        """
        if batch.pixels is not None:
            assert self.autoencoder is not None
            with torch.no_grad():
                posterior = self.autoencoder.encode(pixels_to_video(batch.pixels))
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
        else:
            assert batch.mean is not None and batch.logvar is not None
            mean, logvar = batch.mean.float(), batch.logvar.float()
        noise = random.normal(mean.shape[1:], "posterior").to(mean.device)
        latents = self.norm.normalize(mean + torch.exp(0.5 * logvar) * noise)
        text, mask = self._text(batch)
        draws = torch.tensor(batch.draws, device=self.device)
        return {"latents": latents, "text": text, "text_mask": mask, "weight": batch.weight, "draws": draws}

    def conditioning(self, tensors: dict[str, Tensor]) -> Conditioning:
        """Collect what the denoiser is told."""
        return Conditioning(text=tensors["text"], text_mask=tensors["text_mask"])

    def _text(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.text is not None and batch.text_mask is not None:
            return batch.text.float(), batch.text_mask
        assert self.encoder is not None
        text, mask = self.encoder.encode(list(batch.captions))
        return text.to(self.device), mask.to(self.device)


def pack(groups: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put samples of several sizes into plain tensors, which a sequence group can exchange.

    Args:
        groups: What ``LatentInputs.prepare`` made, per size.

    Returns:
        The same names; ``latents`` is flat and ``shapes`` (b, 4) holds the (c, t, h, w) of each sample; ``features``,
        where there are some, has a row per token, sample after sample.
    """
    longest = max(group["text"].shape[1] for group in groups)
    packed = {name: torch.cat([group[name] for group in groups]) for name in ("weight", "draws")}
    if "features" in groups[0]:
        packed["features"] = torch.cat([group["features"].flatten(0, 1) for group in groups])
    for name in ("text", "text_mask"):
        parts = [group[name] for group in groups]
        packed[name] = torch.cat(
            [torch.cat([p, p.new_zeros(len(p), longest - p.shape[1], *p.shape[2:])], dim=1) for p in parts]
        )
    packed["latents"] = torch.cat([group["latents"].flatten() for group in groups])
    shapes = [shape for group in groups for shape in [list(group["latents"].shape[1:])] * len(group["latents"])]
    packed["shapes"] = torch.tensor(shapes)  # on the CPU: reading it there waits for no device
    return packed


def unpack(tensors: dict[str, Tensor]) -> Tensor | list[Tensor]:
    """Take the latents back out: the inverse of ``pack``; latents of one size stay one tensor."""
    if "shapes" not in tensors:
        return tensors["latents"]
    shapes = tensors["shapes"].tolist()
    pieces = tensors["latents"].split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def start(config: DenoiserRun, layout: Layout, beat: Heartbeat) -> tuple[Session, DenoiserStage] | None:
    """Build a run up to its first step, or take it up where its checkpoint stands.

    Args:
        config: The run.
        layout: Processes of the run.
        beat: Their heartbeat.

    Returns:
        The session, which the caller closes, and the stage; None when the run has all its steps.
    """
    found = find_start(with_data(config, config.toy_data, layout), layout)
    if found is None:
        return None
    config = found.run
    _check_objective(found.manifest, config)
    inputs: list[LatentInputs] = []

    def accept(lineage: dict[str, Any]) -> None:
        inputs.append(LatentInputs(config, layout))
        _check_lineage(lineage, inputs[0].lineage())

    def build(fresh: bool) -> Dit:
        return _build(config, layout, inputs[0], fresh=fresh)

    session = start_session(found, layout, beat, build, accept=accept)
    stage = DenoiserStage(config, session.engine, layout, inputs[0])
    session.lineage |= stage.inputs.lineage()
    return session, stage


def run(config: DenoiserRun) -> None:
    """Train (or go on training) a denoiser.

    Args:
        config: The run.
    """
    with open_layout(config) as (layout, beat):
        train(config, layout, beat, start)


def _autoencoder(run: DenoiserRun) -> autoencoders.Autoencoder:
    if run.autoencoder is not None:
        return autoencoders.load(run.autoencoder)
    assert run.untrained_autoencoder is not None
    logger.warning("untrained_autoencoder: its weights are random; good for a first look at the code only")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return autoencoders.build_autoencoder(run.untrained_autoencoder).eval().requires_grad_(False)


def _check_lineage(before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if name in before and before[name] != value:
            raise ConfigError(
                f"autoencoder: {name} is {value} now, but the checkpoint was trained with {before[name]}; "
                "point autoencoder at the one it was trained with, or start in another run_dir"
            )


def _check_objective(manifest: dict[str, Any], run: DenoiserRun) -> None:
    """Refuse a checkpoint whose network predicts something else, or on another path."""
    before = read_parametrization(manifest.get("config", {}).get("objective", {}))
    now = ParametrizationConfig(path=run.objective.path, prediction=run.objective.prediction)
    for name in ("path", "prediction") if manifest else ():
        if getattr(before, name) != getattr(now, name):
            raise ConfigError(
                f"objective.{name}: is {getattr(now, name)} now, but the checkpoint was trained with "
                f"{getattr(before, name)}; set it to that, or start anew in another run_dir"
            )


def _build(config: DenoiserRun, layout: Layout, inputs: LatentInputs, *, fresh: bool) -> Dit:
    # Values that a checkpoint brings are neither drawn nor allocated twice.
    with torch.device("cpu" if fresh else "meta"):
        model = build_denoiser(config.model)
        if inputs.aligner is not None:  # drawn last: the model's own values are those without it
            model.alignment = inputs.aligner.projector(config.model.width)
    if not fresh:  # at stage 3 the engine brings parameters to the device one by one
        model.to_empty(device="cpu" if config.parallel.zero == 3 else layout.device)
    checkpoint_blocks(model, config.parallel)
    sequence.shard(model, layout)
    return model


def _null_text(cache: LatentCache) -> tuple[Tensor, Tensor]:
    text, mask = cache.text("")
    if text is None or mask is None:
        raise ConfigError(f"data.shards: the latent cache {cache.directory} has no text; make it with a text encoder")
    return text[None], mask[None]


def _check_model(run: DenoiserRun, autoencoder: autoencoders.Autoencoder, text_dim: int) -> None:
    model, channels = run.model, autoencoder.latent_channels
    if model.latent_channels != channels:
        raise ConfigError(f"model.latent_channels: got {model.latent_channels}, the autoencoder makes {channels}")
    if model.text_dim != text_dim:
        raise ConfigError(f"model.text_dim: got {model.text_dim}, the text encoder makes {text_dim}")
