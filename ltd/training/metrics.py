"""Metrics of samples against real clips on a schedule while training: FVD, FID, KID and their kin.

Samples are made from averaged weights, and their features computed, by all processes; the main one compares them with
those of real clips. Values do not depend on the number of processes, and training goes on as if nothing had been done.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.data.write import write_bytes
from ltd.encoders.features import Features, FeaturesConfig, ManyOutputs, build_features
from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.distribution import DISTRIBUTION_METRICS, distribution_values
from ltd.evaluation.measures import outputs_of
from ltd.evaluation.rows import MetricRow, replace_parts, rows_from_json, rows_to_json
from ltd.inference.generate import Request
from ltd.inference.media import video_to_pixels
from ltd.shapes import VideoShape
from ltd.training.drawing import DrawConfig, Drawer
from ltd.training.reference import RealFeatures, ReferenceFeatures

logger = logging.getLogger(__name__)

MetricName: TypeAlias = Literal["fid", "sfid", "fvd", "kid", "inception_score", "precision_recall", "density_coverage"]
#: Which rows of evaluation.json these are.
_PART = "training"


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Metrics of the features of one network."""

    #: The network.
    features: FeaturesConfig
    #: What is computed of its features.
    metrics: tuple[MetricName, ...]
    #: Put behind the metrics' names, as in ``eval/fvd_NAME``; needed where two networks share a metric.
    name: str = ""

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError(f"metrics: got none, needed some of {', '.join(DISTRIBUTION_METRICS)}")
        if self.name and not self.name.replace("_", "").isalnum():
            raise ConfigError(f"name: got {self.name!r}, needed letters, digits and _")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig(DrawConfig):
    """Metrics of samples against real clips while training."""

    #: What is measured.
    measures: tuple[MeasureConfig, ...]
    #: Samples, and real clips in each of two sets: what samples are held against, and the floor.
    num_samples: int = 2048
    #: Frames, height and width in pixels; null takes the first training view. Needed with buckets and packs.
    shape: tuple[int, int, int] | None = None
    #: Frames per second that real clips are cut to; null takes every frame, or with ``shape`` null the view's rate.
    fps: float | None = None
    #: Tars of real clips, with the captions and labels that are sampled; null takes the training data.
    reference: str | tuple[str, ...] | None = None
    #: Folder of the features of real clips, which runs share; null is ``reference_features`` beside the run directory.
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.measures:
            raise ConfigError("measures: got none, needed networks and their metrics")
        if self.shape is not None and min(self.shape) < 1:
            raise ConfigError(f"shape: got {self.shape}, needed frames, height and width of 1 or more")
        named = [(metric, measure.name) for measure in self.measures for metric in measure.metrics]
        for metric, name in named:
            if named.count((metric, name)) > 1:
                raise ConfigError(f"measures: got {metric} twice under one name; give the networks a name each")
        for metric, _ in named:
            least = DISTRIBUTION_METRICS[metric].least
            if self.num_samples < least:
                raise ConfigError(f"num_samples: got {self.num_samples}, {metric} needs {least} or more")


class Measure:
    """A network, ready to be run, and what is computed of its outputs.

    Args:
        config: Network and metrics.
        features: The network.
        field: Name of the section, for messages.

    Raises:
        ConfigError: If the network lacks an output that a metric reads.
    """

    def __init__(self, config: MeasureConfig, features: Features, field: str) -> None:
        self.config, self.features = config, features
        self.outputs = outputs_of(config.metrics)
        self.dims = {name: features.dim if name == "features" else self._dim(name, field) for name in self.outputs}

    def _dim(self, output: str, field: str) -> int:
        if isinstance(self.features, ManyOutputs) and output in self.features.dims:
            return self.features.dims[output]
        needing = next(metric for metric in self.config.metrics if DISTRIBUTION_METRICS[metric].output == output)
        raise ConfigError(f"{field}.metrics: {needing} reads {output}, which {self.features.name} does not give")

    @property
    def identity(self) -> Mapping[str, Any]:
        """Network, preprocessing and widths of the outputs."""
        return {"network": self.features.name, "preprocessing": self.features.preprocessing, "dims": self.dims}

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """Compute the outputs that the metrics read.

        Args:
            clips: uint8 ``(b, t, h, w, 3)``.

        Returns:
            ``(b, dim)`` on the CPU by name.
        """
        if self.outputs == ["features"]:
            return {"features": self.features(clips).cpu()}
        assert isinstance(self.features, ManyOutputs)  # ``_dim`` looked
        return {name: rows.cpu() for name, rows in self.features.outputs(clips, self.outputs).items()}


def build_measures(config: MetricsConfig, shape: VideoShape, device: torch.device) -> list[Measure]:
    """Load the networks and show them a clip.

    Args:
        config: Which.
        shape: Size of the clips they will see.
        device: Where they run.

    Returns:
        The networks.

    Raises:
        ConfigError: If one cannot be loaded, takes no such clip, or lacks an output.
    """
    found = []
    clip = torch.arange(3 * shape.num_frames * shape.height * shape.width).remainder(251).to(torch.uint8)
    clip = clip.view(1, shape.num_frames, shape.height, shape.width, 3)
    for number, measure in enumerate(config.measures):
        where = f"metrics.measures[{number}]"
        try:
            network = Measure(measure, build_features(measure.features, device=device), where)
            outputs = network(clip)
        except ConfigError as error:
            message = str(error)
            inside = f"{where}." if message.startswith("features") else f"{where}.features."
            raise ConfigError(message if message.startswith(where) else inside + message) from None
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{where}.features: fails on a clip of {shape}: {error}") from error
        for name, rows in outputs.items():
            if rows.shape != (1, network.dims[name]):
                raise ConfigError(f"{where}.features: {name} is {tuple(rows.shape)}, needed (1, {network.dims[name]})")
        found.append(network)
    return found


@dataclass(frozen=True)
class Making:
    """How the samples were made, as rows of results tell it."""

    weights: str
    steps: int
    guidance: float
    seed: int


@dataclass
class _Own:
    """Outputs of this process's samples, batch by batch."""

    numbers: list[list[int]] = field(default_factory=list)
    outputs: list[list[dict[str, Tensor]]] = field(default_factory=list)


class Measuring:
    """Make samples, and measure them; an evaluator of the loop.

    Args:
        drawer: Makes the samples.
        requests: What is made, ``n`` of them.
        reference: Features of real clips.
        networks: Loads the networks; they are kept only while a step is measured.
        making: How the samples are made.
        run_dir: Gets the rows of the latest step in ``evaluation.json``.
    """

    def __init__(
        self,
        drawer: Drawer,
        requests: Sequence[Request],
        reference: ReferenceFeatures,
        networks: Callable[[], list[Measure]],
        making: Making,
        run_dir: Path,
    ) -> None:
        self.drawer, self.requests, self.reference = drawer, list(requests), reference
        self.networks, self.making, self.run_dir = networks, making, run_dir
        self.layout = drawer.layout
        self._floors: dict[str, float] = {}

    @property
    def every(self) -> int:
        """Steps between measurements."""
        return self.drawer.config.every

    @torch.no_grad()
    def run(self, step: int) -> dict[str, float]:
        """Sample and measure; called by all processes after a step.

        Args:
            step: Steps done.

        Returns:
            ``eval/METRIC`` and ``eval/METRIC_floor``, the same on all processes; none, with a warning, if samples or
            their features are not finite.
        """
        measures = self.networks()
        real = self.reference.get(measures)
        own = _Own()

        def take(numbers: list[int], video: Tensor) -> None:
            finite = torch.isfinite(video).flatten(1).all(dim=1).cpu()
            pixels = video_to_pixels(video.nan_to_num()).cpu()
            own.numbers.append(numbers)
            own.outputs.append([_only(finite, measure(pixels)) for measure in measures])

        self.drawer.draw(self.requests, take)
        rows: list[MetricRow] = []
        shares = self.layout.gather_objects((own.numbers, own.outputs))
        if self.layout.is_main:
            rows = self._measure(step, measures, real, shares)
        values: dict[str, float] = self.layout.broadcast_object(_values(rows))
        return values

    def _measure(
        self, step: int, measures: Sequence[Measure], real: Sequence[RealFeatures], shares: Sequence[Any]
    ) -> list[MetricRow]:
        """Compute all metrics and write their rows; on the main process."""
        rows: list[MetricRow] = []
        try:
            for place, (measure, known) in enumerate(zip(measures, real, strict=True)):
                keys = [number for numbers, _ in shares for batch in numbers for number in batch]
                parts = [found[place] for _, outputs in shares for found in outputs]
                banks = {
                    name: FeatureBank(dim).update(torch.cat([part[name] for part in parts]), keys)
                    for name, dim in measure.dims.items()
                }
                rows += self._rows(step, measure, known, banks)
        except (ValueError, ArithmeticError) as error:
            logger.warning("step %d: the samples cannot be measured: %s", step, error)
            return []
        write_rows(self.run_dir, rows)
        return rows

    def _rows(
        self, step: int, measure: Measure, real: RealFeatures, samples: Mapping[str, FeatureBank]
    ) -> list[MetricRow]:
        rows = []
        n, seed = len(self.requests), self.making.seed
        for metric in measure.config.metrics:
            what = DISTRIBUTION_METRICS[metric]
            dim, bank = measure.dims[what.output], samples[what.output]
            reference = FeatureBank(dim).update(real.reference[what.output])
            values = _named(measure, distribution_values(metric, bank, reference, seed=seed))
            if not values.keys() <= self._floors.keys():  # real clips against real clips: the same at every step
                floor = FeatureBank(dim).update(real.floor[what.output])
                self._floors |= _named(measure, distribution_values(metric, floor, reference, seed=seed))
            preprocessing = "; ".join(filter(None, (measure.features.preprocessing, what.how(n))))
            note = "; ".join(filter(None, (f"after step {step}", what.caution(n, dim))))
            rows += [
                MetricRow(
                    part=_PART,
                    name=name,
                    value=value,
                    unit="",
                    network=measure.features.name,
                    preprocessing=preprocessing,
                    n=n,
                    floor=self._floors[name],
                    note=note,
                    **dataclasses.asdict(self.making),
                )
                for name, value in values.items()
            ]
        return rows


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
            what = DISTRIBUTION_METRICS[metric]
            caution = what.caution(num_samples, measure.dims[what.output])
            if caution:
                logger.warning("metrics.num_samples: %s of %s: %s", metric, measure.features.name, caution)


def _named(measure: Measure, values: Mapping[str, float]) -> dict[str, float]:
    suffix = f"_{measure.config.name}" if measure.config.name else ""
    return {name + suffix: value for name, value in values.items()}


def _only(finite: Tensor, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mark the rows of samples that are not finite, which pixels do not show."""
    return {name: rows.masked_fill(~finite[:, None], torch.nan) for name, rows in outputs.items()}


def _values(rows: Sequence[MetricRow]) -> dict[str, float]:
    values = {}
    for row in rows:
        values[f"eval/{row.name}"] = row.value
        if row.floor is not None:
            values[f"eval/{row.name}_floor"] = row.floor
    return values
