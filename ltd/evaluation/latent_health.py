"""What goes on inside an autoencoder: health of its latents and codes, spikes in its activations, spectra of maps.

Accumulators merge over processes. Latents come as posterior means and log-variances; knows no autoencoder, no files.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

#: Radial bins of a spectrum, of equal width, from 0 to the Nyquist frequency of 1/2 cycle per position.
RADIAL_BINS = 32
#: Distance from its map's mean, in standard deviations of that map, beyond which a position may be a droplet.
DROPLET_SIGMAS = 10.0
#: Share of a map's variance that such positions hold where they dominate its normalisation.
DROPLET_DOMINANCE = 0.5
#: A channel is dead when the variance of its mean over data is at most this share of its posterior's mean variance: it
#: then tells less than 1/2 ln 1.01 = 0.005 nats of a position ...
DEAD_SHARE_OF_POSTERIOR = 1e-2
#: ... or at most this share of the largest channel's: 1 % of its amplitude.
DEAD_SHARE_OF_LARGEST = 1e-4

_SMALLEST_MAP = 8  # sides of a map whose spectrum has enough rings to fit a line through


class LatentHealth:
    """Statistics per channel of posterior means and of their spectrum, in float64; mergeable over processes.

    Means and squares are those of the posterior's mean, not of its samples.

    Reference: Chan, Golub and LeVeque (1983), Eq. 2.1 (pairwise update); Burda et al. (2015), arXiv 1509.00519 (the
    activity of a latent is the variance of its mean over data); Skorokhodov et al. (2025), arXiv 2502.14831 (spectrum).
    """

    def __init__(self) -> None:
        self._moments: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def update(self, mean: Tensor, logvar: Tensor | None = None) -> None:
        """Count a batch of raw latents.

        Args:
            mean: ``(b, c, t, h, w)`` means of the posterior, or latents that have none.
            logvar: Logarithms of the posterior's variances, the same shape; None where there are none.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if mean.dim() != 5 or mean.numel() == 0:
            raise ValueError(f"got latents {tuple(mean.shape)}, needed (b, c, t, h, w)")
        if logvar is not None and logvar.shape != mean.shape:
            raise ValueError(f"mean and logvar differ in shape: {tuple(mean.shape)} and {tuple(logvar.shape)}")
        rows = mean.detach().double().movedim(1, 0).flatten(1)  # (c, values)
        center = rows.mean(1)
        squares, count = (rows - center[:, None]).square().sum(1), torch.tensor(rows.shape[1])
        self._combine(count=count, center=center, squares=squares, least=rows.amin(1), most=rows.amax(1))
        if logvar is not None:
            log_variance = logvar.detach().double().movedim(1, 0).flatten(1)
            variance = log_variance.exp()
            self._add(
                posterior_count=count,
                variance=variance.sum(1),
                kl=0.5 * (rows.square() + variance - 1 - log_variance).sum(1),
            )
        if min(mean.shape[3:]) >= _SMALLEST_MAP:
            self._add_spectrum(mean)

    @property
    def mean(self) -> Tensor:
        """Mean per channel, ``(c,)``."""
        return self._moment("center")

    @property
    def std(self) -> Tensor:
        """Standard deviation per channel of the posterior's mean over data, ``(c,)``."""
        return (self._moment("squares") / self._moment("count")).sqrt()

    @property
    def posterior_std(self) -> Tensor | None:
        """Root of the posterior's mean variance per channel, ``(c,)``; None without log-variances."""
        return (self._sums["variance"] / self._sums["posterior_count"]).sqrt() if "variance" in self._sums else None

    @property
    def kl(self) -> Tensor | None:
        """Mean divergence from the standard normal per channel, ``(c,)`` nats per position; None without log-variances.

        Reference: Kingma and Welling (2013), arXiv 1312.6114, App. B.
        """
        return self._sums["kl"] / self._sums["posterior_count"] if "kl" in self._sums else None

    @property
    def dead(self) -> Tensor:
        """Channels that tell nothing of the data by either ``DEAD_SHARE_`` constant, ``(c,)`` bool."""
        variance, posterior_std = self.std.square(), self.posterior_std
        alive = variance > DEAD_SHARE_OF_LARGEST * variance.max()
        if posterior_std is not None:
            alive &= variance > DEAD_SHARE_OF_POSTERIOR * posterior_std.square()
        return ~alive

    @property
    def max_abs(self) -> float:
        """Largest absolute latent."""
        return float(torch.maximum(-self._moment("least"), self._moment("most")).max())

    @property
    def max_sigmas(self) -> float:
        """Largest distance of a latent from its channel's mean in the channel's ``std``, over channels not dead."""
        distance = torch.maximum(self.mean - self._moment("least"), self._moment("most") - self.mean)
        alive = ~self.dead
        return float((distance / self.std)[alive].max()) if alive.any() else math.nan

    @property
    def spectrum_slope(self) -> float | None:
        """Slope of the logarithm of the radially averaged power over that of frequency: -a for power f^-a, 0 for white.

        Every channel that is not dead counts at unit variance, as a denoiser sees it. The line is that of least squares
        over the radial bins of ``radial_spectrum`` from 1/64 to 1/2 cycle per position. The window makes
        steep spectra of small maps look steeper (-2 and -3 on 16 x 16 give -2.1 and -3.3). None without maps of 8 x 8.
        """
        alive = ~self.dead
        if "power" not in self._sums or not alive.any():
            return None
        counts = self._sums["bin_counts"]
        used = (counts > 0) & (torch.arange(RADIAL_BINS) > 0)
        power = (self._sums["power"][alive] / self._sums["power"][alive].sum(1, keepdim=True)).sum(0)
        x = (self._sums["log_frequencies"] / counts)[used]
        y = (power / counts)[used].log()
        x = x - x.mean()
        return float((x * y).sum() / x.square().sum())

    def values(self) -> dict[str, float]:
        """Give the figures over all channels, by name; those that were not measured are left out."""
        found: dict[str, float | None] = {
            "mean_abs_max": float(self.mean.abs().max()),
            "std_min": float(self.std.min()),
            "std_max": float(self.std.max()),
            "dead_channels": float(self.dead.sum()),
            "max_abs": self.max_abs,
            "max_sigmas": self.max_sigmas,
            "spectrum_slope": self.spectrum_slope,
        }
        if self.kl is not None:
            found |= {f"kl_nats_{name}": float(getattr(self.kl, name)()) for name in ("mean", "min", "max")}
        return {name: value for name, value in found.items() if value is not None}

    def channels(self) -> dict[str, list[float]]:
        """Give every figure per channel, by name."""
        named = {"mean": self.mean, "std": self.std, "posterior_std": self.posterior_std, "kl_nats": self.kl}
        return {name: value.tolist() for name, value in named.items() if value is not None}

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: plain numbers."""
        moments = {name: value.tolist() for name, value in self._moments.items()}
        return {"moments": moments, "sums": {name: value.tolist() for name, value in self._sums.items()}}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has counted.

        Args:
            state: Its ``state()``.

        Raises:
            ValueError: If it counted other channels.
        """
        moments = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["moments"].items()}
        if moments:
            self._combine(**moments)
        self._add(**{name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()})

    def _add_spectrum(self, mean: Tensor) -> None:
        for clip in mean.detach().double():
            for frame in clip.unbind(1):  # (c, h, w)
                power, logs, counts = radial_spectrum(frame)
                self._add(power=power, log_frequencies=logs, bin_counts=counts)

    def _combine(self, **new: Tensor) -> None:
        new = {name: value.double().cpu() for name, value in new.items()}
        if not self._moments:
            self._moments = new
            return
        old = self._moments
        if old["center"].shape != new["center"].shape:
            raise ValueError(f"got latents of {len(new['center'])} channels after {len(old['center'])}")
        total = old["count"] + new["count"]
        delta = new["center"] - old["center"]
        self._moments = {
            "count": total,
            "center": old["center"] + delta * (new["count"] / total),
            "squares": old["squares"] + new["squares"] + delta.square() * (old["count"] * new["count"] / total),
            "least": torch.minimum(old["least"], new["least"]),
            "most": torch.maximum(old["most"], new["most"]),
        }

    def _add(self, **totals: Tensor) -> None:
        for name, total in totals.items():
            total = total.double().cpu()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def _moment(self, name: str) -> Tensor:
        if not self._moments:
            raise ValueError("no latents were counted yet: update or merge first")
        return self._moments[name]


class CodeUsage:
    """Histogram of the codes that a quantiser chose; mergeable over processes.

    Args:
        num_codes: Size of the codebook.
    """

    def __init__(self, num_codes: int) -> None:
        self.counts = torch.zeros(num_codes, dtype=torch.int64)

    def update(self, indices: Tensor) -> None:
        """Count codes.

        Args:
            indices: Any shape, integers in 0..num_codes - 1.

        Raises:
            ValueError: If an index is outside the codebook.
        """
        flat = indices.detach().flatten().long().cpu()
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < len(self.counts):
            raise ValueError(f"got code {int(flat.min())}..{int(flat.max())}, needed 0..{len(self.counts) - 1}")
        self.counts += torch.bincount(flat, minlength=len(self.counts))

    @property
    def perplexity(self) -> float:
        """Exponential of the histogram's entropy: the number of codes that would, used evenly, tell as much."""
        share = self.counts.double() / self._total()
        return float(torch.special.entr(share).sum().exp())

    @property
    def share_unused(self) -> float:
        """Share of the codes that were never chosen; means little before many times ``num_codes`` were counted."""
        self._total()
        return float((self.counts == 0).double().mean())

    def values(self) -> dict[str, float]:
        """Give the figures by name."""
        return {"perplexity": self.perplexity, "share_unused": self.share_unused}

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: plain numbers."""
        return {"counts": self.counts.tolist()}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has counted.

        Args:
            state: Its ``state()``.

        Raises:
            ValueError: If its codebook has another size.
        """
        counts = torch.tensor(state["counts"], dtype=torch.int64)
        if counts.shape != self.counts.shape:
            raise ValueError(f"got counts of {len(counts)} codes, needed {len(self.counts)}")
        self.counts += counts

    def _total(self) -> int:
        total = int(self.counts.sum())
        if total == 0:
            raise ValueError("no codes were counted yet: update or merge first")
        return total


class ActivationProbe:
    """Collects what named submodules put out, until ``close``; a context manager.

    Args:
        module: Module whose submodules are watched.
        names: Their names, as in ``module.named_modules()``. An output that is a tuple counts with its first tensor.
        each: Is given the name and every output, detached, as it comes; nothing is collected then.

    Raises:
        ValueError: If there is no submodule of a name.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], each: Callable[[str, Tensor], None] | None = None
    ) -> None:
        self._each = each
        self._collected: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        known = dict(module.named_modules())
        for name in names:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                raise ValueError(f"no submodule {name}" + (f"; nearest is {nearest[0]}" if nearest else ""))
        for name in names:
            self._handles.append(known[name].register_forward_hook(self._hook(name)))

    def take(self) -> dict[str, list[Tensor]]:
        """Give and forget what was collected since the last call, detached; call it often to keep memory low."""
        collected, self._collected = self._collected, {}
        return collected

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> ActivationProbe:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _hook(self, name: str) -> Any:
        def collect(_module: nn.Module, _inputs: object, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if self._each is None:
                self._collected.setdefault(name, []).append(tensor.detach())
            else:
                self._each(name, tensor.detach())

        return collect


def least_positions(sigmas: float = DROPLET_SIGMAS) -> int:
    """Count the positions that a map needs for one of them to lie so far from its mean."""
    return int(sigmas**2) + 2


def droplets(activation: Tensor, sigmas: float = DROPLET_SIGMAS) -> tuple[Tensor, Tensor]:
    """Find the positions of every map that lie far from the map's mean; positions that are not numbers are far.

    What fills a share s of its map lies at most ``sqrt(1 / s - 1)`` standard deviations from the mean: at 10, spots of
    up to 1 % of a map can be found, in maps of at least 102 positions.

    Args:
        activation: ``(b, c, h, w)`` or ``(b, c, t, h, w)``; every frame of a channel is a map.
        sigmas: How far, in standard deviations of the map.

    Returns:
        ``(b, c)`` or ``(b, c, t)``: the number of far positions, and the share of the map's variance that they hold (0
        in a constant map, NaN in one with a NaN).

    Raises:
        ValueError: If the shape is another one, or no position of so small a map could be so far off.
    """
    if activation.dim() not in (4, 5):
        raise ValueError(f"got activation {tuple(activation.shape)}, needed (b, c, h, w) or (b, c, t, h, w)")
    positions = activation.shape[-1] * activation.shape[-2]
    if positions < least_positions(sigmas):
        raise ValueError(f"got maps of {positions} positions, needed more than {sigmas**2 + 1:g} for {sigmas:g} sigmas")
    maps = activation.detach().double().flatten(-2)
    squares = (maps - maps.mean(-1, keepdim=True)).square()
    far = ~(squares <= sigmas**2 * squares.mean(-1, keepdim=True))
    total = squares.sum(-1)
    return far.sum(-1), torch.where(total == 0, 0.0, (squares * far).sum(-1) / total)


def power_spectrum(maps: Tensor) -> Tensor:
    """Compute the power of maps at every frequency, under a Hann window and without their mean.

    Args:
        maps: ``(n, h, w)`` float64.

    Returns:
        ``(n, h, w)`` in the order of ``fft2``; white noise of variance v has mean power v. Power at one frequency
        spreads to bins next to it and no further.
    """
    height, width = maps.shape[-2:]
    rows = torch.hann_window(height, dtype=maps.dtype, device=maps.device)
    window = rows[:, None] * torch.hann_window(width, dtype=maps.dtype, device=maps.device)
    mean = (maps * window).mean((-2, -1), keepdim=True) / window.mean()
    return torch.fft.fft2((maps - mean) * window).abs().square() / window.square().sum()


def radial_spectrum(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the power of maps over rings of frequencies.

    Args:
        maps: ``(n, h, w)`` float64.

    Returns:
        Power ``(n, RADIAL_BINS)`` summed over the frequencies of a bin, the sum of their natural logarithms (cycles per
        pixel) and their number, both ``(RADIAL_BINS,)``. Left out are zero and the frequencies next to it, where the
        window mixes in the mean that was taken away, and what lies above 1/2 cycle per pixel.
    """
    bins, logs = (tensor.to(maps.device) for tensor in _rings(*maps.shape[-2:]))
    power = power_spectrum(maps).flatten(1)
    inside = bins < RADIAL_BINS

    def gather(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), RADIAL_BINS).index_add_(1, bins[inside], values[:, inside])

    return gather(power), gather(logs[None])[0], gather(torch.ones_like(logs)[None])[0]


@lru_cache(maxsize=16)
def _rings(height: int, width: int) -> tuple[Tensor, Tensor]:
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    radius = (rows.square() + torch.fft.fftfreq(width, dtype=torch.float64).square()).sqrt().flatten()
    bins = (radius * 2 * RADIAL_BINS).long().clamp(max=RADIAL_BINS - 1)
    near_zero = torch.zeros(height, width, dtype=torch.bool)
    near_zero[-1:, [-1, 0, 1]] = near_zero[:2, [-1, 0, 1]] = True
    bins[(radius > 0.5) | near_zero.flatten()] = RADIAL_BINS
    return bins, torch.where(radius > 0, radius, 1.0).log()
