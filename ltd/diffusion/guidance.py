"""Classifier-free guidance as a wrapper of any denoiser ``(x_t, t, cond) -> v``. Conditions are opaque here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltd.config import ConfigError

Denoiser = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """How strongly, when and where the condition is exaggerated."""

    scale: float = 1.0
    """w in v_null + w (v_cond - v_null); 1 = off, the second pass is skipped."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times (noise-at-1) between which guidance acts, ends included; outside, the conditional velocity is used."""
    channels: int | None = None
    """Only the first channels of the latents are guided; null = all. DiT, SiT and LightningDiT report scales for 3."""
    rescale: float = 0.0
    """Share, 0 to 1, of the guided velocity that is brought back to the standard deviation of the conditional one."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"interval: got {self.interval}, needed 0 <= low <= high <= 1")
        if self.channels is not None and self.channels < 1:
            raise ConfigError(f"channels: got {self.channels}, needed 1 or more, or null for all")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"rescale: got {self.rescale}, needed within [0, 1]")


def guided(
    denoiser: Denoiser,
    null_cond: Any,
    config: GuidanceConfig,
    *,
    guide: Denoiser | None = None,
    stack: Callable[[list[Any]], Any] | None = None,
    prepare: Callable[[Any], Any] | None = None,
) -> Denoiser:
    """Wrap a denoiser with classifier-free guidance; a negative prompt is a ``null_cond`` like any other.

    Reference: Ho and Salimans (2022), arXiv 2207.12598, Eq. 6; interval: Kynkaanniemi et al. (2024), arXiv 2404.07724;
    rescaling: Lin et al. (2023), arXiv 2305.08891, Eq. 15-16, here of velocities; a weaker model in the place of no
    condition: Karras et al. (2024), arXiv 2406.02507, Eq. 3.

    Args:
        denoiser: Any ``(x_t, t, cond) -> v`` on ``b`` rows.
        null_cond: Condition to lead away from, for the same ``b`` rows; not looked at when the scale is 1.
        config: Scale, interval, channels and rescaling.
        guide: A weaker denoiser that takes the place of ``null_cond``: it sees the condition, and is led away from.
        stack: Joins a list of conditions row by row; with it both passes are one call on ``2 b`` rows.
        prepare: Does once what ``denoiser`` would do with the same conditions at every call; its result is given to
            ``denoiser`` in their place, never to ``guide``. For as long as the same object ``cond`` is passed.

    Returns:
        A denoiser; the given one itself when the scale is 1 and nothing is prepared.
    """
    low, high = config.interval
    once = _Once(prepare)
    if config.scale == 1:
        return denoiser if prepare is None else lambda x_t, t, cond: denoiser(x_t, t, once("own", cond))

    def both(x_t: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        if guide is not None:
            return denoiser(x_t, t, once("own", cond)), guide(x_t, t, cond)
        if stack is None:
            return denoiser(x_t, t, once("own", cond)), denoiser(x_t, t, once("null", null_cond))
        conditions = once("both", cond, lambda own: stack([own, null_cond]))
        v_cond, v_null = denoiser(torch.cat((x_t, x_t)), torch.cat((t, t)), conditions).chunk(2)
        return v_cond, v_null

    def wrapped(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        inside = (t >= low) & (t <= high)
        if not bool(inside.any()):
            return denoiser(x_t, t, once("own", cond))
        v_cond, v_null = both(x_t, t, cond)
        v = v_null + config.scale * (v_cond - v_null)
        if config.rescale:
            v = _rescaled(v, v_cond, config.rescale)
        if config.channels is not None:
            v = torch.cat((v[:, : config.channels], v_cond[:, config.channels :]), dim=1)
        return torch.where(inside.reshape(-1, *[1] * (v.ndim - 1)), v, v_cond)

    return wrapped


class _Once:
    """Conditions made ready for a denoiser, kept until others come.

    Args:
        prepare: What to do with them; None leaves them as they are.
    """

    def __init__(self, prepare: Callable[[Any], Any] | None) -> None:
        self.prepare = prepare
        self.kept: dict[str, tuple[Any, Any]] = {}

    def __call__(self, name: str, cond: Any, join: Callable[[Any], Any] | None = None) -> Any:
        """Join and prepare the conditions of a name, unless that was done with the same object before."""
        if name not in self.kept or self.kept[name][0] is not cond:
            joined = cond if join is None else join(cond)
            self.kept[name] = (cond, joined if self.prepare is None else self.prepare(joined))
        return self.kept[name][1]


def _rescaled(v: Tensor, v_cond: Tensor, share: float) -> Tensor:
    """Bring a share of each sample's guided velocity to the standard deviation of its conditional one."""
    dims = tuple(range(1, v.ndim))
    ratio = v_cond.std(dims, keepdim=True) / v.std(dims, keepdim=True).clamp_min(1e-12)
    return v * (share * ratio + 1 - share)
