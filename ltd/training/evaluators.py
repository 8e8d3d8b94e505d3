"""What of a denoiser is evaluated on schedules of its own: built, and checked before the first step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ltd.config import ConfigError
from ltd.data import ViewConfig
from ltd.data.batch import BadSampleError
from ltd.data.entries import NO_LABEL
from ltd.data.real_clips import RealClips
from ltd.denoisers import DitConfig
from ltd.diffusion import ParametrizationConfig
from ltd.encoders.joined import build_text
from ltd.encoders.text import check_lengths
from ltd.inference.generate import Request
from ltd.parallel.layout import Layout
from ltd.rng import generator
from ltd.shapes import VideoShape, num_tokens
from ltd.training.drawing import DrawConfig, Drawer, RememberedText, deal
from ltd.training.latent_inputs import LatentInputs, open_autoencoder
from ltd.training.metrics import Making, Measuring, MetricsConfig, build_measures, warn_of_few
from ltd.training.reference import ReferenceFeatures
from ltd.training.samples import SamplesConfig, Sampling, read_requests
from ltd.training.session import Evaluator, Session

if TYPE_CHECKING:
    from ltd.training.denoiser import DenoiserRun

logger = logging.getLogger(__name__)

#: What a denoiser that is told the frames per second is told where neither the run nor the view says.
_FPS = 24.0


def build_evaluators(run: DenoiserRun, session: Session, inputs: LatentInputs) -> list[Evaluator]:
    """Build what a run evaluates besides its held-out loss; called by all processes.

    Args:
        run: The run.
        session: Its module and averages.
        inputs: Its autoencoder and text encoder.

    Returns:
        The evaluators, whose schedules are not 0.

    Raises:
        ConfigError: If one of them cannot be as the configuration says.
    """
    found: list[Evaluator] = []
    if run.samples is not None and run.samples.every:
        requests = read_requests(run.samples, _views(run), run.model, inputs.classes)
        for shape in {request.shape for request in requests}:
            _check_shape(shape, run, inputs, "samples.shapes")
        drawer = _drawer(run, run.samples, requests, session, inputs)
        found.append(Sampling(drawer, requests, lambda: session.tracker))
    if run.metrics is not None and run.metrics.every:
        found.append(_measuring(run, run.metrics, session, inputs))
    return found


def _views(run: DenoiserRun) -> list[tuple[VideoShape, float | None]]:
    """List the training views where there are some: sizes, and frames per second."""
    fixed = run.data.batching.kind == "fixed"
    return [(view.shape, view.fps) for view in run.data.views] if fixed else []


def _check_shape(shape: VideoShape, run: DenoiserRun, inputs: LatentInputs, field: str) -> None:
    try:
        num_tokens(inputs.compression.latent(shape), run.model.patch)
    except ValueError as error:
        raise ConfigError(f"{field}: {shape}: {error}") from None


def _drawer(
    run: DenoiserRun,
    config: DrawConfig,
    requests: Sequence[Request],
    session: Session,
    inputs: LatentInputs,
) -> Drawer:
    """Prepare to sample; the text encoder is let go when this process's prompts are embedded."""
    layout = session.layout
    encoder = inputs.encoder or build_text(run.text, run.model.text_join, device=layout.device)
    own = [requests[number].prompt for numbers, _ in deal(requests, config.batch_size, layout) for number in numbers]
    if isinstance(config, SamplesConfig) and encoder is not None:
        check_lengths(encoder, [request.prompt for request in requests], "samples.prompts")
        check_lengths(encoder, [config.negative], "samples.negative")
    text = None if encoder is None else RememberedText(encoder, [*own, config.negative])
    network: Any = session.engine.module
    parametrization = ParametrizationConfig(path=run.objective.path, prediction=run.objective.prediction)
    return Drawer(
        config,
        (network, parametrization, session.ema),
        text,
        lambda: inputs.autoencoder or open_autoencoder(run).to(layout.device),
        run.objective.shift,
        layout,
        session.beat.again,
    )


def _measuring(run: DenoiserRun, config: MetricsConfig, session: Session, inputs: LatentInputs) -> Measuring:
    layout = session.layout
    view = _view(run, config)
    _check_shape(view.shape, run, inputs, "metrics.shape")
    measures = build_measures(config, view.shape, layout.device)
    if layout.is_main:
        warn_of_few(measures, config.num_samples)
    clips = _real_clips(run, config, view)
    requests = draw_requests(clips, config, run.model, inputs.classes, layout)
    reference = ReferenceFeatures(
        clips,
        config.num_samples,
        Path(config.cache) if config.cache else Path(run.run_dir).absolute().parent / "reference_features",
        batch_size=config.batch_size,
        layout=layout,
        moved=session.beat.again,
    )
    return Measuring(
        _drawer(run, config, requests, session, inputs),
        requests,
        reference,
        lambda: build_measures(config, view.shape, layout.device),
        Making(config.weights(run.ema), config.steps, config.guidance, config.seed),
        Path(run.run_dir),
    )


def _view(run: DenoiserRun, config: MetricsConfig) -> ViewConfig:
    """Say what size is measured."""
    if config.shape is not None:
        frames, height, width = config.shape
        return ViewConfig(num_frames=frames, height=height, width=width, fps=config.fps)
    if run.data.batching.kind != "fixed":
        raise ConfigError("metrics.shape: got null, and the run has no views; needed [frames, height, width]")
    view = run.data.views[0]
    return dataclasses.replace(view, fps=config.fps or view.fps)


def _real_clips(run: DenoiserRun, config: MetricsConfig, view: ViewConfig) -> RealClips:
    """Draw the real clips of both sets, and a few for those that cannot be read."""
    data = dataclasses.replace(run.data, read_features=False)
    if config.reference is not None:
        data = dataclasses.replace(data, shards=config.reference, datasets=())
    needed = 2 * config.num_samples
    spare = max(2, needed // 50)
    try:
        clips = RealClips(data, view, needed=needed + spare, seed=config.seed)
    except ConfigError as error:
        raise ConfigError(f"metrics.reference: {error}") from None
    if len(clips) < needed:
        raise ConfigError(
            f"metrics.num_samples: got {config.num_samples}, which needs {needed} real clips of {view} (samples are "
            f"held against one set, another is the floor); got {len(clips)}: needed at most {len(clips) // 2}, or more "
            "data in metrics.reference"
        )
    return clips


def draw_requests(
    clips: RealClips, config: MetricsConfig, model: DitConfig, classes: Sequence[str], layout: Layout
) -> list[Request]:
    """List what is sampled: one sample with the caption and the class of each real clip of the floor.

    Args:
        clips: Real clips; sample ``i`` is told what clip ``i`` is.
        config: Number of samples, seed, frames per second.
        model: Says whether it takes classes.
        classes: Their names by number.
        layout: Processes that share the reading.

    Returns:
        The requests, the same on all processes.
    """
    own: dict[int, tuple[str, int]] = {}
    for number in range(layout.global_rank, config.num_samples, layout.world_size):
        chosen = float(torch.rand((), generator=generator(config.seed, "metrics caption", number)))
        try:
            own[number] = clips.told(number, chosen)
        except BadSampleError as error:
            logger.warning("the caption of real clip %d cannot be read, its sample gets none: %s", number, error)
            own[number] = ("", NO_LABEL)
    told = {number: pair for part in layout.gather_objects(own) for number, pair in part.items()}
    requests = []
    for number in range(config.num_samples):
        caption, label = told[number]
        labelled = model.num_classes is not None and label != NO_LABEL
        requests.append(
            Request(
                prompt=caption if model.text_dim is not None else "",
                repetition=number,  # so that equal captions get noise of their own
                shape=clips.view.shape,
                fps=clips.view.fps or _FPS,
                label=label if labelled else None,
                class_name=classes[label] if labelled and label < len(classes) else "",
            )
        )
    return requests
