"""Curves as inline SVG: ticks, downsampling that keeps spikes, smoothing. Knows numbers and labels only."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Point = tuple[float, float]

#: Drawing size and the plot's box in it, in SVG units: left, top, width, height.
SIZE = (560, 250)
BOX = (58, 10, 488, 204)
#: Points drawn of one curve at most; more are thinned by keeping each bucket's extremes.
MAX_POINTS = 600
#: A positive curve that spans more than this ratio is drawn on a logarithmic axis.
LOG_RATIO = 25.0
#: A curve is noisy from this many points on, if it goes up and down this many times its range in all; it is then drawn
#: faintly, with a smoothed line on top.
NOISY_POINTS = 60
NOISY_TRAVEL = 4.0


@dataclass(frozen=True)
class Series:
    """One curve: its points by step, the palette's colour number, and whether it is dashed."""

    label: str
    points: Sequence[Point]
    color: int = 0
    dashed: bool = False

    @property
    def finite(self) -> list[Point]:
        """The points that can be drawn."""
        return [point for point in self.points if math.isfinite(point[1])]


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    title: str
    series: Sequence[Series]
    #: Steps at which something begins: an upright line each.
    marks: Sequence[float] = ()


@dataclass(frozen=True)
class Scale:
    """One axis: values between ``low`` and ``high``, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Place a value: 0 at ``low``, 1 at ``high``."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Choose round values along the axis, four to eight of them where the range allows."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def value_scale(values: Sequence[float]) -> Scale:
    """Choose the vertical axis of some finite values.

    Args:
        values: At least one.

    Returns:
        A scale a little wider than the values; logarithmic where all are positive and span a factor of 25.
    """
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_RATIO:
        return Scale(low / 1.15, high * 1.15, log=True)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    bottom = low - margin
    if low >= 0 and (bottom < 0 or low < 0.3 * high):
        bottom = 0.0
    return Scale(bottom, high + margin)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Leave at most ``limit`` points, keeping the lowest and the highest of each bucket so that spikes stay.

    Args:
        points: In order of step.
        limit: Even number of points to keep.

    Returns:
        A subset, in order.
    """
    if len(points) <= limit:
        return list(points)
    buckets = limit // 2
    kept: list[Point] = []
    for index in range(buckets):
        bucket = range(index * len(points) // buckets, (index + 1) * len(points) // buckets)
        extremes = {min(bucket, key=lambda i: points[i][1]), max(bucket, key=lambda i: points[i][1])}
        kept.extend(points[i] for i in sorted(extremes))
    return kept


def average(points: Sequence[Point], limit: int = MAX_POINTS // 2) -> list[Point]:
    """Leave at most ``limit`` points, each the mean of its bucket: what the page's script smooths.

    Args:
        points: In order of step.
        limit: Points to keep.

    Returns:
        Means, in order; the points themselves where there are no more than ``limit``.
    """
    if len(points) <= limit:
        return list(points)
    bounds = [index * len(points) // limit for index in range(limit + 1)]
    return [
        (sum(x for x, _ in points[a:b]) / (b - a), sum(y for _, y in points[a:b]) / (b - a))
        for a, b in itertools.pairwise(bounds)
    ]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Average exponentially over a fiftieth of the curve, without the pull of a start at zero.

    Args:
        points: In order of step.

    Returns:
        As many points, at the same steps.
    """
    decay = 1.0 - 1.0 / max(2.0, len(points) / 50)
    total, weight = 0.0, 0.0
    out: list[Point] = []
    for x, y in points:
        total, weight = decay * total + y, decay * weight + 1.0
        out.append((x, total / weight))
    return out


def is_noisy(points: Sequence[Point]) -> bool:
    """Tell a curve that needs smoothing to be read from one that is smooth, such as a schedule."""
    if len(points) < NOISY_POINTS:
        return False
    values = [y for _, y in points]
    travel = sum(abs(after - before) for before, after in itertools.pairwise(values))
    return travel > NOISY_TRAVEL * (max(values) - min(values))


def number(value: float) -> str:
    """Write a number for a reader: four significant digits, powers of ten only where they are shorter."""
    if not math.isfinite(value):
        return str(value)
    text = f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else text


def draw(chart: Chart) -> str:
    """Draw a chart.

    Args:
        chart: Curves; those without a finite point are named in the legend only.

    Returns:
        A ``<figure>`` with an inline ``<svg>`` and, in ``data-chart``, what the page's script needs for the pointer.
    """
    drawn = [series for series in chart.series if series.finite]
    legend = "".join(_legend(series) for series in chart.series)
    title = escape(chart.title)
    if not drawn:
        return f'<figure class="chart"><figcaption>{title}</figcaption><div class="legend">{legend}</div></figure>'
    steps = [x for series in drawn for x in (series.finite[0][0], series.finite[-1][0])]
    x_scale = Scale(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1.0)
    y_scale = value_scale([y for series in drawn for _, y in series.finite])
    kind = f' <span class="note kind">{"(logarithmic)" if y_scale.log else ""}</span>'
    marks = [mark for mark in chart.marks if x_scale.low <= mark <= x_scale.high]
    lines = _marks(marks, x_scale) + "".join(_curve(series, x_scale, y_scale) for series in drawn)
    data = {
        "box": BOX,
        "x": [x_scale.low, x_scale.high],
        "y": [y_scale.low, y_scale.high],
        "log": y_scale.log,
        "marks": marks,
        "series": [_plain(series) for series in drawn],
    }
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(data, separators=(",", ":")), quote=True)}">'
        f"<figcaption>{title}{kind}</figcaption>"
        f'<svg viewBox="0 0 {SIZE[0]} {SIZE[1]}" role="img" aria-label="{escape(chart.title, quote=True)}">'
        f'<g class="plot">{_axes(x_scale, y_scale)}{lines}</g>'
        f'<g class="pointer"></g></svg><div class="legend">{legend}</div></figure>'
    )


def _plain(series: Series) -> dict[str, Any]:
    """Collect what the page's script draws and shows of a curve; means only where they are not the points."""
    points, means = series.finite, average(series.finite)
    return {
        "label": series.label,
        "color": series.color,
        "dashed": series.dashed,
        "noisy": is_noisy(points),
        "points": _rounded(thin(points)),
        **({"means": _rounded(means)} if len(means) < len(points) else {}),
    }


def _rounded(points: Sequence[Point]) -> list[Point]:
    return [(round(x, 1) if x % 1 else int(x), float(f"{y:.5g}")) for x, y in points]


def _marks(steps: Sequence[float], x_scale: Scale) -> str:
    left, top, width, height = BOX
    places = [f"{left + width * x_scale.place(step):.1f}" for step in steps]
    return "".join(f'<line class="mark" x1="{x}" x2="{x}" y1="{top}" y2="{top + height}"/>' for x in places)


def _linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= 8:
            return inside
    return inside[:: math.ceil(len(inside) / 8)]


def _axes(x_scale: Scale, y_scale: Scale) -> str:
    left, top, width, height = BOX
    parts = []
    for tick in y_scale.ticks():
        y = top + height * (1 - y_scale.place(tick))
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_scale.ticks():
        if tick == int(tick):
            x = left + width * x_scale.place(tick)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{top + height + 15}" text-anchor="middle">{tick:,.0f}</text>'
            )
    parts.append(f'<line class="axis" x1="{left}" x2="{left + width}" y1="{top + height}" y2="{top + height}"/>')
    middle, below = left + width / 2, top + height + 31
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{below}" text-anchor="middle">step</text>')
    return "".join(parts)


def _curve(series: Series, x_scale: Scale, y_scale: Scale) -> str:
    points = series.finite
    style = f'class="line c{series.color % 8}"' + (' stroke-dasharray="5 3"' if series.dashed else "")
    if len(points) == 1:
        x, y = _coordinates(points[0], x_scale, y_scale)
        return f'<circle class="dot c{series.color % 8}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    if not is_noisy(points):
        return f'<path {style} d="{_path(thin(points), x_scale, y_scale)}"/>'
    faint = f'<path class="line faint c{series.color % 8}" d="{_path(thin(points), x_scale, y_scale)}"/>'
    return faint + f'<path {style} d="{_path(thin(smooth(points)), x_scale, y_scale)}"/>'


def _coordinates(point: Point, x_scale: Scale, y_scale: Scale) -> Point:
    left, top, width, height = BOX
    return left + width * x_scale.place(point[0]), top + height * (1 - y_scale.place(point[1]))


def _path(points: Sequence[Point], x_scale: Scale, y_scale: Scale) -> str:
    placed = (_coordinates(point, x_scale, y_scale) for point in points)
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)


def _legend(series: Series) -> str:
    finite = series.finite
    lost = len(series.points) - len(finite)
    last = f"last {number(finite[-1][1])}" if finite else "no finite value"
    if len(finite) > 1:
        last = f"first {number(finite[0][1])}, {last}, min {number(min(y for _, y in finite))}"
    broken = f' <b class="bad">{lost} not finite</b>' if lost else ""
    dash = " dashed" if series.dashed else ""
    return (
        f'<span class="key" data-color="{series.color}"><i class="swatch c{series.color % 8}{dash}"></i>'
        f"{escape(series.label)}"
        f' <span class="note">{last}</span>{broken}</span>'
    )
