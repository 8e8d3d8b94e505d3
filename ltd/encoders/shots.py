"""Shots of a film by TransNetV2: small frames in, spans of frames out. Knows no files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ltd.config import ConfigError
from ltd.encoders.package_files import load_frozen
from ltd.encoders.packaged import TRANSNETV2
from ltd.encoders.transnet import TransNetV2

_WINDOW, _STEP = 100, 50  # frames of a pass, and those in its middle whose result counts
_MARGIN = (_WINDOW - _STEP) // 2


class TransNetShots:
    """Finds cuts and gradual transitions; the frames of a transition belong to no shot.

    Args:
        threshold: Probability above which a frame belongs to a transition, more than 0 and less than 1.
        device: Where the network runs.

    Raises:
        ConfigError: If the package that ships the weights is not installed, or the device is none that is here.
    """

    size = (27, 48)

    def __init__(self, *, threshold: float = 0.5, device: torch.device | str = "cpu") -> None:
        if not 0 < threshold < 1:
            raise ConfigError(f"shot_threshold: got {threshold}, needed more than 0 and less than 1 for transnet")
        with torch.device("meta"):
            network = TransNetV2()
        load_frozen(network, TRANSNETV2.read())
        try:
            self.network, self.device = network.to(device), device
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device: got {device!r}: {str(error).splitlines()[0]}") from error
        self.threshold = threshold
        self.name = f"TransNetV2 ({TRANSNETV2.requirement}), threshold {threshold:g}"

    def __call__(self, frames: Iterable[np.ndarray]) -> list[tuple[int, int]]:
        """Find the shots of a film.

        Args:
            frames: uint8 ``(27, 48, 3)``, RGB.

        Returns:
            First frame and frame after the last of each shot.
        """
        return spans_between(self.probabilities(frames), self.threshold)

    @torch.no_grad()
    def probabilities(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """Compute how probable a cut is after each frame; a film of any length takes the memory of one pass.

        Args:
            frames: uint8 ``(27, 48, 3)``, RGB.

        Returns:
            float32 ``(t,)``.
        """
        found, count = [], 0
        for window, new in _windows(frames):
            inputs = torch.from_numpy(window)[None].to(self.device)
            found.append(self.network(inputs)[0, _MARGIN : _MARGIN + _STEP].cpu().numpy())
            count += new
        return np.concatenate(found)[:count] if found else np.zeros(0, dtype=np.float32)


def _windows(frames: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield windows of 100 frames, 50 apart, and how many of each one's middle 50 lie in the film.

    Before its beginning and after its end the first and the last frame stand still.
    """
    source = iter(frames)
    first = next(source, None)
    if first is None:
        return
    held = [first] * (_MARGIN + 1)  # the margin and the first frame itself
    ended = False
    while True:
        held += itertools.islice(source, _WINDOW - len(held))
        real = len(held) - _MARGIN
        ended = ended or len(held) < _WINDOW
        window = held + [held[-1]] * (_WINDOW - len(held))
        yield np.stack(window), min(_STEP, real)
        if ended and real <= _STEP:
            return
        held = held[_STEP:]


def spans_between(probabilities: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Find the stretches between transitions.

    Args:
        probabilities: ``(t,)``, how probable a cut is after each frame.
        threshold: Probability above which a frame belongs to a transition.

    Returns:
        First frame and frame after the last of each shot: the first frame of a transition still belongs to the shot
        before it, as it is the last one before a hard cut.
    """
    spans, start, inside = [], 0, False
    for number, probability in enumerate(probabilities):
        cut = bool(probability > threshold)
        if inside and not cut:
            start = number
        elif cut and not inside:
            spans.append((start, number + 1))
        inside = cut
    if len(probabilities) and not inside:
        spans.append((start, len(probabilities)))
    return spans
