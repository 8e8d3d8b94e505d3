"""Metrics of clips that a run makes against real clips, on a schedule while training: FVD, FID, KID and their kin.

Clips (a denoiser's samples, an autoencoder's reconstructions) are made from averaged weights, and their features
computed, by all processes; the main one compares them with those of real clips. Values do not depend on the number of
processes, and training goes on as if nothing had been done. How clips are made is not known here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.data import DataConfig, ViewConfig
from ltd.data.real_clips import RealClips
from ltd.data.write import write_bytes
from ltd.evaluation.distribution import DISTRIBUTION_METRICS
from ltd.evaluation.figures import Figure, figure_names
from ltd.evaluation.rows import MetricRow, replace_parts, rows_from_json, rows_to_json
from ltd.inference.media import video_to_pixels
from ltd.training.drawing import DrawConfig, EvaluatorConfig
from ltd.training.measures import (
    Against,
    Captions,
    ClipSet,
    Measure,
    MeasureConfig,
    NetworkMeasure,
    build_measures,
)
from ltd.training.reference import RealFeatures, ReferenceFeatures, TooFewClipsError
from ltd.training.run import RunConfig
from ltd.training.session import Session

logger = logging.getLogger(__name__)

#: Is given the numbers of a batch's clips and the clips ``(b, 3, t, h, w)``, about [-1, 1]; it must not communicate.
Take: TypeAlias = Callable[[list[int], Tensor], None]


@dataclass(frozen=True, kw_only=True)
class ComparedConfig(EvaluatorConfig):
    """Metrics of clips that a run makes against real clips."""

    #: What is measured.
    measures: tuple[MeasureConfig, ...]
    #: Clips that are made, and real clips in each of two sets: what clips are held against, and the floor.
    num_samples: int = 2048
    #: Frames, height and width in pixels; null takes the first training view. Needed with buckets and packs.
    shape: tuple[int, int, int] | None = None
    #: Frames per second that real clips are cut to; null takes every frame, or with ``shape`` null the view's rate.
    fps: float | None = None
    #: Folder of the features of real clips, which runs share; null is ``reference_features`` beside the run directory.
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.measures:
            raise ConfigError("measures: got none, needed networks and their metrics")
        if self.shape is not None and min(self.shape) < 1:
            raise ConfigError(f"shape: got {self.shape}, needed frames, height and width of 1 or more")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ConfigError(f"fps: got {self.fps}, needed a rate in (0, 1000] or null")
        self._check_names()
        for metric in (metric for measure in self.measures for metric in measure.metrics):
            least, bias = 1, ""
            if metric in DISTRIBUTION_METRICS:
                least = DISTRIBUTION_METRICS[metric].least
                bias = f"; {DISTRIBUTION_METRICS[metric].caution(self.num_samples, None)}"
            if self.num_samples < least:
                raise ConfigError(f"num_samples: got {self.num_samples}, {metric} needs {least} or more{bias}")

    def _check_names(self) -> None:
        """Refuse two figures of one name, or a figure of the name of another's floor."""
        taken: dict[str, tuple[str, str]] = {}
        for measure in self.measures:
            for metric in measure.metrics:
                names = [figure + measure.suffix for figure in figure_names(metric)]
                for name in (*names, *(f"{name}_floor" for name in names)):
                    if name in taken:
                        raise ConfigError(f"measures: {_describe_clash(name, taken[name], (metric, measure.name))}")
                    taken[name] = metric, measure.name

    def places(self, metric: str) -> list[int]:
        """List the places of the measures that have a metric."""
        return [place for place, measure in enumerate(self.measures) if metric in measure.metrics]


@dataclass(frozen=True, kw_only=True)
class MetricsConfig(DrawConfig, ComparedConfig):
    """Metrics of samples against real clips while training."""

    #: Tars of real clips, with the captions and labels that are sampled; null takes the training data.
    reference: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class Making:
    """How the clips that are measured are made, as rows of results tell it."""

    part: str  #: Which rows of ``evaluation.json`` these are.
    what: str  #: The clips, in words.
    weights: str
    seed: int
    steps: int | None = None
    guidance: float | None = None
    #: Whether clip ``i`` is made of real clip ``i`` of the reference, which is then the floor of what compares no sets.
    paired: bool = False
    #: Captions of the clips, in the order of their numbers; empty where there are none.
    captions: tuple[str, ...] = ()


@dataclass
class _Own:
    """Outputs of this process's clips, batch by batch."""

    numbers: list[list[int]] = field(default_factory=list)
    outputs: list[list[dict[str, Tensor]]] = field(default_factory=list)


class Measuring:
    """Make clips, and measure them; an evaluator of the loop.

    Args:
        make: Makes this process's share of the clips; called by all processes, after the features of real clips are
            there.
        making: How they are made.
        reference: Features of real clips; it has the processes that share the work.
        networks: Loads the networks; they are kept only while a step is measured.
        run_dir: Gets the rows of the latest step in ``evaluation.json``.
        every: Steps between measurements.
    """

    def __init__(
        self,
        make: Callable[[Take], None],
        making: Making,
        reference: ReferenceFeatures,
        networks: Callable[[], list[Measure]],
        run_dir: Path,
        *,
        every: int,
    ) -> None:
        self.make, self.making, self.reference = make, making, reference
        self.networks, self.run_dir, self._every = networks, run_dir, every
        self.layout = reference.layout
        self._floors: dict[str, Figure] = {}
        self._captions: dict[int, Captions] = {}

    @property
    def every(self) -> int:
        """Steps between measurements."""
        return self._every

    @torch.no_grad()
    def run(self, step: int) -> dict[str, float]:
        """Make clips and measure them; called by all processes after a step.

        Args:
            step: Steps done.

        Returns:
            ``eval/METRIC`` and ``eval/METRIC_floor``, the same on all processes; without those, with a warning, that
            cannot be computed: none, if clips, their features or those of real clips are not finite, or too few real
            clips can be read.
        """
        measures = self.networks()
        try:
            real = self.reference.get(measures)
        except TooFewClipsError as error:  # found when they are read, in the middle of a run that is worth going on
            logger.warning("step %d: no %s are measured: %s", step, self.making.what, error)
            return {}
        for place, measure in enumerate(measures):
            if "clip_score" in measure.config.metrics and place not in self._captions:
                assert isinstance(measure, NetworkMeasure)  # the only one that takes the metric
                self._captions[place] = self._embed(measure)
        own = _Own()

        def take(numbers: list[int], video: Tensor) -> None:
            finite = torch.isfinite(video).flatten(1).all(dim=1).cpu()
            pixels = video_to_pixels(video.nan_to_num()).cpu()
            own.numbers.append(numbers)
            own.outputs.append([_only(finite, measure(pixels)) for measure in measures])

        self.make(take)
        shares = self.layout.gather_objects((own.numbers, own.outputs))
        return self.layout.lead(
            lambda moved: _values(self._measure(step, measures, real, shares, moved)), self.reference.moved
        )

    def _embed(self, measure: NetworkMeasure) -> Captions:
        """Embed the captions, batch by batch on all processes; whole on all of them."""
        numbers = [number for number, caption in enumerate(self.making.captions) if caption]
        layout, size = self.layout, self.reference.batch_size
        own = []
        for first in range(layout.global_rank * size, len(numbers), layout.world_size * size):
            self.reference.moved()
            batch = [self.making.captions[number] for number in numbers[first : first + size]]
            own.append((first, measure.embed_captions(batch)))
        shares = sorted((pair for share in layout.gather_objects(own) for pair in share), key=lambda pair: pair[0])
        return Captions(numbers, torch.cat([texts for _, texts in shares]))

    def _measure(
        self,
        step: int,
        measures: Sequence[Measure],
        real: Sequence[RealFeatures],
        shares: Sequence[Any],
        moved: Callable[[], None],
    ) -> list[MetricRow]:
        """Compute all metrics and write their rows; on the main process, which calls ``moved`` every few seconds."""
        rows: list[MetricRow] = []
        numbers = [number for own, _ in shares for batch in own for number in batch]
        if not numbers:
            logger.warning("step %d: none of the real clips can be read: no %s are measured", step, self.making.what)
            return []
        for place, (measure, known) in enumerate(zip(measures, real, strict=True)):
            parts = [found[place] for _, outputs in shares for found in outputs]
            if problem := known.describe_not_finite():
                logger.warning("step %d: nothing is measured by %s: %s", step, measure.network, problem)
                continue
            try:
                clips = ClipSet.of(numbers, {name: torch.cat([part[name] for part in parts]) for name in measure.dims})
            except ValueError as error:
                logger.warning("step %d: the %s cannot be measured: %s", step, self.making.what, error)
                continue
            reference = ClipSet.of(known.reference.numbers, known.reference.outputs)
            against = Against(reference, self._captions.get(place), self.making.seed, moved)
            for metric in measure.config.metrics:
                moved()
                try:
                    rows += self._rows(step, measure, metric, clips, known, against)
                except (ValueError, ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                    logger.warning("step %d: %s of the %s is left out: %s", step, metric, self.making.what, error)
        if rows:
            write_rows(self.run_dir, rows)
        return rows

    def _rows(
        self, step: int, measure: Measure, metric: str, clips: ClipSet, real: RealFeatures, against: Against
    ) -> list[MetricRow]:
        found, suffix, making = measure.figures(metric, clips, against), measure.config.suffix, self.making
        originals = making.paired and metric not in DISTRIBUTION_METRICS
        paired_note = "floor: originals" if originals else ""
        if making.paired and metric == "kid":
            paired_note = "clips and originals are pairs, not independent: biased downwards, below 0 for equal ones"
        if not {name + suffix for name in found} <= self._floors.keys():  # the same at every step
            against.moved()
            floor = real.reference if originals else real.floor
            floors = measure.figures(metric, ClipSet.of(floor.numbers, floor.outputs), against)
            self._floors |= {name + suffix: figure for name, figure in floors.items()}
        return [
            MetricRow(
                part=making.part,
                name=name + suffix,
                value=figure.value,
                unit=figure.unit,
                network=measure.network,
                preprocessing="; ".join(filter(None, (measure.preprocessing(metric), figure.how))),
                n=figure.n,
                floor=self._floors[name + suffix].value,
                note="; ".join(filter(None, (f"{making.what} after step {step}", figure.note, paired_note))),
                weights=making.weights,
                steps=making.steps,
                guidance=making.guidance,
                seed=making.seed,
            )
            for name, figure in found.items()
        ]


def build_measuring(
    run: RunConfig,
    config: ComparedConfig,
    session: Session,
    clips: RealClips,
    make: Callable[[ReferenceFeatures, Take], None],
    making: Making,
) -> Measuring:
    """Build the evaluator of a run whose clips are known; called by all processes before the first step.

    Args:
        run: The run.
        config: Its section.
        session: Processes and heartbeat.
        clips: Real clips (``draw_real_clips``).
        make: Makes clips; given the features of real clips too, whose ``numbers`` say which are the reference.
        making: How they are made.

    Returns:
        The evaluator.

    Raises:
        ConfigError: If a network cannot be had, or does not take such clips.
    """
    layout, shape = session.layout, clips.view.shape
    measures = build_measures(config.measures, shape, layout.device)
    if layout.is_main:
        warn_of_few(measures, config.num_samples)
    reference = ReferenceFeatures(
        clips,
        config.num_samples,
        Path(config.cache) if config.cache else Path(run.run_dir).absolute().parent / "reference_features",
        batch_size=config.batch_size,
        layout=layout,
        moved=session.beat.again,
    )
    return Measuring(
        lambda take: make(reference, take),
        making,
        reference,
        lambda: build_measures(config.measures, shape, layout.device),
        Path(run.run_dir),
        every=config.every,
    )


def measured_view(run: RunConfig, config: ComparedConfig) -> ViewConfig:
    """Say what size a run measures.

    Args:
        run: The run.
        config: Its section.

    Returns:
        The size.

    Raises:
        ConfigError: If neither the section nor the run names one.
    """
    if config.shape is not None:
        frames, height, width = config.shape
        return ViewConfig(num_frames=frames, height=height, width=width, fps=config.fps)
    if run.data.batching.kind != "fixed":
        raise ConfigError("metrics.shape: got null, and the run has no views; needed [frames, height, width]")
    view = run.data.views[0]
    return dataclasses.replace(view, fps=config.fps or view.fps)


def draw_real_clips(
    data: DataConfig, shards: str | tuple[str, ...] | None, config: ComparedConfig, view: ViewConfig
) -> RealClips:
    """Draw the real clips of both sets, and a few for those that cannot be read.

    Args:
        data: The run's data section.
        shards: Tars to take the place of its own; None takes those.
        config: How many, and the seed.
        view: Their size.

    Returns:
        The clips.

    Raises:
        ConfigError: If there are too few, or no pixels.
    """
    data = dataclasses.replace(data, read_features=False)
    if shards is not None:
        data = dataclasses.replace(data, shards=shards, datasets=())
    needed = 2 * config.num_samples
    spare = max(2, needed // 50)
    try:
        clips = RealClips(data, view, needed=needed + spare, seed=config.seed)
    except ConfigError as error:
        message = str(error) if shards is None else str(error).replace("data.shards", "metrics.reference")
        named = message.startswith("metrics.reference")
        raise ConfigError(message if named else f"metrics.reference: {message}") from None
    if len(clips) < needed:
        raise ConfigError(
            f"metrics.num_samples: got {config.num_samples}, which needs {needed} real clips of {view} (one set that "
            f"clips are held against, another as the floor); got {len(clips)}: needed at most {len(clips) // 2}, or "
            "more data in metrics.reference"
        )
    return clips


def write_rows(run_dir: Path, rows: Sequence[MetricRow]) -> None:
    """Put rows into a run's ``evaluation.json``, in the place of those of an earlier step.

    Args:
        run_dir: The run.
        rows: Rows of one part of the evaluation.
    """
    path = run_dir / "evaluation.json"
    try:
        old = rows_from_json(path.read_text()) if path.is_file() else []
    except ValueError as error:
        logger.warning("%s is replaced: %s", path, error)
        old = []
    write_bytes(path, rows_to_json(replace_parts(old, rows)).encode())


def warn_of_few(measures: Sequence[Measure], num_samples: int) -> None:
    """Say what to expect of few samples, once, before the run begins."""
    for measure in measures:
        for metric in measure.config.metrics:
            if metric not in DISTRIBUTION_METRICS:
                continue
            what = DISTRIBUTION_METRICS[metric]
            caution = what.caution(num_samples, measure.dims[what.output])
            if caution:
                logger.warning("metrics.num_samples: %s of %s: %s", metric, measure.network, caution)


def _describe_clash(output: str, first: tuple[str, str], second: tuple[str, str]) -> str:
    """Say which two metrics, each with its measure's name, give one output."""
    if first == second:
        return f"got {first[0]} twice under one name; give the networks a name each"
    told = " and ".join(f"{metric} with name {name!r}" for metric, name in (first, second))
    return f"{told} both give eval/{output}; choose another name"


def _only(finite: Tensor, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mark the rows of clips that are not finite, which pixels do not show."""
    return {name: rows.masked_fill(~finite[:, None], torch.nan) for name, rows in outputs.items()}


def _values(rows: Sequence[MetricRow]) -> dict[str, float]:
    values = {}
    for row in rows:
        values[f"eval/{row.name}"] = row.value
        if row.floor is not None:
            values[f"eval/{row.name}_floor"] = row.floor
    return values
