"""Quantisers: continuous latents -> discrete codes and back, with gradients through the choice.

``Fsq`` rounds each channel to a few fixed levels and learns nothing. ``Vq`` takes the nearest code of a codebook that
follows the latents by moving averages. Learning is split in two, because one training step has several micro-batches
and processes: ``forward`` only collects, ``update`` changes the codebook once. Both compute in fp32, whatever comes in.
Knows no processes: what must be joined goes through the seams ``reduce_sum`` and ``gather_rows``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ltd.autoencoders.codebook import Candidates, nearest_codes, repeat_with_jitter, rotate_through, straight_through
from ltd.config import ConfigError
from ltd.nn import seams
from ltd.rng import DrawRandom

#: What the bound of a channel adds to the span of its levels. The paper takes it off: both reach the same levels.
_FSQ_MARGIN = 1e-3


@dataclass(frozen=True)
class Quantized:
    """Latents after quantisation."""

    #: ``(b, c, t, h, w)`` fp32: exactly what ``indices_to_latents(indices)`` gives, with a gradient to the input.
    latents: Tensor
    #: ``(b, t, h, w)`` int64 in [0, num_codes).
    indices: Tensor
    #: ``(b,)`` fp32 to add to the training loss, weighted already; zeros where a quantiser has none.
    losses: Tensor


@dataclass(frozen=True, kw_only=True)
class FsqConfig:
    """Finite scalar quantisation: one latent channel per entry of ``levels``, no codebook, no loss."""

    kind: Literal["fsq"] = "fsq"
    #: Values that each channel may take, at least 2; their product is the number of codes.
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ConfigError(f"levels: got {self.levels}, needed one or more numbers, each 2 or more")
        if math.prod(self.levels) >= 2**63:
            raise ConfigError(f"levels: {self.levels} make {math.prod(self.levels)} codes, needed fewer than 2^63")


class Fsq(nn.Module):
    """Round each channel of bounded latents to its levels.

    Reference: Mentzer et al. (2023), arXiv 2309.15505, Sec. 3. A channel of two levels takes -1 and 1,
    split at 0: the reference's bound would put the split of an even number of levels far from 0 there.

    Args:
        config: Levels per channel.
    """

    levels: Tensor

    def __init__(self, config: FsqConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = len(config.levels)
        self.num_codes = math.prod(config.levels)
        # Whole numbers: a module that is cast to bf16 still rounds to the right levels.
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise.

        Args:
            z: ``(b, channels, t, h, w)``, any float dtype, unbounded.

        Returns:
            Latents in [-1, 1], their codes, and losses of zero. Gradients pass the rounding unchanged.

        Raises:
            ValueError: If ``z`` has another shape.
        """
        _check_latents(z, self.channels)
        levels = _column(self.levels)
        binary, even = levels == 2, levels % 2 == 0
        half = torch.where(binary, 0.5, (levels - 1) * (1 + _FSQ_MARGIN) / 2)
        offset = torch.where(even, 0.5, 0.0)
        shift = torch.where(binary, 0.0, torch.atanh(offset / half))
        bounded = torch.tanh(z.float() + shift) * half - offset
        # With 1001 levels or more the bound lies half a level outside.
        rounded = bounded.detach().round().clamp(-(levels // 2), (levels - 1) // 2)
        latents = self._normalize(straight_through(bounded, rounded))
        digits = rounded.long() + levels // 2
        indices = (digits * _column(self._basis())).sum(1)
        return Quantized(latents, indices, latents.new_zeros(len(z)))

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        """Look codes up.

        Args:
            indices: ``(b, t, h, w)`` whole numbers.

        Returns:
            ``(b, channels, t, h, w)`` fp32: the latents that these codes stand for.

        Raises:
            ValueError: If an index is no code.
        """
        _check_indices(indices, self.num_codes)
        levels = _column(self.levels)
        digits = indices[:, None] // _column(self._basis()) % levels
        return self._normalize((digits - levels // 2).float())

    def _normalize(self, rounded: Tensor) -> Tensor:
        """Map whole numbers in [-(L // 2), (L - 1) // 2] to [-1, 1]."""
        levels = _column(self.levels)
        return torch.where(levels == 2, 2 * rounded + 1, rounded / (levels // 2))

    def _basis(self) -> Tensor:
        return self.levels.cumprod(0) // self.levels


@dataclass(frozen=True, kw_only=True)
class VqConfig:
    """Vector quantisation with a codebook of moving averages."""

    kind: Literal["vq"] = "vq"
    #: Codes of the codebook, 2 or more.
    num_codes: int
    #: Share of the moving averages that an update keeps, in [0, 1).
    decay: float = 0.99
    #: Weight of the squared distance of a sample's latents from their codes, averaged over its values; 0 or more.
    commitment: float = 0.25
    #: Gradient from codes to latents: the identity, or the rotation and scaling that turns one into the other.
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    #: Average uses per update under which a code restarts from a latent of the batch; 0 never. Where updates are small
    #: for the codebook, half of an even share of the uses counts instead, or all codes would restart for ever.
    restart_below: float = 1.0
    #: Laplace smoothing of the averaged uses, 0 or more.
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_codes < 2:
            raise ConfigError(f"num_codes: got {self.num_codes}, needed 2 or more")
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay: got {self.decay}, needed 0 or more and less than 1")
        for name in ("commitment", "restart_below", "epsilon"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needed 0 or more")


class Vq(nn.Module):
    """Replace each latent vector by the nearest code of a codebook.

    Until the first update there are no codes: latents pass as they are, with index 0 and no loss. The first update
    makes latents of its batch the codes; of fewer latents than codes it makes all, and repeats them with a little
    noise and no uses, so that they restart at the next update. What ``forward`` collected is not part of the state:
    save between an update and the next forward.

    Reference: van den Oord et al. (2017), arXiv 1711.00937, Eq. 3 and App. A.1 (moving averages); Dhariwal et al.
    (2020), arXiv 2005.00341, Sec. 3.1 (restart of unused codes).

    Attributes:
        reduce_sum: Seam: sum of a tensor over processes.
        gather_rows: Seam: rows ``(n, d)`` of all processes, in the order of their ranks; all give equally many.

    Args:
        config: Size and learning of the codebook.
        channels: Channels of the latents.

    Raises:
        ConfigError: If one channel is to be rotated.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    initialized: Tensor

    def __init__(self, config: VqConfig, channels: int) -> None:
        super().__init__()
        if config.gradient == "rotation" and channels < 2:
            raise ConfigError(f"gradient: rotation needs 2 or more latent channels, got {channels}")
        self.config = config
        self.channels = channels
        self.num_codes = config.num_codes
        self.reduce_sum = seams.reduce_sum
        self.gather_rows = seams.gather_rows
        self.register_buffer("codebook", torch.zeros(config.num_codes, channels))
        self.register_buffer("counts", torch.zeros(config.num_codes))
        self.register_buffer("sums", torch.zeros(config.num_codes, channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.discard()

    def forward(self, z: Tensor, draws: Tensor | None = None, seed: int = 0, weight: Tensor | None = None) -> Quantized:
        """Quantise; in training mode and with ``draws``, also collect for the next update.

        Args:
            z: ``(b, channels, t, h, w)``, any float dtype.
            draws: ``(b,)`` global draw index of each sample; None collects nothing.
            seed: Seed of the run, for the choice of latents that become codes.
            weight: ``(b,)``; samples of weight 0 are not collected. None collects all.

        Returns:
            Latents, codes and commitment losses.

        Raises:
            ValueError: If a shape does not fit.
        """
        _check_latents(z, self.channels)
        z = z.float()
        b, _, t, h, w = z.shape
        vectors = rearrange(z, "b c t h w -> (b t h w) c")
        if self.initialized:
            index = nearest_codes(vectors.detach(), self.codebook.float())
            codes = self.codebook.float()[index]
            rotation = self.config.gradient == "rotation"
            quantized = rotate_through(vectors, codes) if rotation else straight_through(vectors, codes)
            losses = self.config.commitment * (vectors - codes).square().reshape(b, -1).mean(1)
        else:
            index = torch.zeros(len(vectors), dtype=torch.int64, device=z.device)
            quantized, losses = vectors, z.new_zeros(b)
        if self.training and draws is not None:
            self._collect(
                vectors.detach().reshape(b, -1, self.channels), index.reshape(b, t, h, w), draws, seed, weight
            )
        latents = rearrange(quantized, "(b t h w) c -> b c t h w", b=b, t=t, h=h, w=w)
        return Quantized(latents, index.reshape(b, t, h, w), losses)

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        """Look codes up.

        Args:
            indices: ``(b, t, h, w)`` whole numbers.

        Returns:
            ``(b, channels, t, h, w)`` fp32: the codes.

        Raises:
            ValueError: If an index is no code, or there are no codes yet.
        """
        if not self.initialized:
            raise ValueError("the codebook has no codes before its first update")
        _check_indices(indices, self.num_codes)
        return rearrange(F.embedding(indices, self.codebook.float()), "b t h w c -> b c t h w")

    @torch.no_grad()
    def update(self) -> None:
        """Change the codebook by what was collected since the last update, over all processes, which all call this.

        A code that was not used stays where it is, unless it restarts. If nothing was collected nothing changes.
        """
        totals, candidates = self._totals, self._candidates
        self.discard()
        if totals is None:
            totals = self.sums.new_zeros(self.num_codes, self.channels + 1, dtype=torch.float64)
        if candidates is None:
            candidates = Candidates(totals.new_zeros(0, 3), totals.new_zeros(0, self.channels, dtype=torch.float32))
        totals = self.reduce_sum(totals)
        num_latents = float(totals[:, 0].sum())
        if not num_latents:
            return
        if not self.initialized:
            self._start(candidates, num_latents)
            return
        self._move(totals[:, 0], totals[:, 1:])
        self._restart(candidates)

    def discard(self) -> None:
        """Forget what was collected since the last update."""
        #: (num_codes, 1 + channels) float64: uses of each code, and the sum of the latents that used it.
        self._totals: Tensor | None = None
        #: At most num_codes latents of this process.
        self._candidates: Candidates | None = None

    def usage(self) -> dict[str, float]:
        """Describe how evenly the codes are used, over the moving averages; all 0 before the first update.

        Returns:
            "perplexity", in codes: ``num_codes`` for even use; "used", the share of codes with a hundredth of an even
            share or more; "dead", the share of codes below the limit of restarts.
        """
        if not self.initialized:
            return {"perplexity": 0.0, "used": 0.0, "dead": 0.0}
        counts = self.counts.double()
        share = counts / counts.sum()
        values = [
            torch.special.entr(share).sum().exp(),
            (share >= 0.01 / self.num_codes).double().mean(),
            (self.counts < self._restart_limit()).double().mean(),
        ]
        return dict(zip(("perplexity", "used", "dead"), torch.stack(values).tolist(), strict=True))

    @torch.no_grad()
    def _collect(self, vectors: Tensor, index: Tensor, draws: Tensor, seed: int, weight: Tensor | None) -> None:
        """Add samples: vectors (b, p, d), index (b, t, h, w)."""
        if draws.shape != (len(vectors),):
            raise ValueError(f"draws: got shape {tuple(draws.shape)}, needed {(len(vectors),)}")
        if weight is not None:
            kept = weight.to(vectors.device) > 0
            vectors, index, draws = vectors[kept], index[kept], draws[kept.to(draws.device)]
        if not len(vectors):
            return
        rows = vectors.flatten(0, 1)
        if self._totals is None:
            self._totals = rows.new_zeros(self.num_codes, self.channels + 1, dtype=torch.float64)
        # float64: the order of the sum, which differs between layouts, is below what fp32 keeps of it.
        ones = rows.new_ones(len(rows), 1)
        self._totals.index_add_(0, index.flatten(), torch.cat([ones, rows], dim=1).double())
        if self.initialized and not self.config.restart_below:
            return
        priority = DrawRandom(seed, draws.tolist()).uniform(index.shape[1:], "restart").flatten(1)
        found = Candidates.of(rows, priority, draws)
        if self._candidates is not None:
            found = found.merge(self._candidates)
        self._candidates = found.first(self.num_codes)

    def _start(self, candidates: Candidates, num_latents: float) -> None:
        vectors = candidates.gathered(self.num_codes, self.gather_rows)
        self.codebook.copy_(repeat_with_jitter(vectors, self.num_codes))
        # As if the batch had been shared evenly among its own latents; repeats start without uses.
        self.counts.zero_()
        self.counts[: len(vectors)] = num_latents / len(vectors)
        self.sums.copy_(self.codebook * self.counts[:, None])
        self.initialized.fill_(True)

    def _move(self, counts: Tensor, sums: Tensor) -> None:
        """Average the uses (k,) and sums (k, d) of an update in, and put each code that was used at its mean."""
        decay, epsilon = self.config.decay, self.config.epsilon
        averaged = decay * self.counts.double() + (1 - decay) * counts
        self.sums.copy_(decay * self.sums.double() + (1 - decay) * sums)
        self.counts.copy_(averaged)
        total = averaged.sum()
        smoothed = (averaged + epsilon) * (total / (total + self.num_codes * epsilon))
        used = counts > 0
        self.codebook[used] = (self.sums[used] / smoothed[used, None]).to(self.codebook.dtype)

    def _restart(self, candidates: Candidates) -> None:
        limit = self._restart_limit()
        dead = (self.counts < limit).nonzero().flatten()
        if not len(dead):
            return
        vectors = candidates.gathered(len(dead), self.gather_rows)
        dead = dead[: len(vectors)]
        # Twice the limit: one time constant of the average to be used in.
        self.codebook[dead] = vectors.to(self.codebook.dtype)
        self.counts[dead] = 2 * limit
        self.sums[dead] = self.codebook[dead] * self.counts[dead, None]

    def _restart_limit(self) -> Tensor:
        return (0.5 * self.counts.mean()).clamp_max(self.config.restart_below)


def _column(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1, 1)


def _check_latents(z: Tensor, channels: int) -> None:
    if z.ndim != 5 or z.shape[1] != channels or not z.numel():
        raise ValueError(f"latents: got shape {tuple(z.shape)}, needed (b, {channels}, t, h, w)")


def _check_indices(indices: Tensor, num_codes: int) -> None:
    low, high = (int(value) for value in indices.aminmax())
    if low < 0 or high >= num_codes:
        raise ValueError(f"indices: got {low} to {high}, needed 0 to {num_codes - 1}")
