"""Five artefacts of autoencoders, each as one number with a threshold: colour shift, grid, blur, corner and droplet.

Every diagnostic accumulates over batches and merges over processes. Its threshold is set so that it fires on a planted
artefact (see the tests for strengths) and stays silent on clean frames, on noise of 30 dB and on rounding to 8 bits;
for a figure to trust, give it some tens of frames. Pixels are counted in 8-bit levels (one level is 2 / 255 of
[-1, 1]), and a reconstruction is clamped to [-1, 1] first, as it would be shown. Knows no autoencoder.

Reference: Novitskiy et al., VIVAT (2025), arXiv 2506.07863 (the artefacts and their causes; the measures are ours).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ltd.evaluation.latent_health import DROPLET_DOMINANCE, RADIAL_BINS, droplets, power_spectrum, radial_spectrum

#: Variance of rounding to 8 bits, in squared levels: errors and spectra below it cannot be shown, so ratios start here.
ROUNDING = 1 / 12

_NOTHING = "{}: nothing was counted yet: update or merge first"
_LEVELS = 127.5
_PERIODS = (2, 4, 8, 16)
_SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Finding:
    """One diagnostic's value beside the threshold above which it fires; a value that is not a number fires too."""

    name: str
    value: float
    threshold: float

    @property
    def fires(self) -> bool:
        """Tell whether the artefact was found."""
        return not self.value <= self.threshold

    def __str__(self) -> str:
        rule = f"FIRES above {self.threshold:g}" if self.fires else f"fires above {self.threshold:g}"
        return f"{self.name}: {self.value:.3g} ({rule})"


class Diagnostic(ABC):
    """Sums over batches and processes from which one figure is computed; subclasses say which."""

    #: Name in reports.
    name: ClassVar[str]
    #: Key of the figure in ``values``: the name with its unit.
    key: ClassVar[str]
    #: The diagnostic fires above this.
    threshold: ClassVar[float]

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @property
    @abstractmethod
    def value(self) -> float:
        """The figure; ``ValueError`` when nothing was counted."""

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing was counted yet."""
        return not self._sums

    def values(self) -> dict[str, float]:
        """Give the figure, and what it was made of, by name."""
        return {self.key: self.value}

    def finding(self) -> Finding:
        """Hold the figure against the threshold."""
        return Finding(self.name, self.value, self.threshold)

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: plain numbers."""
        return {name: total.tolist() for name, total in self._sums.items()}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has counted.

        Args:
            state: Its ``state()``.

        Raises:
            ValueError: If it counted other channels.
        """
        self._add(**{name: torch.tensor(total, dtype=torch.float64) for name, total in state.items()})

    def _add(self, **totals: Tensor) -> None:
        for name, total in totals.items():
            total, known = total.detach().double().cpu(), self._sums.get(name)
            if known is not None and known.shape != total.shape:
                raise ValueError(f"{self.name}: got {name} {tuple(total.shape)} after {tuple(known.shape)}")
            self._sums[name] = total if known is None else known + total

    def _sum(self, name: str) -> Tensor:
        if name not in self._sums:
            raise ValueError(_NOTHING.format(self.name))
        return self._sums[name]


class ColorShift(Diagnostic):
    """Colour shift: the largest absolute mean error of a channel, in 8-bit levels."""

    name = "color shift"
    key = "color_shift_levels"
    threshold = 2.0

    def update(self, reconstruction: Tensor, video: Tensor) -> None:
        """Count a batch.

        Args:
            reconstruction: ``(b, c, t, h, w)`` in [-1, 1].
            video: What it should be, the same shape.

        Raises:
            ValueError: If the shapes differ or frames are smaller than 32 pixels.
        """
        errors = _errors(reconstruction, video)
        self._add(errors=errors.sum((0, 2, 3, 4)), counts=torch.tensor(errors[:, 0].numel()))

    @property
    def channels(self) -> Tensor:
        """Mean of reconstruction minus video per channel, ``(c,)`` 8-bit levels: positive where it is too bright."""
        return self._sum("errors") / self._sum("counts")

    @property
    def value(self) -> float:
        """Largest absolute mean error of a channel, in 8-bit levels."""
        return float(self.channels.abs().max())


class Grid(Diagnostic):
    """Grid: how much the error's spectrum stands out at multiples of 1/2, 1/4, 1/8 and 1/16 cycles per pixel.

    Both coordinates of such a frequency are multiples of ``1 / p``; it belongs to its smallest ``p``. Its power is held
    against the 16 frequencies two bins away, which the window keeps apart from it, each plus the power of rounding. The
    figure is the mean ratio over the frequencies of the worst period: about 1 where there is no grid. A period counts
    for frames with sides of at least 4 periods.
    """

    name = "grid"
    key = "grid_ratio"
    threshold = 5.0

    def update(self, reconstruction: Tensor, video: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            reconstruction: ``(b, c, t, h, w)`` in [-1, 1].
            video: What it should be, the same shape; None for a decode of constant latents, which should be flat.

        Raises:
            ValueError: If the shapes differ or frames are smaller than 32 pixels.
        """
        errors = _errors(reconstruction, video)
        height, width = errors.shape[3:]
        finest = max(period for period in _PERIODS if min(height, width) >= 4 * period)
        height, width = height - height % finest, width - width % finest
        rows = torch.arange(finest, device=errors.device)[:, None] * (height // finest)
        columns = torch.arange(finest, device=errors.device)[None] * (width // finest)
        ring = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if max(abs(y), abs(x)) == 2]
        points = torch.zeros(_PERIODS[-1], _PERIODS[-1], dtype=torch.float64)
        around, counts = points.clone(), points.clone()
        slots = slice(None, None, _PERIODS[-1] // finest)
        for frame in _frames(errors[..., :height, :width]):
            power = power_spectrum(frame).sum(0)  # (h, w)
            points[slots, slots] += power[rows, columns].cpu()
            near = sum(power[(rows + y) % height, (columns + x) % width] for y, x in ring)
            around[slots, slots] += torch.as_tensor(near).cpu() / len(ring)
            counts[slots, slots] += len(frame)
        self._add(points=points, around=around, counts=counts)

    @property
    def periods(self) -> dict[int, float]:
        """Mean ratio by period in pixels, of the periods that were measured."""
        points, around, counts = self._sum("points"), self._sum("around"), self._sum("counts")
        ratios = (points / counts + ROUNDING) / (around / counts + ROUNDING)
        own = torch.tensor([_PERIODS[-1] // math.gcd(index, _PERIODS[-1]) for index in range(_PERIODS[-1])])
        period = torch.maximum(own[:, None], own[None])  # (16, 16); 1 at zero frequency
        return {p: float(ratios[period == p].mean()) for p in _PERIODS if counts[period == p].min() > 0}

    @property
    def value(self) -> float:
        """Mean ratio of the worst period."""
        return float(torch.tensor(list(self.periods.values()), dtype=torch.float64).max())

    def values(self) -> dict[str, float]:
        """Give the figure, and the ratio of each period."""
        return super().values() | {f"{self.key}_{period}": ratio for period, ratio in self.periods.items()}


class Blur(Diagnostic):
    """Blur: share of the video's energy that the reconstruction lacks above a quarter of the Nyquist frequency.

    One minus the mean, over the radial bins there, of the ratio of the two radially averaged spectra, each plus the
    power of rounding and the ratio at most 1. Noise in a reconstruction can hide its blur.
    """

    name = "blur"
    key = "blur_share"
    threshold = 0.5

    def update(self, reconstruction: Tensor, video: Tensor) -> None:
        """Count a batch, as ``ColorShift.update``."""
        _check(reconstruction, video)
        for name, frames in (("blurred", reconstruction), ("sharp", video)):
            for frame in _frames(_levels(frames)):
                power, _, counts = radial_spectrum(frame)
                self._add(**{name: power.sum(0)})
                if name == "sharp":
                    self._add(counts=counts * len(frame))

    @property
    def ratios(self) -> Tensor:
        """Spectrum of the reconstruction over the video's, ``(RADIAL_BINS,)``; NaN where a bin holds no frequency."""
        blurred, sharp, counts = self._sum("blurred"), self._sum("sharp"), self._sum("counts")
        return (blurred + ROUNDING * counts) / (sharp + ROUNDING * counts)

    @property
    def value(self) -> float:
        """Share of energy lost at high frequencies, 0 (none) to 1 (all)."""
        high = self.ratios[RADIAL_BINS // 4 :][self._sum("counts")[RADIAL_BINS // 4 :] > 0]
        return float(1 - high.clamp(max=1).mean())


class Corner(Diagnostic):
    """Corner: mean squared error of the worst corner, over that of the centre, each plus that of rounding.

    A corner is 16 x 16 pixels (a quarter of the shorter side if that is less); the centre is what lies as far from
    every edge.
    """

    name = "corner"
    key = "corner_ratio"
    threshold = 4.0

    def update(self, reconstruction: Tensor, video: Tensor) -> None:
        """Count a batch, as ``ColorShift.update``."""
        squares = _errors(reconstruction, video).square().sum((0, 1, 2))  # (h, w)
        frames = reconstruction.shape[:3].numel()
        side = min(16, min(squares.shape) // 4)
        first, last, inner = slice(None, side), slice(-side, None), slice(side, -side)
        corners = [squares[y, x].sum() for y in (first, last) for x in (first, last)]
        centre = squares[inner, inner]
        self._add(
            corners=torch.stack(corners),
            corner_counts=torch.tensor(frames * side * side),
            centre=centre.sum(),
            centre_counts=torch.tensor(frames * centre.numel()),
        )

    @property
    def corners(self) -> Tensor:
        """Ratio of each corner: top left, top right, bottom left, bottom right, ``(4,)``."""
        centre = self._sum("centre") / self._sum("centre_counts")
        return (self._sum("corners") / self._sum("corner_counts") + ROUNDING) / (centre + ROUNDING)

    @property
    def value(self) -> float:
        """Ratio of the worst corner."""
        return float(self.corners.max())


class Droplet(Diagnostic):
    """Droplet: share of channel maps of which few positions hold the variance, in the worst layer.

    That is, positions beyond 10 standard deviations hold more than half of it, so that they decide what a normalisation
    makes of the map. Their number alone tells little: edges reach 10 standard deviations in healthy features, too.

    Reference: Karras et al., StyleGAN2 (2019), arXiv 1912.04958, Sec. 2 (normalisation makes a network hide strength in
    small spikes).
    """

    name = "droplet"
    key = "droplet_share"
    threshold = 0.1

    def update(self, activations: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
        """Count activations, such as ``ActivationProbe.take()`` or ``{"latents": latents}``.

        Args:
            activations: Tensors ``(b, c, h, w)`` or ``(b, c, t, h, w)``, one or several for each layer's name.

        Raises:
            ValueError: As ``droplets``, naming the layer.
        """
        for layer, tensors in activations.items():
            for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
                try:
                    positions, shares = droplets(tensor)
                except ValueError as error:
                    raise ValueError(f"layer {layer}: {error}") from None
                dominated = ~(shares <= DROPLET_DOMINANCE)  # a NaN counts
                self._add(**{layer: torch.tensor([dominated.sum(), positions.sum(), positions.numel()])})

    @property
    def layers(self) -> dict[str, float]:
        """Share of maps with a droplet, by layer."""
        return {layer: float(total[0] / total[2]) for layer, total in self._sums.items()}

    @property
    def value(self) -> float:
        """Share of maps with a droplet in the worst layer."""
        if self.is_empty:
            raise ValueError(_NOTHING.format(self.name))
        return max(self.layers.values())

    def values(self) -> dict[str, float]:
        """Give the figure, and the number of positions beyond 10 standard deviations per map in the worst layer."""
        figures = super().values()
        return figures | {"droplet_positions": max(float(total[1] / total[2]) for total in self._sums.values())}


class Artifacts:
    """All five diagnostics over one set of reconstructions; the droplet only where activations are given."""

    def __init__(self) -> None:
        self.color_shift, self.grid, self.blur = ColorShift(), Grid(), Blur()
        self.corner, self.droplet = Corner(), Droplet()

    def update(
        self,
        reconstruction: Tensor,
        video: Tensor,
        activations: Mapping[str, Tensor | Sequence[Tensor]] | None = None,
    ) -> None:
        """Count a batch.

        Args:
            reconstruction: ``(b, c, t, h, w)`` in [-1, 1].
            video: What it should be, the same shape.
            activations: See ``Droplet.update``.

        Raises:
            ValueError: If the shapes differ, frames are smaller than 32 pixels, or activations do not fit.
        """
        for part in (self.color_shift, self.grid, self.blur, self.corner):
            part.update(reconstruction, video)
        self.droplet.update(activations or {})

    def values(self) -> dict[str, float]:
        """Give every figure that was counted, by name."""
        return {key: value for part in self._counted() for key, value in part.values().items()}

    def findings(self) -> list[Finding]:
        """Hold every figure that was counted against its threshold."""
        return [part.finding() for part in self._counted()]

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: plain numbers."""
        return {part.name: part.state() for part in self._parts()}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has counted, given as its ``state()``."""
        for part in self._parts():
            part.merge(state[part.name])

    def _parts(self) -> tuple[Diagnostic, ...]:
        return self.color_shift, self.grid, self.blur, self.corner, self.droplet

    def _counted(self) -> list[Diagnostic]:
        return [part for part in self._parts() if not part.is_empty]


def _levels(frames: Tensor) -> Tensor:
    return frames.detach().double().clamp(-1, 1) * _LEVELS


def _errors(reconstruction: Tensor, video: Tensor | None) -> Tensor:
    _check(reconstruction, video)
    return _levels(reconstruction) if video is None else _levels(reconstruction) - _levels(video)


def _frames(clips: Tensor) -> Iterator[Tensor]:
    for clip in clips:
        yield from clip.unbind(1)  # (c, h, w)


def _check(reconstruction: Tensor, video: Tensor | None) -> None:
    shape = tuple(reconstruction.shape)
    if len(shape) != 5 or min(shape[3:]) < _SMALLEST_SIDE or 0 in shape:
        raise ValueError(f"got frames {shape}, needed (b, c, t, h, w) of {_SMALLEST_SIDE} x {_SMALLEST_SIDE} or more")
    if video is not None and shape != tuple(video.shape):
        raise ValueError(f"reconstruction and video differ in shape: {shape} and {tuple(video.shape)}")
