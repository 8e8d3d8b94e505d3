"""A 2D mixture of known density, a small network on it, and the distance of two sets of points: see ``toys``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ltd.diffusion import Denoiser, FlowMatching, FlowMatchingConfig, Path, SamplerConfig, sample
from ltd.rng import DrawRandom, derive_seed, generator

BATCH, STEPS = 512, 3000
LEARNING_RATE = 8e-3
#: Horizon of the moving average of the parameters, as a share of the steps.
AVERAGED = 1 / 7
SAMPLES, DIRECTIONS = 8192, 128
SAMPLER = SamplerConfig(kind="heun", steps=100)


class Mixture:
    """Eight round Gaussians on a circle, of unequal shares and spreads, moved and scaled to mean 0 and deviation 1.

    Attributes:
        centres: ``(8, 2)``, fp64.
        spreads: Standard deviation of each coordinate in each mode, ``(8, 2)``, fp64.
        shares: ``(8,)``, fp64, of sum 1.
    """

    def __init__(self) -> None:
        angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        centres = torch.stack((angles.cos(), angles.sin()), dim=1)
        spreads = torch.linspace(0.08, 0.2, 8, dtype=torch.float64)[:, None]
        self.shares = torch.arange(8, 0, -1, dtype=torch.float64) / 36
        mean = self.shares @ centres
        deviation = (self.shares @ ((centres - mean).square() + spreads.square())).sqrt()
        self.centres, self.spreads = (centres - mean) / deviation, spreads / deviation

    def draw(self, num: int, random: torch.Generator) -> Tensor:
        """Draw points, ``(num, 2)``, float32."""
        mode = torch.multinomial(self.shares, num, replacement=True, generator=random)
        noise = torch.randn(num, 2, generator=random, dtype=torch.float64)
        return (self.centres[mode] + self.spreads[mode] * noise).float()

    def typical_distance(self, points: Tensor) -> float:
        """Find the median distance of points ``(n, 2)`` to their nearest centre, in units of that mode's spread."""
        gaps = (points.double()[:, None] - self.centres) / self.spreads
        return gaps.norm(dim=2).amin(dim=1).median().item()


MIXTURE = Mixture()


def sliced_distance(left: Tensor, right: Tensor, directions: int = DIRECTIONS) -> float:
    """Compute the sliced 2-Wasserstein distance of two sets of as many points ``(n, 2)``, in fp64.

    Reference: Bonneel et al. (2015), Sliced and Radon Wasserstein barycenters of measures, section 3.

    Args:
        left: Points.
        right: As many points.
        directions: Number of directions, spread evenly over the half circle.

    Returns:
        Root of the mean squared distance of sorted projections, over all directions.
    """
    angles = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
    axes = torch.stack((angles.cos(), angles.sin()))
    gaps = (left.double() @ axes).sort(dim=0).values - (right.double() @ axes).sort(dim=0).values
    return gaps.square().mean().sqrt().item()


class BatchRandom(DrawRandom):
    """Random numbers of a batch out of one generator each, for speed; ``DrawRandom`` makes one for every row."""

    def normal(self, shape: Sequence[int], stream: str) -> Tensor:
        """Draw standard normal numbers ``(b, *shape)``, float32."""
        return torch.randn(len(self.draws), *shape, generator=generator(self.seed, self.draws[0], stream))

    def uniform(self, shape: Sequence[int], stream: str) -> Tensor:
        """Draw numbers uniform in [0, 1), ``(b, *shape)``, float32."""
        return torch.rand(len(self.draws), *shape, generator=generator(self.seed, self.draws[0], stream))


class Network(nn.Module):
    """A perceptron for each cell of a sample, which sees the cell's point and sinusoids of the time.

    Its output is added to the point times a factor that is a linear function of the sinusoids: of no prediction's kind,
    but near an end each of them is close to some multiple of the state.

    Args:
        cells: Cells of a sample; their perceptrons share nothing.
        width: Of the three hidden layers.
    """

    rates: Tensor

    def __init__(self, cells: int = 1, width: int = 128) -> None:
        super().__init__()
        self.register_buffer("rates", 2.0 ** torch.arange(-1, 7) * (math.pi / 2))
        self.factors = nn.ModuleList(nn.Linear(16, 1) for _ in range(cells))
        self.cells = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2 + 16, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, 2),
            )
            for _ in range(cells)
        )

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """Map points ``(b, 2, 1, 1, cells)`` and times ``(b,)`` to as many vectors."""
        angles = t[:, None].float() * self.rates
        features = torch.cat((angles.sin(), angles.cos()), dim=1)  # b 16
        points = x[:, :, 0, 0].unbind(2)  # cells of b 2
        parts = zip(points, self.cells, self.factors, strict=True)
        outputs = [layers(torch.cat((p, features), dim=1)) + factor(features) * p for p, layers, factor in parts]
        return torch.stack(outputs, dim=2)[:, :, None, None]


@dataclass(frozen=True)
class Case:
    """One objective to be trained.

    Attributes:
        name: Of the row.
        config: Of the objective.
        seed: Of the start, the data, the noise, the times and the samples.
        counts: Whether each cell of a sample counts in the loss; a sample has as many cells. Cell number 1 has the
            mixture turned by half a turn.
        limited: Whether the row has a limit.
    """

    name: str
    config: FlowMatchingConfig
    seed: int = 0
    counts: tuple[bool, ...] = (True,)
    limited: bool = True


@dataclass(frozen=True)
class Trained:
    """A trained network and what it was before.

    Attributes:
        network: With averaged parameters.
        start: Its state before the first step.
    """

    network: Network
    start: dict[str, Tensor] = field(repr=False)


def draw_data(num: int, cells: int, random: torch.Generator) -> Tensor:
    """Draw samples ``(num, 2, 1, 1, cells)``: points of the mixture, in cell 1 turned by half a turn."""
    points = [MIXTURE.draw(num, random) * (-1) ** cell for cell in range(cells)]
    return torch.stack(points, dim=2)[:, :, None, None]


def train(case: Case, steps: int = STEPS) -> Trained:
    """Train a fresh network on data drawn anew for every step; the rate falls to 0 along a cosine.

    Args:
        case: Objective, seed and cells.
        steps: Optimizer steps of ``BATCH`` samples.

    Returns:
        The network with the moving average of its parameters.
    """
    cells = len(case.counts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(case.seed, "start"))
        network = Network(cells)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    average = [value.detach().clone() for value in network.parameters()]
    objective = FlowMatching(case.config)
    denoiser = objective.denoiser(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weight = None if all(case.counts) else torch.tensor(case.counts).expand(BATCH, 1, 1, cells)
    for step in range(steps):
        x0 = draw_data(BATCH, cells, generator(case.seed, "data", step))
        random = BatchRandom(case.seed, range(step * BATCH, (step + 1) * BATCH))
        losses, counts = objective.loss(denoiser, x0, None, random, cell_weight=weight)
        optimizer.zero_grad()
        ((losses * counts).sum() / counts.sum()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(average, list(network.parameters()), 1 / (AVERAGED * steps))
    with torch.no_grad():
        for value, averaged in zip(network.parameters(), average, strict=True):
            value.copy_(averaged)
    return Trained(network, start)


def generate(denoiser: Denoiser, case: Case, num: int = SAMPLES) -> Tensor:
    """Draw points of every cell, ``(cells, num, 2)``, float32, on a grid with the objective's shift."""
    noise = torch.randn(num, 2, 1, 1, len(case.counts), generator=generator(case.seed, "sample"))
    points = sample(denoiser, noise, None, replace(SAMPLER, shift=case.config.shift))
    return points[:, :, 0, 0].permute(2, 0, 1)


def exact_network(path: Path, output: Literal["velocity", "x0", "eps"]) -> Denoiser:
    """Build the best network of the mixture on a path: what is expected of a state, in closed form.

    Args:
        path: Between the mixture and noise.
        output: What the network predicts.

    Returns:
        ``(x_t, t, cond) -> output`` for samples ``(b, 2, 1, 1, 1)``.
    """

    def network(x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        alpha, sigma = path.alpha(t.double())[:, None, None], path.sigma(t.double())[:, None, None]
        variance = (alpha * MIXTURE.spreads).square() + sigma.square()  # b 8 2
        gaps = x_t[:, None, :, 0, 0, 0].double() - alpha * MIXTURE.centres
        log_weights = MIXTURE.shares.log() - ((gaps.square() / variance + variance.log()) / 2).sum(2)
        weights = log_weights.softmax(dim=1)[:, :, None]
        x0 = (weights * (MIXTURE.centres + alpha * MIXTURE.spreads.square() / variance * gaps)).sum(1)
        eps = (weights * (sigma / variance * gaps)).sum(1)
        found = {"x0": x0, "eps": eps}[output] if output != "velocity" else path.velocity(x0, eps, t.double())
        return found.to(x_t.dtype).reshape(x_t.shape)

    return network
