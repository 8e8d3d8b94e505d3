"""Shots of a film: a detector's spans of frames, and how they become rows. Detectors are callables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.cut import scaled
from ltd.data.frames import FrameReader
from ltd.data.manifest import Row

Span = tuple[int, int]


class ShotDetector(Protocol):
    """Finds the shots of one video."""

    #: What decides its spans: method, version, thresholds.
    name: str
    #: What the frames are scaled to: (height, width), or the short side of larger ones.
    size: tuple[int, int] | int

    def __call__(self, frames: Iterable[np.ndarray]) -> list[Span]:
        """Find shots in uint8 ``(h, w, 3)`` RGB frames.

        Spans (first frame, the one after the last) are in order and do not overlap; transitions belong to none.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ShotOptions:
    """How long shots may be."""

    min_shot_s: float = 0.5  #: Shorter shots are left out, seconds, >= 0.
    max_shot_s: float | None = None  #: Longer shots are split evenly, seconds, > 0; None keeps them whole.

    def __post_init__(self) -> None:
        if not 0 <= self.min_shot_s < math.inf:
            raise ConfigError(f"min_shot_s: got {self.min_shot_s}, needed 0 or more seconds")
        if self.max_shot_s is not None and not 0 < self.max_shot_s < math.inf:
            raise ConfigError(f"max_shot_s: got {self.max_shot_s}, needed more than 0 seconds")
        if self.max_shot_s is not None and self.max_shot_s < 2 * self.min_shot_s:
            raise ConfigError(
                f"max_shot_s: got {self.max_shot_s}, needed at least twice min_shot_s = {self.min_shot_s}, or the "
                "halves of a shot would be too short"
            )


@dataclass(frozen=True)
class Detection:
    """The shots of one video."""

    spans: tuple[Span, ...]  #: Frames of each shot, in order.
    frames: int  #: Frames of the video.
    fps: float  #: Frames per second, > 0.


class ContentShots:
    """PySceneDetect's adaptive detector: a frame differs from the last far more than its neighbours do.

    Args:
        threshold: How many times more, > 0.

    Raises:
        ConfigError: If PySceneDetect is not installed.
    """

    size = 144

    def __init__(self, *, threshold: float = 3.0) -> None:
        if not 0 < threshold < math.inf:
            raise ConfigError(f"shot_threshold: got {threshold}, needed more than 0")
        try:
            import scenedetect
        except ImportError as error:
            raise ConfigError(
                f"shots: content needs PySceneDetect, which cannot be used here: {error}; pip install 'ltd[curate]'"
            ) from error
        self.threshold = threshold
        self.name = f"PySceneDetect {scenedetect.__version__} AdaptiveDetector, threshold {threshold:g}"

    def __call__(self, frames: Iterable[np.ndarray]) -> list[Span]:
        """Find the shots of a film.

        Args:
            frames: uint8 ``(h, w, 3)``, RGB.

        Returns:
            First frame and frame after the last of each shot.
        """
        from scenedetect import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector

        # Every cut is reported, also those around a flash: how short a shot may be is ShotOptions' business.
        detector = AdaptiveDetector(adaptive_threshold=self.threshold, min_scene_len=1)
        cuts, count, time = [0], 0, None
        for frame in frames:
            # The rate only turns frame numbers into times and back.
            time = FrameTimecode(count, 25.0)
            found = detector.process_frame(time, np.ascontiguousarray(frame[..., ::-1]))
            cuts += [cut.frame_num for cut in found]
            count += 1
        if time is not None:
            cuts += [cut.frame_num for cut in detector.post_process(time)]
        ends = sorted({*cuts, count})
        return list(itertools.pairwise(ends))


def detect_shots(path: Path, detector: ShotDetector, *, threads: int = 0) -> Detection:
    """Decode a video once, small, and find its shots.

    Args:
        path: The video.
        detector: Finds them.
        threads: Decoder threads; 0 lets the decoder choose.

    Returns:
        Its shots in frames of the video.

    Raises:
        BadSampleError: If it cannot be decoded or tells no frame rate.
    """
    with FrameReader(str(path), threads=threads) as reader:
        if reader.fps <= 0:
            raise BadSampleError("no_fps", f"{path.name} tells no frame rate, so the length of a shot is not known")
        numbers: list[int] = []
        spans = detector(_small_frames(reader, detector.size, numbers))
        if not numbers:
            raise BadSampleError("undecodable", "no frame decodes")
        # Frames that a damaged file has lost were not counted by the detector.
        found = tuple((numbers[start], numbers[stop - 1] + 1) for start, stop in spans)
        return Detection(found, len(reader), reader.fps)


def _small_frames(reader: FrameReader, size: tuple[int, int] | int, numbers: list[int]) -> Iterator[np.ndarray]:
    from av.video.reformatter import Interpolation, VideoReformatter

    reformatter = VideoReformatter()
    if isinstance(size, int):
        width, height = scaled(reader.width, reader.height, size, even=True)
    else:
        height, width = size
    for number, frame in reader.frames(0, len(reader)):
        numbers.append(number)
        small: Any = reformatter.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC)
        yield small.to_ndarray()


def shot_rows(row: Row, detection: Detection, options: ShotOptions) -> tuple[list[Row], int]:
    """Make a row per shot of a whole video.

    Args:
        row: The video.
        detection: Its shots.
        options: How long they may be.

    Returns:
        The rows, and how many shots were too short. A video of one shot stays whole.
    """
    fps, spans, short = detection.fps, [], 0
    for start, stop in detection.spans:
        if stop - start < options.min_shot_s * fps:
            short += 1
            continue
        parts = 1
        if options.max_shot_s is not None:
            parts = max(1, math.ceil((stop - start) / (options.max_shot_s * fps)))
        edges = [start + (stop - start) * part // parts for part in range(parts + 1)]
        spans += [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    if spans == [(0, detection.frames)]:
        return [row], short
    return [replace(row, shot=number, span=span) for number, span in enumerate(spans)], short
