"""Solvers from noise (t = 1) to data (t = 0) along a path, step by step; the model is asked once a step.

Multistep solvers work on predictions of data in the half log-signal-to-noise ratio ``lambda = log(alpha / sigma)``, and
what they do with them does not depend on the scale of the state. So they see every path as the straight one:

    x_t / (alpha + sigma) = (1 - u) x0 + u eps        u = sigma / (alpha + sigma)        lambda = log((1 - u) / u)

where lambda is infinite at an end, formulas are written so that it costs an order for that step, and nothing else. No
solver asks the model about t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ltd.diffusion.paths import Path
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
        return x + (after - now) * velocity(x, now)


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

    Args:
        path: Path that the velocities are of.
    """

    def __init__(self, path: Path) -> None:
        self._places = _Places(path)
        self._before: _Evaluated | None = None

    def step(self, velocity: Velocity, x: Tensor, now: float, after: float) -> Tensor:
        """Go one step; see ``Solver.step``."""
        here, there = self._places.at(now), self._places.at(after)
        data = mixed = here.data(x, velocity(x, now))
        if self._before is not None and there.level > 0 and self._before.level < 1:
            before = _lambda(self._before.level)
            ratio = (_lambda(here.level) - before) / (_lambda(there.level) - _lambda(here.level))
            mixed = data + (data - self._before.data) / (2 * ratio)
        self._before = _Evaluated(here.level, data)
        return there.scale * _exponential(x / here.scale, mixed, here.level, there.level)


class UniPc:
    """UniPC (bh2, data prediction): a step is predicted from the ones before, and corrected when the next is evaluated.

    Reference: Zhao et al. (2023), arXiv 2302.04867, Alg. 5-8.

    Args:
        order: Of the predictor and the corrector; lower while the history is short, and 1 in the last step.
        path: Path that the velocities are of.
    """

    def __init__(self, order: int, path: Path) -> None:
        self.order = order
        self._places = _Places(path)
        self._history: list[_Evaluated] = []
        self._start: Tensor | None = None
        self._used = 1

    def step(self, velocity: Velocity, x: Tensor, now: float, after: float) -> Tensor:
        """Go one step; see ``Solver.step``."""
        here, there = self._places.at(now), self._places.at(after)
        data = here.data(x, velocity(x, now))
        x = x / here.scale
        if self._start is not None:
            x = self._advance(self._start, here.level, self._used, data)
        self._history.append(_Evaluated(here.level, data))
        # What lies at an infinite distance says nothing about the curvature here.
        known = sum(1 for point in self._history[:-1] if point.level < 1)
        self._used = 1 if there.level == 0 else min(self.order, 1 + known)
        self._history = self._history[-self.order :]
        self._start = x
        return there.scale * self._advance(x, there.level, self._used, None)

    def _advance(self, x: Tensor, after: float, order: int, found: Tensor | None) -> Tensor:
        """Go from the last point of the history to a level; with its prediction of data there, correct."""
        last = self._history[-1]
        plain = _exponential(x, last.data, last.level, after)
        step = _lambda(after) - _lambda(last.level)
        points = [point for point in reversed(self._history[:-1]) if point.level < 1][: order - 1]
        ratios = [(_lambda(point.level) - _lambda(last.level)) / step for point in points]
        slopes = [(point.data - last.data) / ratio for point, ratio in zip(points, ratios, strict=True)]
        if found is not None:
            ratios, slopes = [*ratios, 1.0], [*slopes, found - last.data]
        if not slopes:
            return plain
        weights = _weights(ratios, -step, lone=not points or (found is None and len(points) == 1))
        scale = -(1 - after) * math.expm1(-step)
        return plain + scale * sum((w * s for w, s in zip(weights, slopes, strict=True)), torch.zeros_like(x))


class EulerMaruyama:
    """The reverse SDE whose marginals are the ODE's, with diffusion w = strength * sigma; its last step is its mean.

    dx = v dt + w / 2 * eps / sigma dt + sqrt(w) dW for dt < 0: the score is -eps / sigma, and the strength 0 is Euler's
    method.

    Reference: Ma et al. (2024), SiT, arXiv 2401.08740, Eq. 8 and Table 2 (w = sigma).

    Args:
        strength: Of the noise, 0 or more.
        random: Random numbers of the batch's samples; streams "sde-0", "sde-1", ...
        path: Path that the velocities are of.
    """

    def __init__(self, strength: float, random: DrawRandom, path: Path) -> None:
        self.strength, self.random = strength, random
        self._places = _Places(path)
        self._count = 0

    def step(self, velocity: Velocity, x: Tensor, now: float, after: float) -> Tensor:
        """Go one step; see ``Solver.step``."""
        here = self._places.at(now)
        v = velocity(x, now)
        eps = here.noise(x, v)
        span = now - after
        following = x - span * (v + 0.5 * self.strength * eps)
        if after > 0:
            fresh = self.random.normal(x.shape[1:], f"sde-{self._count}").to(x)
            following = following + math.sqrt(self.strength * here.sigma * span) * fresh
        self._count += 1
        return following


@dataclass(frozen=True)
class _Place:
    """The path at one time, in numbers."""

    #: alpha + sigma; states divided by it follow the straight path, at the time ``level``.
    scale: float
    level: float
    sigma: float
    data_shares: tuple[float, float]
    noise_shares: tuple[float, float]

    def data(self, x: Tensor, v: Tensor) -> Tensor:
        """Recover the data from state and velocity; see ``Path.data``."""
        state, slope = self.data_shares
        return state * x - slope * v

    def noise(self, x: Tensor, v: Tensor) -> Tensor:
        """Recover the noise from state and velocity; see ``Path.noise``."""
        state, slope = self.noise_shares
        return state * x + slope * v


class _Places:
    """Looks a path up at single times, in float64."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def at(self, time: float) -> _Place:
        """Look one time up."""
        path, t = self.path, torch.tensor(time, dtype=torch.float64)
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        data, noise = map(float, path.shares(t))
        slopes = float(path.data_per_velocity(t)), float(path.noise_per_velocity(t))
        return _Place(alpha + sigma, sigma / (alpha + sigma), sigma, (data, slopes[0]), (noise, slopes[1]))


@dataclass(frozen=True)
class _Evaluated:
    """A prediction of data at a level of noise, a time of the straight path."""

    level: float
    data: Tensor


def _lambda(level: float) -> float:
    """Half the log-signal-to-noise ratio."""
    if level <= 0:
        return math.inf
    return -math.inf if level >= 1 else math.log((1 - level) / level)


def _exponential(x: Tensor, data: Tensor, now: float, after: float) -> Tensor:
    """Solve the linear part exactly on the straight path, with one prediction of data for the whole step."""
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
