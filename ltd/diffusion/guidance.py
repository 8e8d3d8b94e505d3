"""Classifier-free guidance as a wrapper of any denoiser ``(x_t, t, cond) -> v``. Conditions are opaque here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltd.config import ConfigError

Denoiser = Callable[[Tensor, Tensor, Any], Tensor]
#: (conditions, times (k,)) -> conditions for each of the times.
PrepareSteps = Callable[[Any, Tensor], Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """How strongly, when and where the condition is exaggerated."""

    scale: float = 1.0
    """w in v_null + w (v_cond - v_null), 0 or more; 1 = off, the second pass is skipped."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times (noise-at-1) between which guidance acts, ends included; outside, the conditional velocity is used."""
    channels: int | None = None
    """Only the first channels of the latents are guided; null = all. DiT, SiT and LightningDiT report scales for 3."""
    rescale: float = 0.0
    """Share, 0 to 1, of the guided velocity that is brought back to the standard deviation of the conditional one."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ConfigError(f"scale: got {self.scale}, needed a finite number (1 = off)")
        if self.scale < 0:  # away from the condition: what a negative prompt is for
            raise ConfigError(f"scale: got {self.scale}, needed 0 or more (1 = off)")
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
    prepare_steps: PrepareSteps | None = None,
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
        prepare_steps: The same for all times of a sampler, which are known beforehand: ``(cond, times) -> conditions``,
            one for each time. Takes the place of ``prepare`` for what ``Guided.ready`` made.

    Returns:
        A denoiser, ``Guided``; the given one itself when the scale is 1 and nothing is prepared.
    """
    if config.scale == 1 and prepare is None and prepare_steps is None:
        return denoiser
    return Guided(denoiser, null_cond, config, guide=guide, stack=stack, prepare=prepare, prepare_steps=prepare_steps)


@dataclass(eq=False)
class Guided:
    """A denoiser with guidance, as ``guided`` makes it; the fields are its arguments."""

    denoiser: Denoiser
    null_cond: Any
    config: GuidanceConfig
    guide: Denoiser | None = None
    stack: Callable[[list[Any]], Any] | None = None
    prepare: Callable[[Any], Any] | None = None
    prepare_steps: PrepareSteps | None = None

    def __post_init__(self) -> None:
        self._once = _Once(self.prepare)

    def ready(self, cond: Any, times: Tensor) -> list[Any]:
        """Make conditions ready for all steps of a sampler at once.

        Args:
            cond: Conditions of ``b`` rows.
            times: Times ``(k,)`` that will be asked about, on the CPU.

        Returns:
            What to pass as ``cond`` at each of the times: what depends on conditions and times alone is in it, and
            whether guidance acts, so that no step looks.
        """
        low, high = self.config.interval
        inside = (times >= low) & (times <= high) & (self.config.scale != 1)
        joins = self.guide is None and self.stack is not None
        found = [_Step(cond, acts) for acts in inside.tolist()]
        alone = ~inside if joins else torch.ones_like(inside)
        for step, own in self._made(found, cond, times, alone):
            step.own = own
        if joins and bool(inside.any()):
            assert self.stack is not None
            for step, both in self._made(found, self.stack([cond, self.null_cond]), times, inside):
                step.both = both
        elif self.guide is None:
            for step, null in self._made(found, self.null_cond, times, inside):
                step.null = null
        return list(found)

    def _made(self, steps: list[_Step], cond: Any, times: Tensor, chosen: Tensor) -> Iterator[tuple[_Step, Any]]:
        """Prepare a condition for some of the steps."""
        wanted = [step for step, taken in zip(steps, chosen.tolist(), strict=True) if taken]
        if not wanted:
            return
        if self.prepare_steps is not None:
            yield from zip(wanted, self.prepare_steps(cond, times[chosen]), strict=True)
            return
        ready = cond if self.prepare is None else self.prepare(cond)
        yield from ((step, ready) for step in wanted)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Return the guided velocity ``(b, ...)`` at times ``(b,)``; ``cond`` may be one that ``ready`` made."""
        inside: Tensor | None = None
        if isinstance(cond, _Step):
            acts = cond.acts
        elif self.config.scale == 1:
            acts = False
        elif self.config.interval == (0.0, 1.0):
            acts = True
        else:
            low, high = self.config.interval
            inside = (t >= low) & (t <= high)
            acts = bool(inside.any())
        if not acts:
            return self.denoiser(x_t, t, cond.own if isinstance(cond, _Step) else self._once("own", cond))
        v_cond, v_null = self._both(x_t, t, cond)
        v = v_null + self.config.scale * (v_cond - v_null)
        if self.config.rescale:
            v = _rescaled(v, v_cond, self.config.rescale)
        if self.config.channels is not None:
            v = torch.cat((v[:, : self.config.channels], v_cond[:, self.config.channels :]), dim=1)
        return v if inside is None else torch.where(inside.reshape(-1, *[1] * (v.ndim - 1)), v, v_cond)

    def _both(self, x_t: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        """Ask for the velocities of the condition and of what is led away from."""
        step = cond if isinstance(cond, _Step) else None
        if self.guide is None and self.stack is not None:
            stack = self.stack
            both = step.both if step else self._once("both", cond, lambda own: stack([own, self.null_cond]))
            v_cond, v_null = self.denoiser(_twice(x_t), _twice(t), both).chunk(2)
            return v_cond, v_null
        v_cond = self.denoiser(x_t, t, step.own if step else self._once("own", cond))
        if self.guide is not None:
            return v_cond, self.guide(x_t, t, step.cond if step else cond)
        return v_cond, self.denoiser(x_t, t, step.null if step else self._once("null", self.null_cond))


@dataclass
class _Step:
    """Conditions of one step."""

    cond: Any
    acts: bool
    own: Any = None
    null: Any = None
    both: Any = None


def _twice(x: Tensor) -> Tensor:
    """Put rows ``(b, ...)`` twice behind one another; a single one without a copy."""
    return x.expand(2, *x.shape[1:]) if len(x) == 1 else torch.cat((x, x))


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
