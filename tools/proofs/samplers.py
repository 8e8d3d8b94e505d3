"""Solvers on Gaussian data, whose velocity and flow are known: errors, order of convergence, and diffusers' solvers."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ltd.diffusion import SamplerConfig, ShiftConfig, sample
from ltd.diffusion.solvers import Dpmpp2m, Solver, UniPc
from ltd.rng import DrawRandom
from tools.proofs.table import Cell, Proof

NAME = "samplers"
MEAN, STD = 0.7, 0.4
STEPS = (20, 40, 320, 640)
SHIFTS = (1.0, 3.0)
#: Solver and order -> least order of convergence from 320 to 640 steps.
CASES: dict[tuple[str, int], float] = {
    ("euler", 1): 0.95,
    ("heun", 2): 1.95,
    ("dpmpp_2m", 2): 1.65,
    ("unipc", 1): 1.7,
    ("unipc", 2): 1.9,
    ("unipc", 3): 1.9,
}
_SDE_LIMITS = (0.01, 0.02)
_THEIRS_LIMIT = 2e-6
_NOTES = f"""Data N({MEAN}, {STD}^2); the flow from noise to data is the affine map with these numbers, so the error of
every sample is known: columns give the largest of 512, in fp64. *order*: log2 of the ratio of the errors at 320 and 640
steps. Multistep solvers count in the log-signal-to-noise ratio, which is infinite at both ends of the path, so their
first and last steps are of first order: UniPC of order 3 reaches order 2. *sde*: relative errors of the mean and the
standard deviation of 8,192 values after 200 steps, limits {_SDE_LIMITS[0]:g} and {_SDE_LIMITS[1]:g}. *diffusers*:
largest difference of the states of all steps but the last to its own scheduler on its own grid of 12 steps, limit
{_THEIRS_LIMIT:g} (its tables are fp32)."""


def velocity(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
    """Give the expected velocity of the data at states and times: exact, not learned."""
    t = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    variance = ((1 - t) * STD) ** 2 + t**2
    residual = (x - (1 - t) * MEAN) / variance
    return t * residual - (MEAN + (1 - t) * STD**2 * residual)


def _noise() -> Tensor:
    x = DrawRandom(0, list(range(64))).normal((2, 1, 2, 2), "noise").double()
    return (x - x.mean()) / x.std(correction=0)


def _error(kind: str, order: int, steps: int, shift: float) -> float:
    config = SamplerConfig(kind=kind, order=order, steps=steps, shift=ShiftConfig(factor=shift))  # type: ignore[arg-type]
    noise = _noise()
    return float((sample(velocity, noise, None, config) - (MEAN + STD * noise)).abs().max())


def _sde() -> tuple[float, float]:
    random = DrawRandom(3, list(range(2048)))
    noise = random.normal((4, 1, 1, 1), "sample").double()
    x = sample(velocity, noise, None, SamplerConfig(kind="sde", steps=200), random=random)
    return abs(float(x.mean()) / MEAN - 1), abs(float(x.std()) / STD - 1)


def _against_theirs(name: str, order: int, solver: Solver) -> float:
    """Take the same steps with a scheduler of diffusers."""
    warnings.filterwarnings("ignore")
    import diffusers

    options: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": order}
    options |= {"final_sigmas_type": "zero", "lower_order_final": False, "flow_shift": 1.0}
    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, **options)
    scheduler.set_timesteps(12)
    theirs = ours = _noise()
    worst = 0.0

    def at(x: Tensor, time: float) -> Tensor:
        return velocity(x, torch.full((len(x),), time, dtype=torch.float64))

    for index, (now, after) in enumerate(pairwise(scheduler.sigmas.double().tolist())):
        if after > 0:
            theirs = scheduler.step(at(theirs, now), scheduler.timesteps[index], theirs).prev_sample
            ours = solver.step(at, ours, now, after)
            worst = max(worst, float((theirs - ours).abs().max()))
    return worst


def measure() -> Proof:
    """Measure every solver with and without a shift of the times."""
    rows: list[list[Cell]] = []
    misses = []
    for (kind, order), least in CASES.items():
        for shift in SHIFTS:
            errors = [_error(kind, order, steps, shift) for steps in STEPS]
            found = math.log2(errors[-2] / errors[-1])
            rows.append([kind, order, shift, *errors, found, least])
            if found < least:
                misses.append(f"{kind}, order {order}, shift {shift:g}: order {found:.2f}, needed {least}")
    pair: list[tuple[str, int, Solver]] = [
        ("DPMSolverMultistepScheduler", 2, Dpmpp2m()),
        ("UniPCMultistepScheduler", 2, UniPc(2)),
        ("UniPCMultistepScheduler", 3, UniPc(3)),
    ]
    for name, order, solver in pair:
        worst = _against_theirs(name, order, solver)
        rows.append([f"diffusers {name}", order, 1.0, worst, *[None] * 5])
        if worst > _THEIRS_LIMIT:
            misses.append(f"{name}, order {order}: differs by {worst:.2e}, limit {_THEIRS_LIMIT:g}")
    mean, std = _sde()
    rows.append(["sde: mean, deviation", 1, 1.0, mean, std, *[None] * 4])
    if mean > _SDE_LIMITS[0] or std > _SDE_LIMITS[1]:
        misses.append(f"sde: mean off by {mean:.3f}, deviation by {std:.3f}, limits {_SDE_LIMITS}")
    columns = ["solver", "order of the solver", "shift", *(f"{steps} steps" for steps in STEPS), "order", "least order"]
    return Proof("Solvers on data whose flow is known", columns, rows, misses, _NOTES)
