"""Solvers from noise (t = 1) to data (t = 0) along the straight path, step by step; the model is asked once a step.

Multistep solvers work on predictions of data, D = x_t - t v, in the half log-signal-to-noise ratio
``lambda = log((1 - t) / t)``, infinite at both ends: formulas are written so that an end costs an order for that step,
and nothing else. No solver asks the model about t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ltd.rng import DrawRandom

#: Maps (x, t) to the velocity, both in the state's dtype.
Velocity = Callable[[Tensor, float], Tensor]


class Solver(Protocol):
    """Takes the state from one time of the grid to the next."""

    def step(self, velocity: Velocity, x: Tensor, now: float, after: float) -> Tensor:
        """Go one step.

        Args:
            velocity: The model.
            x: State at ``now``, ``(b, ...)``.
            now: Time, above 0.
            after: Next time of the grid, below ``now``; 0 in the last step.

        Returns:
            State at ``after``.
        """
        ...


class Euler:
    """First order."""

    def step(self, velocity: Velocity, x: Tensor, now: float, after: float) -> Tensor:
        """Go one step; see ``Solver.step``."""
        return torch.add(x, velocity(x, now), alpha=after - now)


class Heun:
    """Second order by a second evaluation, but for the last step.

    Reference: Karras et al. (2022), arXiv 2206.00364, Alg. 1 (for the last step).
    """

    def step(self, velocity: Velocity, x: Tensor, now: float, after: float) -> Tensor:
        """Go one step; see ``Solver.step``."""
        v = velocity(x, now)
        following = x + (after - now) * v
        if after > 0:
            following = x + (after - now) / 2 * (v + velocity(following, after))
        return following


class Dpmpp2m:
    """DPM-Solver++(2M): second order from the step before; the first and the last step are of first order.

    Reference: Lu et al. (2022), arXiv 2211.01095, Alg. 2.
    """

    def __init__(self) -> None:
        self._before: tuple[float, Tensor] | None = None

    def step(self, velocity: Velocity, x: Tensor, now: float, after: float) -> Tensor:
        """Go one step; see ``Solver.step``."""
        data = x - now * velocity(x, now)
        mixed = data
        if self._before is not None and after > 0 and self._before[0] < 1:
            before, data_before = self._before
            ratio = (_lambda(now) - _lambda(before)) / (_lambda(after) - _lambda(now))
            mixed = data + (data - data_before) / (2 * ratio)
        self._before = (now, data)
        return _exponential(x, mixed, now, after)


class UniPc:
    """UniPC (bh2, data prediction): a step is predicted from the ones before, and corrected when the next is evaluated.

    Reference: Zhao et al. (2023), arXiv 2302.04867, Alg. 5-8.

    Args:
        order: Of the predictor and the corrector; lower while the history is short, and 1 in the last step.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._history: list[_Evaluated] = []
        self._start: Tensor | None = None
        self._used = 1

    def step(self, velocity: Velocity, x: Tensor, now: float, after: float) -> Tensor:
        """Go one step; see ``Solver.step``."""
        data = x - now * velocity(x, now)
        if self._start is not None:
            x = self._advance(self._start, now, self._used, data)
        self._history.append(_Evaluated(now, data))
        # What lies at an infinite distance says nothing about the curvature here.
        known = sum(1 for point in self._history[:-1] if point.time < 1)
        self._used = 1 if after == 0 else min(self.order, 1 + known)
        self._history = self._history[-self.order :]
        self._start = x
        return self._advance(x, after, self._used, None)

    def _advance(self, x: Tensor, after: float, order: int, found: Tensor | None) -> Tensor:
        """Go from the last point of the history to a time; with its prediction of data there, correct."""
        last = self._history[-1]
        plain = _exponential(x, last.data, last.time, after)
        step = _lambda(after) - _lambda(last.time)
        points = [point for point in reversed(self._history[:-1]) if point.time < 1][: order - 1]
        ratios = [(_lambda(point.time) - _lambda(last.time)) / step for point in points]
        slopes = [(point.data - last.data) / ratio for point, ratio in zip(points, ratios, strict=True)]
        if found is not None:
            ratios, slopes = [*ratios, 1.0], [*slopes, found - last.data]
        if not slopes:
            return plain
        weights = _weights(ratios, -step, lone=not points or (found is None and len(points) == 1))
        scale = -(1 - after) * math.expm1(-step)
        return plain + scale * sum((w * s for w, s in zip(weights, slopes, strict=True)), torch.zeros_like(x))


class EulerMaruyama:
    """The reverse SDE whose marginals are the ODE's, with diffusion w(t) = strength * t; its last step is its mean.

    dx = v dt + w / 2 * eps / t dt + sqrt(w) dW for dt < 0 on the straight path, whose score is -eps / t: the strength 0
    is Euler's method.

    Reference: Ma et al. (2024), SiT, arXiv 2401.08740, Eq. 8 and Table 2 (w = sigma).

    Args:
        strength: Of the noise, 0 or more.
        random: Random numbers of the batch's samples; streams "sde-0", "sde-1", ...
    """

    def __init__(self, strength: float, random: DrawRandom) -> None:
        self.strength, self.random = strength, random
        self._count = 0

    def step(self, velocity: Velocity, x: Tensor, now: float, after: float) -> Tensor:
        """Go one step; see ``Solver.step``."""
        v = velocity(x, now)
        eps = x + (1 - now) * v
        span = now - after
        following = x - span * (v + 0.5 * self.strength * eps)
        if after > 0:
            fresh = self.random.normal(x.shape[1:], f"sde-{self._count}").to(x)
            following = following + math.sqrt(self.strength * now * span) * fresh
        self._count += 1
        return following


@dataclass(frozen=True)
class _Evaluated:
    """A prediction of data at a time."""

    time: float
    data: Tensor


def _lambda(t: float) -> float:
    """Half the log-signal-to-noise ratio."""
    if t <= 0:
        return math.inf
    return -math.inf if t >= 1 else math.log((1 - t) / t)


def _exponential(x: Tensor, data: Tensor, now: float, after: float) -> Tensor:
    """Solve the linear part exactly, with one prediction of data for the whole step."""
    return after / now * x + (1 - after / now) * data


def _weights(ratios: list[float], negative_step: float, *, lone: bool) -> list[float]:
    """Solve for the weights of the slopes that make the step exact for polynomials (bh2)."""
    if lone and len(ratios) == 1:
        return [0.5]
    basis = math.expm1(negative_step)
    phi, factorial = basis / negative_step - 1, 1
    rows, right = [], []
    for power in range(1, len(ratios) + 1):
        factorial *= power
        rows.append([ratio ** (power - 1) for ratio in ratios])
        right.append(phi * factorial / basis)
        phi = phi / negative_step - 1 / (factorial * (power + 1))
    matrix = torch.tensor(rows, dtype=torch.float64)
    solved: list[float] = torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64)).tolist()
    return solved
