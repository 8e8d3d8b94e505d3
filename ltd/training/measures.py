"""What is measured of clips while training: networks, or optical flow, ready to be run, and the figures of a set.

A measure turns each clip into a few vectors, wherever the clip is; figures are computed from the vectors of a whole set
in one place. Knows neither processes nor files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.encoders.features import CaptionFeatures, Features, FeaturesConfig, ManyOutputs, build_features
from ltd.encoders.flow import DenseFlow
from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.distribution import DISTRIBUTION_METRICS
from ltd.evaluation.figures import (
    FRAMES_SHOWN,
    MOTION_METRICS,
    Figure,
    caption_figures,
    distribution_figures,
    motion_figures,
)
from ltd.evaluation.measures import motion_vectors, outputs_of
from ltd.evaluation.protocol import spread_frames
from ltd.shapes import VideoShape

MetricName: TypeAlias = Literal[
    "fid",
    "sfid",
    "fvd",
    "kid",
    "inception_score",
    "precision_recall",
    "density_coverage",
    "clip_score",
    "warping_error",
    "motion",
]
#: Vector of the frames that are held against captions, side by side.
_SHOWN = "shown"


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Metrics of the features of one network, or of optical flow."""

    #: The network; null for ``warping_error`` and ``motion``, which read OpenCV's dense flow.
    features: FeaturesConfig | None = None
    #: What is computed.
    metrics: tuple[MetricName, ...]
    #: Put behind the metrics' names, as in ``eval/fvd_NAME``; needed where two networks share a metric.
    name: str = ""

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError(f"metrics: got none, needed some of {', '.join(get_args(MetricName))}")
        if self.name and not self.name.replace("_", "").isalnum():
            raise ConfigError(f"name: got {self.name!r}, needed letters, digits and _")
        for metric in self.metrics:
            if metric in MOTION_METRICS and self.features is not None:
                raise ConfigError(
                    f"metrics: {metric} is of optical flow and reads no network; give it a measure of its own, without "
                    "features"
                )
            if metric not in MOTION_METRICS and self.features is None:
                raise ConfigError(f"features: got null, {metric} reads a network's features; name one")

    @property
    def suffix(self) -> str:
        """What ends the names of its figures."""
        return f"_{self.name}" if self.name else ""


@dataclass(frozen=True)
class ClipSet:
    """The vectors of a set of clips, by output."""

    numbers: list[int]  #: Of the clips, ascending.
    banks: Mapping[str, FeatureBank]  #: In the order of the numbers.

    @classmethod
    def of(cls, numbers: Sequence[int], outputs: Mapping[str, Tensor]) -> ClipSet:
        """Collect vectors.

        Args:
            numbers: Of the clips, each once, in any order.
            outputs: ``(n, dim)`` by output, in the order of ``numbers``.

        Returns:
            The set.

        Raises:
            ValueError: If a number comes twice or a value is not finite.
        """
        banks = {name: FeatureBank(rows.shape[1]).update(rows, numbers) for name, rows in outputs.items()}
        return cls(sorted(numbers), banks)


@dataclass(frozen=True)
class Captions:
    """Embeddings of captions by the number of their clip."""

    numbers: list[int]
    texts: Tensor  #: ``(len(numbers), dim)``.


@dataclass(frozen=True)
class Against:
    """What a set of clips is held against."""

    #: Real clips.
    reference: ClipSet
    #: Captions of the clips, for the metrics that read them.
    captions: Captions | None = None
    #: Seed of subsets and splits.
    seed: int = 0
    #: Called every few seconds of a long computation.
    moved: Callable[[], None] = lambda: None


class Measure(Protocol):
    """A map from clips to vectors, and the metrics of sets of them."""

    config: MeasureConfig
    #: Width of each output by name.
    dims: Mapping[str, int]

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain values that its outputs depend on."""
        ...

    @property
    def network(self) -> str:
        """Name of the network, for the rows."""
        ...

    def preprocessing(self, metric: str) -> str:
        """Say what the network is shown for a metric."""
        ...

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """Map uint8 ``(b, t, h, w, 3)`` to ``(b, dims[name])`` on the CPU by name of the output."""
        ...

    def figures(self, metric: str, clips: ClipSet, against: Against) -> dict[str, Figure]:
        """Compute a metric of a set; ``ValueError`` if the set does not allow it."""
        ...


class NetworkMeasure:
    """A network of features, ready to be run, and what is computed of its outputs.

    Args:
        config: Network and metrics.
        features: The network.
        num_frames: Frames of the clips.
        field: Name of the section, for messages.

    Raises:
        ConfigError: If the network lacks an output that a metric reads.
    """

    def __init__(self, config: MeasureConfig, features: Features, num_frames: int, field: str) -> None:
        self.config, self.features = config, features
        self.outputs = outputs_of([metric for metric in config.metrics if metric in DISTRIBUTION_METRICS])
        dims = {name: features.dim if name == "features" else self._dim(name, field) for name in self.outputs}
        self._shown = min(FRAMES_SHOWN, num_frames)
        if "clip_score" in config.metrics:
            if not isinstance(features, CaptionFeatures):
                raise ConfigError(
                    f"{field}.metrics: clip_score holds frames against captions, and {features.name} has no text side; "
                    "needed a CLIP folder (features.kind: transformers)"
                )
            dims[_SHOWN] = self._shown * features.dim
        self.dims: Mapping[str, int] = dims

    def _dim(self, output: str, field: str) -> int:
        if isinstance(self.features, ManyOutputs) and output in self.features.dims:
            return self.features.dims[output]
        needing = next(m for m in self.config.metrics if m in DISTRIBUTION_METRICS and self._output(m) == output)
        raise ConfigError(f"{field}.metrics: {needing} reads {output}, which {self.features.name} does not give")

    @property
    def identity(self) -> Mapping[str, Any]:
        """Network, preprocessing and widths of the outputs."""
        return {"network": self.features.name, "preprocessing": self.features.preprocessing, "dims": self.dims}

    @property
    def network(self) -> str:
        """Name of the network."""
        return self.features.name

    def preprocessing(self, metric: str) -> str:
        """Say what the network is shown for a metric."""
        frames = f"{self._shown} frames per clip; " if metric == "clip_score" else ""
        return frames + self.features.preprocessing

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Map ``b`` captions to ``(b, dim)`` on the CPU, for a network that has a text side."""
        assert isinstance(self.features, CaptionFeatures)  # the constructor looked
        return self.features.embed_captions(captions).cpu()

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """Compute the outputs that the metrics read.

        Args:
            clips: uint8 ``(b, t, h, w, 3)``.

        Returns:
            ``(b, dim)`` on the CPU by name.
        """
        found: dict[str, Tensor] = {}
        if self.outputs == ["features"]:
            found["features"] = self.features(clips).cpu()
        elif self.outputs:
            assert isinstance(self.features, ManyOutputs)  # ``_dim`` looked
            found = {name: rows.cpu() for name, rows in self.features.outputs(clips, self.outputs).items()}
        if _SHOWN in self.dims:
            shown = spread_frames(clips, self._shown)  # (b, k, h, w, 3)
            rows = self.features(shown.flatten(0, 1)[:, None]).cpu()  # (b * k, dim)
            found[_SHOWN] = rows.unflatten(0, shown.shape[:2]).flatten(1)
        return found

    def figures(self, metric: str, clips: ClipSet, against: Against) -> dict[str, Figure]:
        """Compute a metric of a set.

        Args:
            metric: One of the config's.
            clips: The set.
            against: Real clips and, for the CLIP score, captions; clips without one are left out.

        Returns:
            Figures by name, without the suffix.
        """
        if metric == "clip_score":
            assert against.captions is not None  # evaluators that have none refuse the metric
            rows = {number: row for row, number in enumerate(clips.numbers)}
            told = [(rows[number], text) for text, number in enumerate(against.captions.numbers) if number in rows]
            frames = clips.banks[_SHOWN].features[[row for row, _ in told]].unflatten(1, (self._shown, -1))
            return caption_figures(frames, against.captions.texts[[text for _, text in told]].to(frames))
        output = self._output(metric)
        return distribution_figures(
            metric, clips.banks[output], against.reference.banks[output], seed=against.seed, moved=against.moved
        )

    @staticmethod
    def _output(metric: str) -> str:
        return DISTRIBUTION_METRICS[metric].output


class MotionMeasure:
    """Optical flow, and how clips move and flicker.

    Args:
        config: Metrics.

    Raises:
        ConfigError: If OpenCV is not installed.
    """

    def __init__(self, config: MeasureConfig) -> None:
        self.config, self.flow = config, DenseFlow()
        self.dims: Mapping[str, int] = dict.fromkeys(config.metrics, 3)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Flow, preprocessing and widths of the outputs."""
        return {"network": self.flow.name, "preprocessing": self.flow.preprocessing, "dims": self.dims}

    @property
    def network(self) -> str:
        """Name of the flow."""
        return self.flow.name

    def preprocessing(self, metric: str) -> str:
        """Say what the flow is computed of, for any metric."""
        del metric
        return self.flow.preprocessing

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """Compute the numbers of each clip.

        Args:
            clips: uint8 ``(b, t, h, w, 3)``, 2 frames of 16 x 16 pixels or more.

        Returns:
            ``(b, 3)`` float64 by metric.
        """
        return motion_vectors(clips.cpu(), self.flow, self.config.metrics)

    def figures(self, metric: str, clips: ClipSet, against: Against) -> dict[str, Figure]:
        """Compute a metric of a set.

        Args:
            metric: One of the config's.
            clips: The set.
            against: Not read: motion is of clips alone.

        Returns:
            Figures by name, without the suffix.
        """
        del against
        return motion_figures({metric: clips.banks[metric].features})


def build_measures(configs: Sequence[MeasureConfig], shape: VideoShape, device: torch.device) -> list[Measure]:
    """Load the networks and show them a clip.

    Args:
        configs: What is measured.
        shape: Size of the clips they will see.
        device: Where networks run.

    Returns:
        The measures.

    Raises:
        ConfigError: If one cannot be loaded, takes no such clip, lacks an output, or gives what is not finite.
    """
    clip = torch.arange(3 * shape.num_frames * shape.height * shape.width).remainder(251).to(torch.uint8)
    clip = clip.view(1, shape.num_frames, shape.height, shape.width, 3)
    found: list[Measure] = []
    for number, config in enumerate(configs):
        where = f"metrics.measures[{number}]"
        if config.features is None:
            found.append(_build_motion(config, clip, where))
        else:
            found.append(_build_network(config, config.features, clip, where, device))
    return found


def _build_motion(config: MeasureConfig, clip: Tensor, where: str) -> MotionMeasure:
    try:
        measure = MotionMeasure(config)
    except ConfigError as error:
        raise ConfigError(f"{where}.metrics: {config.metrics[0]} reads optical flow; {error}") from None
    try:
        measure(clip)
    except ValueError as error:
        size = VideoShape(*clip.shape[1:4])
        raise ConfigError(f"{where}.metrics: {config.metrics[0]} fails on a clip of {size}: {error}") from None
    return measure


def _build_network(
    config: MeasureConfig, features: FeaturesConfig, clip: Tensor, where: str, device: torch.device
) -> NetworkMeasure:
    try:
        measure = NetworkMeasure(config, build_features(features, device=device), clip.shape[1], where)
        outputs = measure(clip)
        texts = [measure.embed_captions(["a caption"])] if _SHOWN in measure.dims else []
    except ConfigError as error:
        message = str(error)
        inside = f"{where}." if message.startswith("features") else f"{where}.features."
        raise ConfigError(message if message.startswith(where) else inside + message) from None
    except (ValueError, RuntimeError) as error:
        size = VideoShape(*clip.shape[1:4])
        raise ConfigError(f"{where}.features: fails on a clip of {size}: {error}") from error
    for name, rows in outputs.items():
        if rows.shape != (1, measure.dims[name]):
            raise ConfigError(f"{where}.features: {name} is {tuple(rows.shape)}, needed (1, {measure.dims[name]})")
    for what, found in ((f"a clip of {VideoShape(*clip.shape[1:4])}", outputs.values()), ("a caption", texts)):
        if not all(rows.isfinite().all() for rows in found):
            raise ConfigError(
                f"{where}.features: {measure.network} gives features of {what} that are not finite; mend its weights"
            )
    return measure
