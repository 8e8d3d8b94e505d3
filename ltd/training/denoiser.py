"""The denoiser stage: flow matching on the latents of images and videos under text, cached or encoded on the fly."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ltd.autoencoders import AutoencoderConfig
from ltd.config import ConfigError
from ltd.data import Batch, MicroBatch, PackedBatch
from ltd.denoisers import (
    Conditioning,
    Dit,
    DitConfig,
    Frames,
    FrameTasksConfig,
    build_denoiser,
    draw_kept,
    draw_tasks,
)
from ltd.diffusion import FlowMatching, FlowMatchingConfig, ParametrizationConfig
from ltd.encoders.joined import TextConfig, text_slices
from ltd.encoders.text import TransformersTextConfig
from ltd.parallel import sequence
from ltd.parallel.activation import checkpoint_blocks
from ltd.parallel.heartbeat import Heartbeat
from ltd.parallel.interface import Engine
from ltd.parallel.layout import Layout
from ltd.rng import DrawRandom
from ltd.training.condition_dropout import ConditionDropout
from ltd.training.denoiser_alignment import DenoiserAlignmentRun
from ltd.training.denoiser_checks import check_conditions, check_lineage, check_objective, check_trainable
from ltd.training.denoiser_heldout import heldout_losses, with_given
from ltd.training.denoiser_work import DenoiserWork
from ltd.training.evaluators import build_evaluators, denoiser_needs
from ltd.training.init_from import InitFromConfig, Origin, find_origin
from ltd.training.latent_inputs import LatentInputs, pack, unpack
from ltd.training.later_stages import Need
from ltd.training.loop import train
from ltd.training.metrics import MetricsConfig
from ltd.training.run import RunConfig
from ltd.training.samples import SamplesConfig
from ltd.training.session import Session, open_layout, start_session
from ltd.training.start import find_start
from ltd.training.toy import ToyDataConfig, with_data
from ltd.training.trainable import check_parts, check_start, freeze
from ltd.training.work import Work

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DenoiserRun(RunConfig):
    """Train a denoiser on latents."""

    kind: Literal["denoiser"] = "denoiser"
    model: DitConfig
    #: Weights of another denoiser that a new run starts from, shaped to ``model``; a run that goes on ignores it.
    init_from: InitFromConfig | None = None
    #: Parameters that are trained, or modules with all of theirs, ``*`` for any text (``blocks.*.attention``); the
    #: others are frozen. Empty trains all.
    trainable: tuple[str, ...] = ()
    objective: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    #: Run directory or exported folder of the autoencoder that the latents are of.
    autoencoder: str | None = None
    #: With ``autoencoder`` null: an autoencoder with random weights, for debug runs.
    untrained_autoencoder: AutoencoderConfig | None = None
    #: Text encoder of the captions, or several (``model.text_join`` says how they meet); null for a model without text.
    #: The latent cache must have been made with the same.
    text: TextConfig = field(default_factory=TransformersTextConfig)
    #: Share of captions replaced by the empty caption, for classifier-free guidance, in [0, 1]; labels go with them.
    caption_dropout: float = 0.1
    #: Share of the captions that each of several text encoders does not get, in [0, 1] each; empty is 0 for all.
    text_dropout: tuple[float, ...] = ()
    #: Share of class labels replaced by the null class, for a model with ``model.num_classes``, in [0, 1].
    label_dropout: float = 0.1
    #: Share of samples whose numbers (``model.scalars``) are not told, in [0, 1].
    scalar_dropout: float = 0.1
    #: Share of the tokens dropped in training behind the first ``model.mixer_depth`` blocks, in [0, 1); 0 = none.
    token_dropping: float = 0.0
    #: What is given of training samples beforehand, for a model with ``model.frames``; null gives nothing.
    frame_tasks: FrameTasksConfig | None = None
    #: Samples of fixed prompts while training; null makes none.
    samples: SamplesConfig | None = None
    #: Metrics of samples against real clips while training; null measures none.
    metrics: MetricsConfig | None = None
    #: Tokens are drawn towards a vision network's features (REPA); null leaves them alone.
    alignment: DenoiserAlignmentRun | None = None
    #: Synthetic data to make when ``data.shards`` is null; null refuses.
    toy_data: ToyDataConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_conditions(self)
        if not 0 <= self.token_dropping < 1:
            raise ConfigError(f"token_dropping: must lie in [0, 1), got {self.token_dropping}")
        if self.token_dropping and self.model.mixer_depth == 0:
            raise ConfigError("token_dropping: needs model.mixer_depth above 0, the blocks that see all tokens")
        self._check_frames()
        if self.token_dropping and self.alignment is not None:
            raise ConfigError("token_dropping: alignment needs all tokens; set one of them to 0 or null")
        if self.token_dropping and self.data.batching.kind == "packed":
            raise ConfigError("token_dropping: packs cannot drop tokens; set data.batching.kind to buckets")
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
        check_parts(self)
        kinds = self.objective.path.kind, self.objective.prediction.kind
        for name in ("samples", "metrics"):
            if getattr(self, name) is not None:
                getattr(self, name).check(self.ema, name)
        if self.model.prediction == "data" and kinds != ("linear", "velocity"):
            raise ConfigError(
                f"objective.prediction: got path {kinds[0]} and prediction {kinds[1]} for model.prediction data, which "
                "makes a velocity of the linear path; set model.prediction to velocity"
            )

    def _check_frames(self) -> None:
        if self.frame_tasks is None or self.frame_tasks.total == 0:
            return
        if self.model.frames == "none":
            raise ConfigError("frame_tasks: needs model.frames, times or channels; the model takes no known latents")
        if self.model.frames == "times" and self.objective.prediction.kind == "edm":
            raise ConfigError(
                "objective.prediction.kind: got edm, which scales the network's input by the sample's time; known "
                "latents at time 0 (model.frames: times) need velocity, x0 or eps; or set model.frames to channels"
            )


class DenoiserStage:
    """One step of denoiser training."""

    name = "denoise"

    def __init__(self, run: DenoiserRun, engine: Engine, layout: Layout, inputs: LatentInputs | None = None) -> None:
        self.run, self.engine, self.layout = run, engine, layout
        self.objective = FlowMatching(run.objective)
        self.denoiser = self.objective.denoiser(engine)
        self.inputs = LatentInputs(run, layout) if inputs is None else inputs
        parts = text_slices(run.text, run.model.text_join) if run.text_dropout else ()
        self._dropout = ConditionDropout(run, self.inputs.null, parts)
        self._counter = DenoiserWork(run.model, run.parallel, self.objective, self._dropout)
        self._work: Work | None = None

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
        cond = self._dropout(self.inputs.conditioning(tensors), random)
        latents = unpack(tensors)
        cells: Tensor | list[Tensor] | None
        if isinstance(latents, Tensor):
            cond, cells = self._partial(latents, cond, random)
        else:
            cond, cells = self._partial_pack(latents, cond, random)
        self._work = self._counter.count(latents, cond, tensors["weight"], random)
        aligner = self.inputs.aligner
        if aligner is None:
            losses, weight = self.objective.loss(self.denoiser, latents, cond, random, cell_weight=cells)
            return {"loss": losses * weight}
        tapped: list[Tensor] = []
        denoiser = self.objective.denoiser(functools.partial(self.engine, tap=tapped.append))
        losses, weight = self.objective.loss(denoiser, latents, cond, random, cell_weight=cells)
        term = aligner.loss(tapped.pop(), tensors)
        flow = losses * weight
        # 1 + the term, which changes no gradient: guards judge a loss by its ratio to others, so it stays above 0.
        return {"loss": flow + aligner.config.weight * (1 + term), "flow": flow, "align": term}

    def _partial(self, latents: Tensor, cond: Conditioning, random: DrawRandom) -> tuple[Conditioning, Tensor | None]:
        """Give known latents and drop tokens, as the run says; returns what of the sample counts, ``(b, t, h, w)``."""
        run, cells = self.run, None
        shape = (latents.shape[2], latents.shape[3], latents.shape[4])
        if run.frame_tasks is not None and run.frame_tasks.total > 0:
            mask, _ = draw_tasks(run.frame_tasks, shape, run.model.patch, random)
            mask = mask.to(latents.device)
            cells = (~mask[:, 0]).float()
            cond = with_given(cond, latents, mask, run.model)
        if run.token_dropping:
            kept, weight = draw_kept(shape, run.model.patch, run.token_dropping, random)
            cond, weight = dataclasses.replace(cond, kept=kept.to(latents.device)), weight.to(latents.device)
            cells = weight if cells is None else cells * weight
        return cond, cells

    def _partial_pack(
        self, latents: list[Tensor], cond: Conditioning, random: DrawRandom
    ) -> tuple[Conditioning, list[Tensor] | None]:
        """Give known latents of samples ``(c, t, h, w)`` as ``_partial`` does; what counts is ``(t, h, w)`` each."""
        if self.run.frame_tasks is None or self.run.frame_tasks.total == 0:
            return cond, None
        alone = [
            self._partial(x.unsqueeze(0), Conditioning(), DrawRandom(random.seed, [draw]))
            for x, draw in zip(latents, random.draws, strict=True)
        ]
        frames = tuple(given.frames for given, _ in alone if isinstance(given.frames, Frames))
        return dataclasses.replace(cond, frames=frames), [cells[0] for _, cells in alone if cells is not None]

    def work(self) -> Work:
        """Count what the last call of ``terms`` amounted to."""
        assert self._work is not None, "terms comes first"
        return self._work

    def encoder_flops(self) -> float:
        """Count the operations of autoencoder and text encoder so far, on this process."""
        return self.inputs.encoder_flops

    def heldout(self) -> dict[str, float]:
        """Evaluate the held-out loss: ``ltd.training.denoiser_heldout``."""
        return heldout_losses(self.run, self.layout, self.inputs, self.objective, self.denoiser)


def start(
    config: DenoiserRun, layout: Layout, beat: Heartbeat, ahead: bool = False
) -> tuple[Session, DenoiserStage] | None:
    """Build a run up to its first step, or take it up where its checkpoint stands.

    Args:
        config: The run.
        layout: Processes of the run.
        beat: Their heartbeat.
        ahead: Whether what later stages read is opened too, to see that it is there and fits.

    Returns:
        The session, which the caller closes, and the stage; None when the run has all its steps.
    """
    found = find_start(with_data(config, config.toy_data, layout), layout)
    if found is None:
        return None
    config = found.run
    check_trainable(config.model)
    check_objective(found.manifest, _parametrization(config))
    origin = find_origin(config.init_from, config.model, _parametrization(config), found, layout)
    check_start(config, fresh=found.checkpoint is None and origin is None)
    inputs: list[LatentInputs] = []

    def accept(lineage: dict[str, Any]) -> None:
        inputs.append(LatentInputs(config, layout))
        check_lineage(lineage, inputs[0].lineage())
        if origin is not None:
            origin.check_lineage(inputs[0].lineage())

    def build(fresh: bool) -> Dit:
        return _build(config, layout, inputs[0], fresh=fresh, origin=origin)

    classes: list[tuple[str, ...]] = [tuple(found.manifest.get("lineage", {}).get("classes", ()))]

    def needs(later: DenoiserRun) -> Iterator[Need]:
        if len(classes) == 1:
            classes.append(inputs[0].classes)
        return denoiser_needs(later, inputs[0], classes)

    session = start_session(found, layout, beat, build, accept=accept, needs=needs if ahead else None)
    stage = DenoiserStage(config, session.engine, layout, inputs[0])
    session.lineage |= stage.inputs.lineage()
    session.evaluators += build_evaluators(config, session, stage.inputs)
    if origin is not None:
        session.lineage["init_from"] = origin.record
    return session, stage


def run(config: DenoiserRun) -> None:
    """Train (or go on training) a denoiser.

    Args:
        config: The run.
    """
    with open_layout(config) as (layout, beat):
        train(config, layout, beat, start)


def _parametrization(run: DenoiserRun) -> ParametrizationConfig:
    return ParametrizationConfig(path=run.objective.path, prediction=run.objective.prediction)


def _build(config: DenoiserRun, layout: Layout, inputs: LatentInputs, *, fresh: bool, origin: Origin | None) -> Dit:
    # Values that a checkpoint brings are neither drawn nor allocated twice.
    device = "cpu" if fresh else "meta"
    with torch.device(device):
        model = build_denoiser(config.model)
    report = None
    if fresh and origin is not None:  # before anything wraps the blocks or splits the weights
        report = origin.apply(model, config.run_dir, layout)
    if inputs.aligner is not None:
        with torch.device(device):  # drawn last: the model's own values are those without it
            model.alignment = inputs.aligner.projector(config.model.width)
    if not fresh:  # at stage 3 the engine brings parameters to the device one by one
        model.to_empty(device="cpu" if config.parallel.zero == 3 else layout.device)
    freeze(model, config.trainable, report)
    checkpoint_blocks(model, config.parallel)
    sequence.shard(model, layout)
    return model
