"""Sampling: from noise (t = 1) to data (t = 0) by one of several solvers. A denoiser is any callable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.diffusion.guidance import Denoiser, GuidanceConfig, Guided, PrepareSteps, guided
from ltd.diffusion.paths import LinearPathConfig, PathConfig, build_path
from ltd.diffusion.solvers import Dpmpp2m, Euler, EulerMaruyama, Heun, Solver, UniPc
from ltd.diffusion.times import ShiftConfig, shift_times
from ltd.rng import DrawRandom


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Solver, number of steps and guidance."""

    kind: Literal["euler", "heun", "dpmpp_2m", "unipc", "sde"] = "euler"
    """Euler is of first order; Heun of second, with two evaluations per step but the last; DPM-Solver++(2M) and UniPC
    are of higher order with one; sde adds noise on the way (Euler-Maruyama). Each on every path."""
    order: Literal[1, 2, 3] = 2
    """Order of unipc; the others have their own."""
    noise: float = 1.0
    """Strength c of sde: its diffusion is w(t) = c sigma(t); 0 is Euler's method."""
    steps: int = 50
    """Number of steps, 1 or more."""
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    """Shift of the time grid; the objective's is right as a rule."""
    grid: Literal["even", "flow_match"] = "even"
    """Times before the shift: even from 1 to 0; or those of diffusers' FlowMatchEulerDiscreteScheduler, even from 1 to
    the shifted 1/1000, from where the last step goes to 0."""
    state: Literal["float32", "float64"] = "float64"
    """Dtype of the integrated state; the denoiser sees the dtype of the noise."""
    path: PathConfig = field(default_factory=LinearPathConfig)
    """Path that the denoiser's velocities are of; euler and heun need not know it."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Classifier-free guidance."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps: got {self.steps}, needed 1 or more")
        if self.kind == "unipc" and self.steps < self.order:
            raise ConfigError(f"steps: got {self.steps}, needed at least order = {self.order}")
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"noise: got {self.noise}, needed 0 or more and finite")


def time_grid(config: SamplerConfig, cells: int, channels: int | None = None) -> Tensor:
    """List the times between steps.

    Args:
        config: Steps and shift.
        cells: Latent cells t * h * w of one sample, for the shift.
        channels: Channels of a cell, for a shift by latent dimension.

    Returns:
        ``(steps + 1,)``, float64, CPU, from exactly 1 down to exactly 0.
    """
    factor = config.shift.resolve(cells, channels)
    if config.grid == "even":
        return shift_times(torch.linspace(1, 0, config.steps + 1, dtype=torch.float64), factor)
    last = float(shift_times(torch.tensor(1e-3, dtype=torch.float64), factor))
    grid = torch.linspace(1, last, config.steps, dtype=torch.float64)
    return torch.cat((shift_times(grid, factor), grid.new_zeros(1)))


@torch.no_grad()
def sample(  # noqa: PLR0913 - each is a choice of its own, and all but four have a default
    denoiser: Denoiser,
    noise: Tensor,
    cond: Any,
    config: SamplerConfig,
    *,
    null_cond: Any = None,
    random: DrawRandom | None = None,
    stack: Callable[[list[Any]], Any] | None = None,
    prepare_steps: PrepareSteps | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw samples: turn noise into data by following the (guided) velocity.

    Args:
        denoiser: Any ``(x_t, t, cond) -> v``.
        noise: Standard normal ``(b, c, t, h, w)``; the state at t = 1.
        cond: Conditions, passed on to the denoiser.
        config: Solver, steps, shift, guidance.
        null_cond: What guidance leads away from, ``b`` rows; needed when its scale is not 1.
        random: Random numbers of the ``b`` samples; needed by ``kind: sde``.
        stack: Joins a list of conditions row by row; with it both passes of guidance are one call on ``2 b`` rows.
        prepare_steps: Makes conditions for each of the times that will be asked about, all known before the first
            step: ``Dit.prepare_steps``; of a denoiser that is ``Guided`` already, its ``ready``.
        progress: Called with (steps done, steps) after each step.

    Returns:
        Data ``(b, c, t, h, w)`` in the dtype of ``noise``.

    Raises:
        ValueError: If guidance is on and has nothing to lead away from, or the solver needs random numbers.
    """
    if config.guidance.scale != 1 and null_cond is None:
        raise ValueError(
            f"guidance.scale = {config.guidance.scale} needs a null condition (the empty or negative prompt)"
        )
    model = denoiser
    if config.guidance.scale != 1:
        model = guided(denoiser, null_cond, config.guidance, stack=stack, prepare_steps=prepare_steps)
    ready = model.ready if isinstance(model, Guided) else prepare_steps
    solver = _solver(config, random)
    x = noise.to(torch.promote_types(noise.dtype, getattr(torch, config.state)))
    grid = time_grid(config, noise[0, 0].numel(), noise.shape[1])
    asked = grid[:-1]
    told_times = asked.to(torch.promote_types(noise.dtype, torch.float32))  # rounded as the denoiser will see them
    rows = told_times.to(noise.device).unsqueeze(1).expand(-1, len(noise))
    conditions = [cond] * len(asked) if ready is None else ready(cond, told_times)
    steps = dict(zip(asked.tolist(), zip(rows.unbind(0), conditions, strict=True), strict=True))

    def velocity(state: Tensor, time: float) -> Tensor:
        t, told = steps[time]
        return model(state.to(noise.dtype), t, told).to(state.dtype)

    for index, (now, after) in enumerate(pairwise(grid.tolist())):
        x = solver.step(velocity, x, now, after)
        if progress is not None:
            progress(index + 1, config.steps)
    return x.to(noise.dtype)


def _solver(config: SamplerConfig, random: DrawRandom | None) -> Solver:
    match config.kind:
        case "euler":
            return Euler()
        case "heun":
            return Heun()
        case "dpmpp_2m":
            return Dpmpp2m(build_path(config.path))
        case "unipc":
            return UniPc(config.order, build_path(config.path))
        case "sde":
            if random is None:
                raise ValueError("kind sde draws noise: needed random, the random numbers of the samples")
            return EulerMaruyama(config.noise, random, build_path(config.path))
