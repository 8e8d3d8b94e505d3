"""What of a denoiser is evaluated on schedules of its own: built, and checked before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.entries import NO_LABEL
from ltd.data.real_clips import RealClips
from ltd.denoisers import DitConfig
from ltd.diffusion import ParametrizationConfig
from ltd.encoders.joined import build_text
from ltd.encoders.text import TextEncoder, check_lengths
from ltd.inference.conditions import check_guidance
from ltd.inference.generate import Request
from ltd.parallel.layout import Layout
from ltd.rng import generator
from ltd.shapes import VideoShape, num_tokens
from ltd.training.drawing import DrawConfig, Drawer, RememberedText, deal
from ltd.training.label_checks import read_run_labels
from ltd.training.latent_inputs import LatentInputs, open_autoencoder
from ltd.training.later_stages import Need
from ltd.training.measures import build_measures
from ltd.training.metrics import (
    Making,
    Measuring,
    MetricsConfig,
    build_measuring,
    draw_real_clips,
    measured_view,
)
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
        requests = _read_requests(run, run.samples, inputs, inputs.classes)
        drawer = _drawer(run, run.samples, requests, session, inputs)
        found.append(Sampling(drawer, requests, lambda: session.tracker))
    if run.metrics is not None and run.metrics.every:
        found.append(_measuring(run, run.metrics, session, inputs))
    return found


def denoiser_needs(run: DenoiserRun, inputs: LatentInputs, classes: list[tuple[str, ...]]) -> Iterator[Need]:
    """List what a stage reads beside its samples: caches, prompts, clips, networks; for ``check_later_stages``.

    Args:
        run: The run as it is in the stage.
        inputs: Autoencoder and text encoder, which all stages share.
        classes: Names of the classes in the stages before, to which this one's are added when they are read.

    Yields:
        What tells each from others, and what opens it in this process alone.
    """
    samples, metrics = run.samples, run.metrics
    encoders: list[TextEncoder | None] = []
    named: list[tuple[str, ...]] = []

    def text() -> TextEncoder | None:
        if not encoders:
            encoders.append(inputs.encoder or build_text(run.text, run.model.text_join))
        return encoders[0]

    def names() -> tuple[str, ...]:
        if not named:
            named.append(read_run_labels(run))
            known = next((each for each in reversed(classes) if each), ())
            if known and named[0] and named[0] != known:
                raise ConfigError(
                    "data.classes: the names of the classes, or their order, are other than in the stages before; give "
                    "the same list"
                )
            classes.append(named[0])
        return named[0]

    yield ("inputs", run.data, run.evaluation.shards), lambda: inputs.check_stage(run)
    yield ("classes", run.data, run.evaluation.shards), names
    if (samples is not None and samples.every) or (metrics is not None and metrics.every) or inputs.embeds_text(run):
        yield ("text",), text
    if samples is not None and samples.every:
        yield (
            ("samples", samples, run.data),
            lambda: _check_drawn(run, samples, _read_requests(run, samples, inputs, names()), text()),
        )
    if metrics is not None and metrics.every:
        yield ("drawn", metrics), lambda: _check_drawn(run, metrics, (), None)
        yield ("metrics", metrics, run.data), lambda: _open_clips(run, metrics, inputs)
        shape = measured_view(run, metrics).shape
        yield (
            ("measures", metrics.measures, shape),
            lambda: build_measures(metrics.measures, shape, torch.device("cpu")),
        )


def _read_requests(
    run: DenoiserRun, config: SamplesConfig, inputs: LatentInputs, classes: Sequence[str]
) -> list[Request]:
    requests = read_requests(config, _views(run), run.model, classes)
    for shape in {request.shape for request in requests}:
        _check_shape(shape, run, inputs, "samples.shapes")
    return requests


def _open_clips(run: DenoiserRun, config: MetricsConfig, inputs: LatentInputs) -> RealClips:
    view = measured_view(run, config)
    _check_shape(view.shape, run, inputs, "metrics.shape")
    return draw_real_clips(run.data, config.reference, config, view)


def _views(run: DenoiserRun) -> list[tuple[VideoShape, float | None]]:
    """List the training views where there are some: sizes, and frames per second."""
    fixed = run.data.batching.kind == "fixed"
    return [(view.shape, view.fps) for view in run.data.views] if fixed else []


def _check_shape(shape: VideoShape, run: DenoiserRun, inputs: LatentInputs, field: str) -> None:
    try:
        num_tokens(inputs.compression.latent(shape), run.model.patch)
    except ValueError as error:
        raise ConfigError(f"{field}: {shape}: {error}") from None


def _check_drawn(
    run: DenoiserRun, config: DrawConfig, requests: Sequence[Request], encoder: TextEncoder | None
) -> None:
    """Refuse guidance away from nothing, prompts that are too long, and scores against captions that nobody is told."""
    section = "samples" if isinstance(config, SamplesConfig) else "metrics"
    check_guidance(config.guidance, run.model, f"{section}.guidance")
    if isinstance(config, SamplesConfig) and encoder is not None:
        check_lengths(encoder, [request.prompt for request in requests], "samples.prompts")
        check_lengths(encoder, [config.negative], "samples.negative")
    if isinstance(config, MetricsConfig) and run.model.text_dim is None:
        for place in config.places("clip_score"):
            raise ConfigError(
                f"metrics.measures[{place}].metrics: clip_score holds samples against their captions, and the model "
                "takes none (model.text_dim is null); leave it out"
            )


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
    _check_drawn(run, config, requests, encoder)
    own = [requests[number].prompt for numbers, _ in deal(requests, config.batch_size, layout) for number in numbers]
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
    clips = _open_clips(run, config, inputs)
    requests = draw_requests(clips, config, run.model, inputs.classes, session.layout)
    captions = tuple(request.prompt for request in requests)
    drawer = _drawer(run, config, requests, session, inputs)
    for place in config.places("clip_score"):
        if not any(captions):
            raise ConfigError(
                f"metrics.measures[{place}].metrics: clip_score holds samples against their captions, and the "
                f"{len(captions)} real clips that were drawn have none; leave it out, or name tars with captions in "
                "metrics.reference"
            )
    making = Making(
        "training",
        "samples",
        config.weights(run.ema),
        config.seed,
        steps=config.steps,
        guidance=config.guidance,
        captions=captions,
    )
    return build_measuring(run, config, session, clips, lambda _, take: drawer.draw(requests, take), making)


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
