"""What of a denoiser is evaluated on schedules of its own: built, and checked before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ltd.config import ConfigError
from ltd.diffusion import ParametrizationConfig
from ltd.encoders.joined import build_text
from ltd.inference.generate import Request
from ltd.shapes import VideoShape, num_tokens
from ltd.training.drawing import DrawConfig, Drawer, RememberedText, deal
from ltd.training.latent_inputs import LatentInputs, open_autoencoder
from ltd.training.samples import Sampling, read_requests
from ltd.training.session import Evaluator, Session

if TYPE_CHECKING:
    from ltd.training.denoiser import DenoiserRun


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
