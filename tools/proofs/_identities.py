"""Options that are off, compared bit by bit with the baseline, and the limits that recipes have: see ``toys``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ltd.diffusion import (
    DataPredictionConfig,
    Denoiser,
    EdmPredictionConfig,
    FlowMatching,
    FlowMatchingConfig,
    GuidanceConfig,
    GvpPathConfig,
    LinearPathConfig,
    LogitNormalConfig,
    LognormalConfig,
    ModeConfig,
    PathConfig,
    SamplerConfig,
    ShiftConfig,
    UniformConfig,
    VelocityPredictionConfig,
    VpPathConfig,
    build_path,
    build_prediction,
    draw_times,
    guided,
    sample,
    shift_times,
)
from ltd.rng import DrawRandom, generator
from tools.proofs.table import Cell

ROWS, SHAPE = 4, (3, 1, 2, 2)
CELLS = math.prod(SHAPE[1:])
DRAWS = DrawRandom(5, range(ROWS))
X0 = torch.randn(ROWS, *SHAPE, generator=generator(5, "identities"))
TIMES = torch.tensor([0.2, 0.5, 0.8, 0.9])
COND, NULL = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([-1.0, 0.0, 0.5, 0.2])
PATHS: tuple[PathConfig, ...] = (LinearPathConfig(), GvpPathConfig(), VpPathConfig())
MEAN, STD = 0.7, 0.4

OFF_COLUMNS = ("option", "off", "equal to", "bit-identical", "on", "on differs")
OFF_NOTES = f"""*equal to* is written out in the proof, apart from the library's option: the plain loss is the mean of
(network(x_t, t) - (eps - x0))^2 at x_t = (1 - t) x0 + t eps and t = sigmoid(normal); plain guidance is
v_null + w (v_cond - v_null) with w = 2.5; plain Euler is x + (after - now) v over an even grid. {ROWS} samples of shape
{SHAPE}, a network that is nonlinear in state, time and condition. *on* is a setting that must change the result: an
option without any effect would be a miss. Cell weights of one take a sum over a sum in the place of a mean, which is
equal within rounding and not bit by bit (next table)."""
LIMIT_COLUMNS = ("recipe", "what holds", "found", "at most")
LIMIT_NOTES = """Largest differences, relative where sizes vary; fp64 unless the library returns fp32. Orders of
convergence and the mean and deviation of the ODE and SDE samplers: [samplers](samplers.md)."""


def network(x_t: Any, t: Tensor, cond: Any = None) -> Any:
    """Mix state, time and condition nonlinearly; takes lists too."""
    if isinstance(x_t, list):
        return [network(x[None], time, cond)[0] for x, time in zip(x_t, t.split(1), strict=True)]
    strength = 1 + t if cond is None else t + torch.cos(cond)
    return torch.sin(x_t * strength.reshape(-1, 1, 1, 1, 1).to(x_t.dtype)) + 0.1


@dataclass(frozen=True)
class Off:
    """An option that is off.

    Attributes:
        option: Field of the configuration or argument.
        off: Its setting.
        baseline: What it must be equal to.
        equal: Whether it is, bit by bit.
        on: Another setting; "" where there is none.
        differs: Whether the result is another one with it.
    """

    option: str
    off: str
    baseline: str
    equal: bool
    on: str = ""
    differs: bool | None = None

    def cells(self) -> list[Cell]:
        """List the row of the table."""
        return [self.option, self.off, self.baseline, self.equal, self.on or None, self.differs]

    def misses(self) -> list[str]:
        """Name what does not hold."""
        found = [] if self.equal else [f"{self.option} {self.off}: not bit-identical to {self.baseline}"]
        return found + ([f"{self.option} {self.on}: changes nothing"] if self.differs is False else [])


@dataclass(frozen=True)
class Limit:
    """A limit of a recipe.

    Attributes:
        recipe: Its section.
        claim: What holds.
        found: Measured difference.
        most: Largest difference that is taken for equality.
    """

    recipe: str
    claim: str
    found: float
    most: float

    def cells(self) -> list[Cell]:
        """List the row of the table."""
        return [self.recipe, self.claim, self.found, self.most]

    def misses(self) -> list[str]:
        """Name what does not hold."""
        return [] if self.found <= self.most else [f"{self.claim}: {self.found:.3g}, needed {self.most:g} at most"]


def misses_of(off: list[Off], measured: list[Limit]) -> list[str]:
    """Name every option and limit that does not hold."""
    return [miss for row in off for miss in row.misses()] + [miss for row in measured for miss in row.misses()]


def options_off() -> list[Off]:
    """Compare every option that is off with the baseline."""
    return [*_objective_off(), *_guidance_off(), *_sampler_off()]


def limits() -> list[Limit]:
    """Measure the recipes' limits."""
    return [*_time_limits(), *_path_limits(), *_edm_limits(), *_loss_limits()]


def _loss(*, weight: Tensor | None = None, x0: Tensor | list[Tensor] = X0, **fields: Any) -> Tensor:
    objective = FlowMatching(FlowMatchingConfig(**fields))
    return objective.loss(objective.denoiser(network), x0, None, DRAWS, cell_weight=weight)[0]


def _loss_at(time: float, **fields: Any) -> Tensor:
    objective = FlowMatching(FlowMatchingConfig(**fields))
    return objective.loss_at(objective.denoiser(network), X0.double(), None, DRAWS, time)


def _plain_loss(quantile: Callable[[Tensor], Tensor]) -> Tensor:
    t = quantile(DRAWS.uniform((), "time").double()).float()
    time, eps = t.reshape(-1, 1, 1, 1, 1), DRAWS.normal(SHAPE, "noise")
    output = network((1 - time) * X0 + time * eps, t)
    return (output - (eps - X0)).square().flatten(1).mean(1)


def _objective_off() -> list[Off]:
    plain = _plain_loss(lambda u: torch.sigmoid(torch.special.ndtri(u)))
    uniform = _plain_loss(lambda u: u)
    settings: list[tuple[str, str, dict[str, Any], str, dict[str, Any]]] = [
        ("objective, all defaults", "", {}, "", {}),
        ("path", "linear", {"path": LinearPathConfig()}, "gvp", {"path": GvpPathConfig()}),
        (
            "prediction",
            "velocity",
            {"prediction": VelocityPredictionConfig()},
            "x0",
            {"prediction": DataPredictionConfig()},
        ),
        ("loss", "velocity", {"loss": "velocity"}, "min_snr", {"loss": "min_snr"}),
        ("cosine_weight", "0", {"cosine_weight": 0.0}, "0.3", {"cosine_weight": 0.3}),
        ("shift.factor", "1", {"shift": ShiftConfig(factor=1.0)}, "2", {"shift": ShiftConfig(factor=2.0)}),
        (
            "shift.base_cells",
            f"{CELLS}, the cells at hand",
            {"shift": ShiftConfig(base_cells=CELLS)},
            "1",
            {"shift": ShiftConfig(base_cells=1)},
        ),
        (
            "shift.base_dim",
            f"{math.prod(SHAPE)}, the numbers at hand",
            {"shift": ShiftConfig(base_dim=math.prod(SHAPE))},
            "1",
            {"shift": ShiftConfig(base_dim=1)},
        ),
        ("stratified", "false", {"stratified": False}, "true", {"stratified": True}),
        ("time_range", "[0, 1]", {"time_range": (0.0, 1.0)}, "[0.001, 1]", {"time_range": (1e-3, 1.0)}),
        ("samples", "a list of one size", {"x0": list(X0)}, "", {}),
    ]
    rows = [
        Off(option, off, "the plain loss", torch.equal(_loss(**fields), plain), on, _differs(plain, on, other))
        for option, off, fields, on, other in settings
    ]
    equal = torch.equal(_loss(times=ModeConfig(scale=0.0)), uniform)
    differs = not torch.equal(_loss(times=ModeConfig(scale=1.0)), uniform)
    return [*rows, Off("times: mode, scale", "0", "the plain loss at uniform times", equal, "1", differs)]


def _differs(plain: Tensor, on: str, fields: dict[str, Any]) -> bool | None:
    return not torch.equal(_loss(**fields), plain) if on else None


def _guidance_off() -> list[Off]:
    cond, null = network(X0, TIMES, COND), network(X0, TIMES, NULL)
    plain = null + 2.5 * (cond - null)
    calls: list[int] = []

    def counting(x_t: Tensor, t: Tensor, given: Any) -> Tensor:
        calls.append(len(x_t))
        found: Tensor = network(x_t, t, given)
        return found

    def run(*, guide: Denoiser | None = None, stack: Any = None, **fields: Any) -> Tensor:
        calls.clear()
        config = GuidanceConfig(**({"scale": 2.5} | fields))
        return guided(counting, NULL, config, guide=guide, stack=stack)(X0, TIMES, COND)

    once = torch.equal(run(scale=1.0), cond) and calls == [ROWS]
    stacked = torch.equal(run(stack=torch.cat), plain) and calls == [2 * ROWS]
    settings: list[tuple[str, str, dict[str, Any], str, dict[str, Any]]] = [
        ("guidance.interval", "[0, 1]", {}, "[0.3, 0.6]", {"interval": (0.3, 0.6)}),
        ("guidance.channels", f"{SHAPE[0]}, all", {"channels": SHAPE[0]}, "1", {"channels": 1}),
        ("guidance.rescale", "0", {"rescale": 0.0}, "0.7", {"rescale": 0.7}),
    ]
    rows = [
        Off(option, off, "plain guidance", torch.equal(run(**fields), plain), on, not torch.equal(run(**other), plain))
        for option, off, fields, on, other in settings
    ]
    blind = torch.equal(run(guide=lambda x, t, _: network(x, t, NULL)), plain)
    aware = not torch.equal(run(guide=lambda x, t, given: network(x, t, given) / 2), plain)
    outside = torch.equal(run(interval=(0.0, 0.1)), cond)
    return [
        Off("guidance.scale", "1", "the condition's velocity, one pass", once, "2.5", not torch.equal(plain, cond)),
        Off("guidance.interval", "[0, 0.1], no time within", "the condition's velocity", outside),
        *rows,
        Off("guide", "one that ignores the condition", "plain guidance", blind, "one that does not", aware),
        Off("stack", "one pass of 2 b rows", "plain guidance", stacked),
    ]


def _sampler_off() -> list[Off]:
    noise, steps = DRAWS.normal(SHAPE, "sample"), 5
    x = noise.double()
    for now, after in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()):
        x = x + (after - now) * network(x.float(), torch.full((ROWS,), now), COND).double()
    plain = x.float()

    def run(**fields: Any) -> Tensor:
        config = SamplerConfig(**({"steps": steps} | fields))
        return sample(network, noise, COND, config, null_cond=NULL, random=DRAWS)

    shift, guidance = ShiftConfig(factor=3.0), GuidanceConfig(scale=2.0)
    settings: list[tuple[str, str, dict[str, Any], str, dict[str, Any]]] = [
        ("sampler.kind", "euler", {"kind": "euler"}, "heun", {"kind": "heun"}),
        ("sampler: sde, noise", "0", {"kind": "sde", "noise": 0.0}, "1", {"kind": "sde", "noise": 1.0}),
        ("sampler.shift", "1", {"shift": ShiftConfig(factor=1.0)}, "3", {"shift": shift}),
        ("sampler.guidance.scale", "1", {"guidance": GuidanceConfig(scale=1.0)}, "2", {"guidance": guidance}),
    ]
    rows = [
        Off(option, off, "plain Euler", torch.equal(run(**fields), plain), on, not torch.equal(run(**other), plain))
        for option, off, fields, on, other in settings
    ]
    one_step = torch.equal(run(kind="heun", steps=1), run(steps=1))
    return [*rows, Off("sampler.kind", "heun, one step", "Euler, one step", one_step)]


def _worst(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()


def _relative(left: Tensor, right: Tensor) -> float:
    return ((left - right).abs() / right.abs()).max().item()


def _time_limits() -> list[Limit]:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    composed = _worst(shift_times(shift_times(t, 3.0), 0.7), shift_times(t, 2.1))
    inverse = _worst(shift_times(shift_times(t, 3.0), 1 / 3), t)
    swapped = _worst(shift_times(t, 1 / 0.3), 1 - shift_times(1 - t, 0.3))
    ends = _worst(shift_times(t[[0, -1]], 6.9), t[[0, -1]])
    draws = DrawRandom(1, range(20_000))
    shifted = draw_times(LogitNormalConfig(), draws, factor=3.0)
    moved = draw_times(LogitNormalConfig(mean=math.log(3)), draws)
    probabilities = torch.special.ndtr(torch.logit(shifted.double()) - math.log(3)).sort().values
    spread = torch.arange(len(shifted) + 1, dtype=torch.float64) / len(shifted)
    gap = max(_worst(probabilities, spread[1:]), _worst(probabilities, spread[:-1]))
    lognormal = draw_times(LognormalConfig(mean=-0.6, std=1.2), draws)
    dimension = ShiftConfig(base_dim=4096).resolve(16 * 16, 768)
    ulp = 2.0**-23
    return [
        Limit("0.1", "shift: s(s(t; 3); 0.7) = s(t; 2.1)", composed, 1e-14),
        Limit("0.1", "shift: s(.; 1/3) undoes s(.; 3)", inverse, 1e-14),
        Limit("0.1", "shift: 0 and 1 stay", ends, 0.0),
        Limit("0.1", "shift: 1/0.3 here is 0.3 with time the other way round", swapped, 1e-14),
        Limit("0.1", "a logit-normal shifted by 3 is the one of mean ln 3, draw by draw", _worst(shifted, moved), ulp),
        Limit("A2", "Kolmogorov-Smirnov, 20,000 shifted times (1 % level)", gap, 1.63 / math.sqrt(len(shifted))),
        Limit("A2", "shift by dimension, 16 x 16 x 768 against 4096: 6.9282", abs(dimension - 48**0.5), 1e-12),
        Limit(
            "A2",
            "log-normal noise levels on the linear path are a logit-normal",
            _worst(lognormal, draw_times(LogitNormalConfig(mean=-0.6, std=1.2), draws)),
            ulp,
        ),
    ]


def _path_limits() -> list[Limit]:
    rows = []
    t = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    x = torch.randn(len(t), 8, generator=generator(2, "states"), dtype=torch.float64)
    for config in PATHS:
        path, time = build_path(config), t[:, None]
        alpha, sigma = path.alpha(time), path.sigma(time)
        alpha_dot, sigma_dot = path.alpha_dot(time), path.sigma_dot(time)
        residual = (x - alpha * MEAN) / ((alpha * STD).square() + sigma.square())
        v = path.velocity(MEAN + alpha * STD**2 * residual, sigma * residual, t)
        ours = -path.noise(x, v, t) / sigma
        theirs = (alpha / alpha_dot * v - x) / (sigma.square() - alpha / alpha_dot * sigma_dot * sigma)
        worst = max(_worst(ours, -residual), _worst(theirs, -residual))
        rows.append(Limit("A1", f"{config.kind}: score of Gaussian data from its velocity, two formulas", worst, 1e-10))
    vp, gvp = build_path(VpPathConfig()), build_path(GvpPathConfig())
    log_alpha = -t.square() * (20 - 0.1) / 4 - t * 0.1 / 2
    known = max(_worst(vp.alpha(t).log(), log_alpha), _worst(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, torch.ones_like(t)))
    quarter = max(_worst(gvp.alpha(t), (t * math.pi / 2).cos()), _worst(gvp.sigma(t), (t * math.pi / 2).sin()))
    rows.append(Limit("A1", "vp: ln alpha = -t^2 (20 - 0.1) / 4 - 0.1 t / 2, alpha^2 + sigma^2 = 1", known, 1e-14))
    return [*rows, Limit("A1", "gvp: alpha = cos(pi t / 2), sigma = sin(pi t / 2)", quarter, 1e-14)]


def _edm_limits() -> list[Limit]:
    scale, size = 0.9, 200_000
    config = EdmPredictionConfig(sigma_data=scale)
    random = generator(3, "edm")
    x0 = scale * torch.randn(1, size, generator=random, dtype=torch.float64)
    eps = torch.randn(1, size, generator=random, dtype=torch.float64)
    worst, formula = 0.0, 0.0
    for path_config in PATHS:
        path = build_path(path_config)
        prediction = build_prediction(config, path)
        for r in (0.01, 0.1, 1.0, 10.0, 80.0):
            t = path.time(torch.tensor([r], dtype=torch.float64))
            x_t = path.interpolate(x0, eps, t)
            given, noise_level = prediction.inputs(x_t, t)
            target = prediction.target(x0, eps, t)
            worst = max(worst, abs(given.var().item() - 1), abs(target.var().item() - 1))
            y, norm = x_t / path.alpha(t), math.hypot(r, scale)
            mixed = (scale / norm) ** 2 * y + r * scale / norm * target
            data = path.data(x_t, prediction.velocity(target, x_t, t), t)
            formula = max(formula, _worst(mixed, x0), _worst(data, mixed), _worst(given, y / norm))
            formula = max(formula, abs(noise_level.item() - math.log(r) / 4))
    centred = FlowMatching(FlowMatchingConfig(prediction=config)).denoiser(lambda x, t, c: torch.zeros_like(x))
    path, t = build_path(LinearPathConfig()), torch.tensor([0.3], dtype=torch.float64)
    x_t = path.interpolate(x0, eps, t)
    share = x_t / (0.7**2 * scale**2 + 0.3**2)
    best = _worst(centred(x_t, t, None), path.velocity(0.7 * scale**2 * share, 0.3 * share, t))
    return [
        Limit("A3", "input and target of unit variance, noise levels 0.01 to 80, 3 paths", worst, 0.02),
        Limit("A3", "c_skip, c_out, c_in, c_noise as in the recipe, noise levels 0.01 to 80, 3 paths", formula, 1e-9),
        Limit("A3", "a network of output 0 is the best velocity of centred Gaussian data", best, 1e-12),
    ]


def _loss_limits() -> list[Limit]:
    large = torch.randn(ROWS, 48, 5, 9, 11, generator=generator(6, "identities"))
    rounding = _relative(_loss(x0=large, weight=torch.ones(ROWS, 5, 9, 11)), _loss(x0=large))
    scale = 0.9
    edm = {"prediction": EdmPredictionConfig(sigma_data=scale)}
    weighted, high, low = [], [], []
    for t in (0.1, 0.5, 0.9):
        r = t / (1 - t)
        weight = (r**2 + scale**2) / (r * scale) ** 2
        weighted.append(_relative(_loss_at(t, loss="edm", **edm), weight * _loss_at(t, loss="x0", **edm)))
        high.append(_relative(_loss_at(t, loss="min_snr", min_snr_gamma=1e6), _loss_at(t, loss="eps")))
        low.append(_relative(_loss_at(t, loss="min_snr", min_snr_gamma=1e-3), 1e-3 * _loss_at(t, loss="x0")))
    uniform = UniformConfig()
    single = torch.zeros(CELLS, ROWS, *SHAPE[1:])
    for cell in range(CELLS):
        single[cell].flatten(1)[:, cell] = 1
    parts = torch.stack([_loss(weight=weight, times=uniform) for weight in single]).mean(0)
    return [
        Limit("A3", "the loss edm is (r^2 + s^2) / (r s)^2 times the error of x0", max(weighted), 1e-12),
        Limit("-", "min-SNR with a large gamma is the loss of eps", max(high), 1e-12),
        Limit("-", "min-SNR with a small gamma is gamma times the loss of x0", max(low), 1e-12),
        Limit("-", "cell weights of one are none but for rounding (fp32, 48 x 5 x 9 x 11)", rounding, 4 * 2.0**-23),
        Limit(
            "-",
            "the mean of the losses of single cells is the loss (fp32)",
            _relative(parts, _loss(times=uniform)),
            1e-6,
        ),
    ]
