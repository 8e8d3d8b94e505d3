"""What is measured of an autoencoder and of samples, and beside which controls: rows out, no files, no networks here.

Every distance of samples from real clips stands beside the same distance of real clips from real clips at equal n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ltd.evaluation.controls import disjoint_draws, shuffle_frames
from ltd.evaluation.fidelity import PairedDistance, Psnr, Ssim
from ltd.evaluation.frechet import FeatureMoments, FrechetDistance
from ltd.evaluation.neighbours import NearestDistances, Retrieval
from ltd.evaluation.rows import MetricRow

REPEATS = 3
_SAME_CAPTIONS = "real windows of the clips that the samples' captions describe: what a perfect copy of the data scores"
_SHUFFLED = "real windows with their frames in random order: a metric that sees time puts this far above the floor"


class FeatureMap(Protocol):
    """Clips to vectors, and where the vectors come from."""

    name: str
    preprocessing: str
    dim: int

    def __call__(self, clips: Tensor) -> Tensor:
        """Map uint8 ``(b, t, h, w, 3)`` to ``(b, dim)``."""
        ...


class PairedMap(Protocol):
    """A distance between two clips, and where it comes from."""

    name: str
    preprocessing: str

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Map two ``(b, 3, t, h, w)`` in [-1, 1] to ``(b,)``."""
        ...


@dataclass(frozen=True)
class Clips:
    """Clips of one size with their captions and the source each was cut from."""

    pixels: Tensor  #: uint8 (n, t, h, w, 3)
    captions: tuple[str, ...]  #: One per clip.
    groups: tuple[str, ...]  #: Key of the shot or file; windows of one shot share it.

    def __post_init__(self) -> None:
        if not len(self.pixels) == len(self.captions) == len(self.groups):
            raise ValueError(f"{len(self.pixels)} clips, {len(self.captions)} captions, {len(self.groups)} groups")

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def is_video(self) -> bool:
        """Whether the clips have more than one frame."""
        return self.pixels.shape[1] > 1

    def take(self, indices: Sequence[int]) -> Clips:
        """Pick clips by index."""
        captions, groups = tuple(self.captions[i] for i in indices), tuple(self.groups[i] for i in indices)
        return Clips(self.pixels[list(indices)], captions, groups)


@dataclass(frozen=True)
class Reference:
    """Real training clips that samples are held against."""

    pool: Clips  #: Windows drawn from the whole training set, twice as many as the samples that are compared.
    matched: Clips | None  #: Windows of the clips that the samples' captions describe; None where none is known.


class ClipFeatures:
    """A feature map as the metrics use it: of whole clips or of single frames, computed once for each set of clips.

    Args:
        features: Feature map.
        frames: Show it this many frames of each clip, evenly spaced, one by one; None shows it whole clips.
        outputs: What is computed, in one pass: ``features`` is the map itself, other names need a map with ``outputs``.

    Raises:
        ValueError: If the map lacks an output.
    """

    def __init__(
        self, features: FeatureMap, *, frames: int | None = None, outputs: Sequence[str] = ("features",)
    ) -> None:
        self.name, self.dim, self.frames = features.name, features.dim, frames
        self.preprocessing = (
            features.preprocessing if frames is None else f"{frames} frames per clip; {features.preprocessing}"
        )
        self.map = features
        self._outputs = tuple(dict.fromkeys(outputs))
        lacking = sorted(set(self._outputs) - {"features", *getattr(features, "dims", {})})
        if lacking:
            raise ValueError(f"{features.name} has no output {lacking[0]!r}, which the metrics asked for need")
        self._known: list[tuple[Tensor, dict[str, Tensor]]] = []  # holds the clips too, so that no id is reused

    def vectors(self, clips: Tensor, output: str = "features") -> Tensor:
        """Map uint8 ``(n, t, h, w, 3)`` to ``(n, k, dim)``: a vector for each frame shown, or the clip's one."""
        for known, found in self._known:
            if known is clips:
                return found[output]
        if self.frames is None:
            found = {name: vectors[:, None] for name, vectors in self._compute(clips).items()}
        else:
            shown = spread_frames(clips, self.frames)
            flat = self._compute(shown.flatten(0, 1)[:, None])
            found = {name: vectors.unflatten(0, shown.shape[:2]) for name, vectors in flat.items()}
        self._known.append((clips, found))
        return found[output]

    def num_vectors(self, num_frames: int) -> int:
        """Count the vectors of a clip of so many frames."""
        return 1 if self.frames is None else min(self.frames, num_frames)

    def pooled(self, clips: Tensor) -> Tensor:
        """Map uint8 ``(n, t, h, w, 3)`` to ``(n, dim)``, the mean over the frames shown."""
        return self.vectors(clips).mean(dim=1)

    def _compute(self, clips: Tensor) -> dict[str, Tensor]:
        if self._outputs == ("features",):
            return {"features": self.map(clips)}
        found: dict[str, Tensor] = self.map.outputs(clips, self._outputs)  # type: ignore[attr-defined]
        return found


def autoencoder_rows(
    batches: Iterable[Tensor],
    reconstruct: Callable[[Tensor], Tensor],
    *,
    weights: str,
    perceptual: PairedMap | None = None,
    note: str = "",
) -> list[MetricRow]:
    """Measure reconstructions of held-out clips.

    Args:
        batches: uint8 ``(b, t, h, w, 3)``, any number.
        reconstruct: Pixels to the reconstruction's pixels, the same shape and type.
        weights: Which weights ``reconstruct`` uses, as "ema".
        perceptual: Distance that LPIPS is measured with; None leaves it out.
        note: What the clips are.

    Returns:
        PSNR (mean over clips, and of all pixels), SSIM and LPIPS.
    """
    psnr, similarity = Psnr(), Ssim()
    distance = None if perceptual is None else PairedDistance(perceptual)
    for pixels in batches:
        decoded = reconstruct(pixels)
        for metric in (psnr, similarity, distance):
            if metric is not None:
                metric.update(decoded, pixels)
    values = [
        ("psnr", psnr.clip_mean, "dB", psnr.preprocessing, "none"),
        ("psnr_overall", psnr.overall, "dB", "8-bit RGB; of the mean squared error over all pixels", "none"),
        ("ssim", similarity.clip_mean, "", similarity.preprocessing, "none"),
    ]
    if distance is not None and perceptual is not None:
        values.append(("lpips", distance.clip_mean, "", perceptual.preprocessing, perceptual.name))
    return [
        MetricRow(
            part="autoencoder",
            name=name,
            value=value,
            unit=unit,
            network=network,
            preprocessing=how,
            n=psnr.num_clips,
            note=note,
            weights=weights,
        )
        for name, value, unit, how, network in values
    ]


def frechet_rows(
    samples: Clips,
    reference: Reference,
    features: ClipFeatures,
    *,
    name: str,
    seed: int = 0,
    note: str = "",
) -> list[MetricRow]:
    """Measure Frechet distances of samples, of matched real clips and of shuffled real clips, beside the floor.

    The pool is split at random into two sets of ``n = len(samples)``: the reference, and the real clips of the floor.
    Values are means over three splits; the shuffled row is of the first split.

    Args:
        samples: Generated clips.
        reference: Real clips of the same size; the pool has ``2 n`` or more, ``n`` match.
        features: Feature map; of whole clips it counts clips and adds the shuffled row, of frames it counts frames.
        name: Name of the metric.
        seed: Seed of the splits and orders.
        note: What a reader must know of this metric.

    Returns:
        One to three rows.

    Raises:
        ValueError: If there are too few clips, or not as many matched ones as samples.
    """
    n = len(samples)
    if reference.matched is not None and len(reference.matched) != n:
        raise ValueError(f"{len(reference.matched)} matched windows for {n} samples: distances compare at equal n only")
    values = _frechet_values(samples, reference, features, seed=seed)
    floor = values.pop("floor")
    counted = n * features.vectors(samples.pixels).shape[1]
    small = (
        f"{counted} vectors of {features.dim} dimensions: compare at equal n only" if counted <= features.dim else ""
    )
    notes = {
        "": "; ".join(filter(None, (note, small))),
        "_real_same_captions": _SAME_CAPTIONS,
        "_shuffled_frames": _SHUFFLED,
    }
    return [
        MetricRow(
            part="samples",
            name=name + suffix,
            value=value,
            unit="",
            network=features.name,
            preprocessing=features.preprocessing,
            n=counted,
            floor=floor,
            note=notes[suffix],
        )
        for suffix, value in values.items()
    ]


def _frechet_values(samples: Clips, reference: Reference, features: ClipFeatures, *, seed: int) -> dict[str, float]:
    """Compute the distances by suffix of their names; "" is the samples', "floor" the real clips'."""

    def moments(vectors: Tensor) -> FeatureMoments:
        return FeatureMoments(features.dim).update(vectors.flatten(0, 1))  # (n, k, dim) -> (n * k, dim)

    pool = features.vectors(reference.pool.pixels)
    others = {"": moments(features.vectors(samples.pixels))}
    if reference.matched is not None:
        others["_real_same_captions"] = moments(features.vectors(reference.matched.pixels))
    found: dict[str, list[float]] = {}
    for repeat in range(REPEATS):
        held, drawn = disjoint_draws(len(pool), len(samples), seed=seed, repeat=repeat)
        distance = FrechetDistance(moments(pool[held]))
        for suffix, other in (*others.items(), ("floor", moments(pool[drawn]))):
            found.setdefault(suffix, []).append(distance.to(other).value)
        if repeat == 0 and features.frames is None:
            shuffled = shuffle_frames(reference.pool.pixels[drawn], seed=seed)
            found["_shuffled_frames"] = [distance.to(moments(features.vectors(shuffled))).value]
    return {suffix: sum(values) / len(values) for suffix, values in found.items()}


def retrieval_rows(samples: Clips, reference: Reference, features: ClipFeatures, *, name: str) -> list[MetricRow]:
    """Measure how often a sample's nearest training clip is the one its caption describes.

    Args:
        samples: Generated clips whose captions are captions of ``reference.matched``.
        reference: Real clips; the matched ones are the gallery, the pool's with the same captions show the ceiling.
        features: Feature map that spans the space.
        name: Name of the metric.

    Returns:
        One row; its floor is chance.

    Raises:
        ValueError: If there are no matched clips, fewer than two captions, or a sample with a caption of none of them.
    """
    if reference.matched is None:
        raise ValueError("retrieval needs the real clips that the samples' captions describe")
    gallery = features.pooled(reference.matched.pixels)
    found = Retrieval(gallery, reference.matched.captions)
    found.update(features.pooled(samples.pixels), samples.captions)
    known = [i for i, caption in enumerate(reference.pool.captions) if caption in set(found.labels)]
    note = f"nearest of {len(gallery)} windows of {round(1 / found.chance)} training clips; floor is chance"
    if known:
        ceiling = Retrieval(gallery, reference.matched.captions)
        real = reference.pool.take(known)
        ceiling.update(features.pooled(real.pixels), real.captions)
        note += f"; other real windows of these clips reach {ceiling.accuracy:.3f} (n = {ceiling.num_queries})"
    return [
        MetricRow(
            part="samples",
            name=name,
            value=found.accuracy,
            unit="share",
            network=features.name,
            preprocessing=features.preprocessing,
            n=found.num_queries,
            floor=found.chance,
            note=note,
        )
    ]


def nearest_rows(
    samples: Clips, reference: Reference, features: ClipFeatures, *, name: str, unit: str
) -> list[MetricRow]:
    """Measure how near samples come to training clips, beside how near training clips come to each other.

    Args:
        samples: Generated clips.
        reference: Real clips.
        features: Feature map that spans the space.
        name: Name of the metric.
        unit: Unit of its distances.

    Returns:
        One row, the median; its floor is the median over real windows of the distance to the nearest other clip.
    """
    pool = features.pooled(reference.pool.pixels)
    gallery, groups = pool, reference.pool.groups
    if reference.matched is not None:
        gallery = torch.cat((pool, features.pooled(reference.matched.pixels)))
        groups = groups + reference.matched.groups
    found, real = NearestDistances(gallery, groups), NearestDistances(gallery, groups)
    found.update(features.pooled(samples.pixels))
    real.update(pool, reference.pool.groups)
    return [
        MetricRow(
            part="samples",
            name=name,
            value=found.median,
            unit=unit,
            network=features.name,
            preprocessing=features.preprocessing,
            n=len(samples),
            floor=real.median,
            note=f"median distance to the nearest of {len(gallery)} windows of {len(set(groups))} training clips; "
            "floor: of a real window to the nearest window of another clip. Far below it is a copy of training data",
        )
    ]


def spread_frames(clips: Tensor, num_frames: int) -> Tensor:
    """Pick the middle frame of each of ``num_frames`` equal spans of ``(b, t, ...)``."""
    length = clips.shape[1]
    count = min(num_frames, length)
    return clips[:, [math.floor((i + 0.5) * length / count) for i in range(count)]]
