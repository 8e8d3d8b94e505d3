"""Solvers on Gaussian data, whose velocity and flow are known: errors, order of convergence, and diffusers' solvers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ltd.diffusion import (
    DataPredictionConfig,
    EdmPredictionConfig,
    GvpPathConfig,
    LinearPathConfig,
    NoisePredictionConfig,
    PathConfig,
    PredictionConfig,
    SamplerConfig,
    ShiftConfig,
    VpPathConfig,
    build_path,
    build_prediction,
    expand_time,
    sample,
)
from ltd.diffusion.solvers import Dpmpp2m, Euler, Heun, Solver, UniPc, Velocity
from ltd.rng import DrawRandom
from tools.proofs.table import Cell, Proof

NAME = "samplers"
MEAN, STD = 0.7, 0.4
STEPS = (20, 40, 320, 640)
PATHS: tuple[PathConfig, ...] = (LinearPathConfig(), GvpPathConfig(), VpPathConfig())
PREDICTIONS: tuple[PredictionConfig, ...] = (DataPredictionConfig(), NoisePredictionConfig(), EdmPredictionConfig())
#: Path and shift of the times.
WAYS: tuple[tuple[PathConfig, float], ...] = ((PATHS[0], 1.0), (PATHS[0], 3.0), (PATHS[1], 1.0), (PATHS[2], 1.0))
#: Solver and order -> least order of convergence from 320 to 640 steps: from noise to data where the two ends are of
#: first order; from t = 0.9 to 0.1.
CASES: dict[tuple[str, int], tuple[float, float]] = {
    ("euler", 1): (0.95, 0.95),
    ("heun", 2): (1.95, 1.95),
    ("dpmpp_2m", 2): (1.65, 1.95),
    ("unipc", 1): (1.7, 1.95),
    ("unipc", 2): (1.9, 2.9),
    ("unipc", 3): (1.9, 3.8),
}
_SDE_LIMITS = (0.01, 0.02)
_THEIRS_LIMIT = 2e-6
_PREDICTIONS_LIMIT = 1e-12
_NOTES = f"""Data N({MEAN}, {STD}^2); the flow from noise to data is an affine map, so the error of every sample is
known: columns give the largest of 512, in fp64. *order*: log2 of the ratio of the errors at 320 and 640 steps. *way*:
from noise to data (1 to 0), or between two times where nothing is infinite. Multistep solvers count in the
log-signal-to-noise ratio, which is infinite at both ends of the linear and the GVP path, so that their first and last
steps are of first order, and UniPC of order 3 reaches order 2; inside they have their full order (UniPC's corrector
adds one). On the VP path even times are never fine near data: from t = 2/n to 1/n that ratio grows by half of ln 2 for
every n. So multistep solvers stay of first order there, and the limit is Euler's error at 640 steps. *sde*: relative
errors of the mean and the standard deviation of 8,192 values after 200 steps, limits {_SDE_LIMITS[0]:g} and
{_SDE_LIMITS[1]:g}. *diffusers*: largest difference of the states of all steps but the last to its own scheduler on its
own grid of 12 steps, limit {_THEIRS_LIMIT:g} (its tables are fp32): with flow sigmas on the linear path; with those of
DDPM's linear schedule, told the data or the noise, on the GVP and the VP path at the times of the same sigmas. *x0,
eps, edm*: largest difference of the states that 12 steps from 0.9 to 0.1 of dpmpp_2m and unipc (2, 3) reach with a
network that predicts these instead of velocity, limit {_PREDICTIONS_LIMIT:g}; beyond min_time of an end, conversions
are inexact for every solver."""


class Gaussian:
    """Data N(MEAN, STD^2) on a path: all that is expected of a state.

    Args:
        path: The path.
    """

    def __init__(self, path: PathConfig) -> None:
        self.path = build_path(path)

    def parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Give the expected data and noise of states ``(b, ...)`` at times ``(b,)``."""
        t = expand_time(t, x).to(x.dtype)
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        residual = (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        return MEAN + alpha * STD**2 * residual, sigma * residual

    def velocity(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """Give the expected velocity of states at times: exact, not learned."""
        return self.path.velocity(*self.parts(x, t), t.to(x.dtype))

    def predicted(self, config: PredictionConfig, x: Tensor, t: Tensor) -> Tensor:
        """Give the velocity that the best network with a prediction means."""
        prediction = build_prediction(config, self.path)
        return prediction.velocity(prediction.target(*self.parts(x, t), t), x, t)

    def flow(self, x: Tensor, now: float, after: float) -> Tensor:
        """Carry states exactly from one time to another."""
        (mean, std), (mean_after, std_after) = self._moments(now), self._moments(after)
        return mean_after + std_after / std * (x - mean)

    def _moments(self, time: float) -> tuple[float, float]:
        t = torch.tensor(time, dtype=torch.float64)
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        return alpha * MEAN, math.sqrt((alpha * STD) ** 2 + sigma**2)


def _noise() -> Tensor:
    x = DrawRandom(0, list(range(64))).normal((2, 1, 2, 2), "noise").double()
    return (x - x.mean()) / x.std(correction=0)


def _at(denoiser: Callable[[Tensor, Tensor], Tensor]) -> Velocity:
    return lambda x, time: denoiser(x, torch.full((len(x),), time, dtype=torch.float64))


def _solver(kind: str, order: int, path: PathConfig) -> Solver:
    match kind:
        case "euler":
            return Euler()
        case "heun":
            return Heun()
        case "dpmpp_2m":
            return Dpmpp2m(build_path(path))
        case _:
            return UniPc(order, build_path(path))


def _error(kind: str, order: int, steps: int, path: PathConfig, shift: float) -> float:
    """Measure the error from noise to data."""
    config = SamplerConfig(kind=kind, order=order, steps=steps, shift=ShiftConfig(factor=shift), path=path)  # type: ignore[arg-type]
    noise, data = _noise(), Gaussian(path)
    return float((sample(data.velocity, noise, None, config) - data.flow(noise, 1, 0)).abs().max())


def _inside(solver: Solver, velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Go from t = 0.9 to 0.1."""
    for now, after in pairwise(torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()):
        x = solver.step(velocity, x, now, after)
    return x


def _error_inside(kind: str, order: int, steps: int, path: PathConfig) -> float:
    data = Gaussian(path)
    start = data.flow(_noise(), 1, 0.9)
    found = _inside(_solver(kind, order, path), _at(data.velocity), start, steps)
    return float((found - data.flow(start, 0.9, 0.1)).abs().max())


def _sde(path: PathConfig) -> tuple[float, float]:
    random = DrawRandom(3, list(range(2048)))
    noise = random.normal((4, 1, 1, 1), "sample").double()
    config = SamplerConfig(kind="sde", steps=200, path=path)
    x = sample(Gaussian(path).velocity, noise, None, config, random=random)
    return abs(float(x.mean()) / MEAN - 1), abs(float(x.std()) / STD - 1)


def _predictions(path: PathConfig) -> float:
    """Compare networks that predict data, noise and EDM's mix with the one that predicts velocity."""
    data = Gaussian(path)
    start, worst = data.flow(_noise(), 1, 0.9), 0.0
    for kind, order in (("dpmpp_2m", 2), ("unipc", 2), ("unipc", 3)):
        expected = _inside(_solver(kind, order, path), _at(data.velocity), start, 12)
        for config in PREDICTIONS:
            velocity = _at(lambda x, t, config=config: data.predicted(config, x, t))
            found = _inside(_solver(kind, order, path), velocity, start, 12)
            worst = max(worst, float((found - expected).abs().max()))
    return worst


def _against_theirs(name: str, order: int, path: PathConfig) -> float:
    """Take the same steps with a scheduler of diffusers: their flow sigmas, or those of DDPM's linear schedule."""
    warnings.filterwarnings("ignore")
    import diffusers

    kinds = ["flow_prediction"] if isinstance(path, LinearPathConfig) else ["sample", "epsilon"]
    data, worst = Gaussian(path), 0.0
    for kind in kinds:
        options: dict[str, Any] = {"prediction_type": kind, "solver_order": order}
        options |= {"final_sigmas_type": "zero", "lower_order_final": False}
        if kind == "flow_prediction":
            options |= {"use_flow_sigmas": True, "flow_shift": 1.0}
        else:
            options |= {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "leading"}
        scheduler = getattr(diffusers, name)(num_train_timesteps=1000, **options)
        scheduler.set_timesteps(12)
        sigmas = scheduler.sigmas.double()
        times = sigmas if kind == "flow_prediction" else data.path.time(sigmas)
        solver = _solver("dpmpp_2m" if name.startswith("DPM") else "unipc", order, path)
        theirs = ours = _noise()
        for index, (now, after) in enumerate(pairwise(times.tolist())):
            if after > 0:
                t = torch.full((len(theirs),), now, dtype=torch.float64)
                x0, eps = data.parts(theirs, t)
                told = {"flow_prediction": data.velocity(theirs, t), "sample": x0, "epsilon": eps}[kind]
                theirs = scheduler.step(told, scheduler.timesteps[index], theirs).prev_sample
                ours = solver.step(_at(data.velocity), ours, now, after)
                worst = max(worst, float((theirs - ours).abs().max()))
    return worst


def _orders() -> tuple[list[list[Cell]], list[str]]:
    """Measure errors and orders of every solver on every path."""
    rows: list[list[Cell]] = []
    misses = []
    for (kind, order), (least_whole, least_inside) in CASES.items():
        for path, shift in WAYS:
            errors = [_error(kind, order, steps, path, shift) for steps in STEPS]
            found = math.log2(errors[-2] / errors[-1])
            rows.append([kind, order, path.kind, "1 to 0", shift, *errors, found, least_whole])
            if isinstance(path, VpPathConfig) and kind not in ("euler", "heun"):
                rows[-1][-1] = None
                most = _error("euler", 1, STEPS[-1], path, shift)
                if errors[-1] > most:
                    misses.append(f"{kind}, order {order}, vp: error {errors[-1]:.2g}, Euler's is {most:.2g}")
            elif found < least_whole:
                misses.append(f"{kind}, order {order}, {path.kind}, shift {shift:g}: order {found:.2f} < {least_whole}")
        for path in PATHS:
            errors = [_error_inside(kind, order, steps, path) for steps in STEPS]
            found = math.log2(errors[-2] / errors[-1])
            rows.append([kind, order, path.kind, "0.9 to 0.1", 1.0, *errors, found, least_inside])
            if found < least_inside:
                misses.append(f"{kind}, order {order}, {path.kind}, inside: order {found:.2f} < {least_inside}")
    return rows, misses


def measure() -> Proof:
    """Measure every solver on every path."""
    rows, misses = _orders()
    for name, order in (
        ("DPMSolverMultistepScheduler", 2),
        ("UniPCMultistepScheduler", 2),
        ("UniPCMultistepScheduler", 3),
    ):
        for path in PATHS:
            worst = _against_theirs(name, order, path)
            rows.append([f"diffusers {name}", order, path.kind, "to sigma > 0", None, worst, *[None] * 5])
            if not worst <= _THEIRS_LIMIT:
                misses.append(f"{name}, order {order}, {path.kind}: differs by {worst:.2e}, limit {_THEIRS_LIMIT:g}")
    for path in PATHS:
        worst = _predictions(path)
        rows.append(["x0, eps, edm", None, path.kind, "0.9 to 0.1", 1.0, worst, *[None] * 5])
        if not worst <= _PREDICTIONS_LIMIT:
            misses.append(f"predictions, {path.kind}: differ by {worst:.2e}, limit {_PREDICTIONS_LIMIT:g}")
    for path in PATHS:
        mean, std = _sde(path)
        rows.append(["sde: mean, deviation", 1, path.kind, "1 to 0", 1.0, mean, std, *[None] * 4])
        if not (mean <= _SDE_LIMITS[0] and std <= _SDE_LIMITS[1]):
            misses.append(f"sde, {path.kind}: mean off by {mean:.3f}, deviation by {std:.3f}, limits {_SDE_LIMITS}")
    columns = ["solver", "order of the solver", "path", "way", "shift", *(f"{steps} steps" for steps in STEPS)]
    return Proof("Solvers on data whose flow is known", [*columns, "order", "least order"], rows, misses, _NOTES)
