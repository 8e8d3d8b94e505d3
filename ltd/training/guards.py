"""What happens when the numbers of a step go wrong: stop, skip the step, or go back; and what counts as wrong.

Every decision is a function of sums over all processes and of the steps before, so all processes decide alike, and a
resumed run as the untouched one would. Knows no engine and no file.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.data import Batch, MicroBatch, PackedBatch

Policy = Literal["stop", "skip", "rewind"]

#: Steps that must have been taken before spikes are looked for.
_LEAST = 10


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a step is not taken, and what is done instead.

    ``stop`` ends the run before the step, with a checkpoint of the steps before. ``skip`` leaves the step out.
    ``rewind`` goes on from the last checkpoint. With the latter two the samples at fault weigh nothing from then on.
    """

    #: What a loss or gradient that is not finite does.
    non_finite: Policy = "stop"
    #: What a spike does; ``ignore`` looks for none.
    spike: Literal["ignore", "stop", "skip", "rewind"] = "ignore"
    #: A loss above this times the median of the last ``window`` steps is a spike; above 1. A median of 0 or less is
    #: compared with nothing.
    loss_factor: float = 3.0
    #: The same for the gradient norm before clipping.
    grad_factor: float = 10.0
    #: Steps that the medians are over, 10 or more.
    window: int = 100
    #: Steps that may be skipped or gone back from in the whole run; one more stops it.
    max_discarded: int = 100

    def __post_init__(self) -> None:
        for name in ("loss_factor", "grad_factor"):
            if not getattr(self, name) > 1:
                raise ConfigError(f"{name}: a factor of the median, got {getattr(self, name)}, needed more than 1")
        if self.window < _LEAST:
            raise ConfigError(f"window: steps, got {self.window}, needed {_LEAST} or more")
        if self.max_discarded < 0:
            raise ConfigError(f"max_discarded: steps, got {self.max_discarded}, needed 0 or more")


class GuardError(RuntimeError):
    """A step that must not be taken, while the policy is to stop; raised on every process before any weight changed."""


@dataclass(frozen=True)
class Incident:
    """Why a step is not taken."""

    #: ``non_finite``, ``loss_spike`` or ``gradient_spike``: what the quarantine counts by.
    cause: str
    #: What was found.
    message: str
    policy: Policy


class Guards:
    """Watch losses and gradient norms, and remember the samples that were at fault.

    Args:
        config: Limits and policies.
        state: What ``state()`` gave when the checkpoint was saved; None for a new run.
    """

    def __init__(self, config: GuardConfig, state: dict[str, Any] | None = None) -> None:
        self.config = config
        #: Ids (``Batch.ids``) of the samples that weigh nothing from now on.
        self.excluded: set[str] = set()
        self.num_discarded = 0
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self.restore(state or {})

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the history of a checkpoint; what is excluded and counted already stays so.

        Args:
            state: What ``state()`` gave.
        """
        self.excluded |= set(state.get("excluded", ()))
        self.num_discarded = max(self.num_discarded, int(state.get("num_discarded", 0)))
        for history, name in ((self._losses, "losses"), (self._norms, "norms")):
            history.clear()
            history.extend(state.get(name, ()))

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps, as plain values."""
        return {
            "excluded": sorted(self.excluded),
            "num_discarded": self.num_discarded,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def mask(self, batch: MicroBatch) -> MicroBatch:
        """Set the weight and the data of excluded samples to 0, as those of samples that could not be read.

        Args:
            batch: On the CPU.

        Returns:
            The batch itself where nothing is excluded.
        """
        if not self.excluded or self.excluded.isdisjoint(batch.ids):
            return batch
        if isinstance(batch, PackedBatch):
            return PackedBatch(tuple(self._masked(group) for group in batch.groups))
        return self._masked(batch)

    def judge(self, means: dict[str, float], main: str) -> Incident | None:
        """Look at the losses of a step before its update.

        Args:
            means: Mean of each term over the global batch.
            main: Name of the term that is differentiated.

        Returns:
            Why the step must not be taken, if so.
        """
        for name, value in means.items():
            if not math.isfinite(value):
                return self._incident("non_finite", f"loss term {name!r} is {value}", self.config.non_finite)
        limit = self._limit(self._losses, self.config.loss_factor)
        if means[main] > limit and self.config.spike != "ignore":
            what = f"loss {means[main]:.6g} is above {limit:.6g} = {self.config.loss_factor:g} x the median"
            return self._incident("loss_spike", what, self.config.spike)
        return None

    def gradient_limit(self) -> float:
        """Give the largest gradient norm that may be applied; infinite where none is set or known yet."""
        return self._limit(self._norms, self.config.grad_factor)

    def judge_gradient(self, norm: float) -> Incident:
        """Say why a step with this gradient norm was not taken.

        Args:
            norm: Not finite, or above ``gradient_limit()``.

        Returns:
            The incident.
        """
        if not math.isfinite(norm):
            what = f"the summed gradient's norm is {norm}"
            return self._incident("non_finite", what, self.config.non_finite)
        assert self.config.spike != "ignore"
        limit = self.gradient_limit()
        what = f"gradient norm {norm:.6g} is above {limit:.6g} = {self.config.grad_factor:g} x the median"
        return self._incident("gradient_spike", what, self.config.spike)

    def applied(self, loss: float, norm: float) -> None:
        """Note a step that was taken."""
        self._losses.append(loss)
        self._norms.append(norm)

    def exclude(self, ids: Iterable[str]) -> None:
        """Give samples no weight from now on, and count the step as discarded."""
        self.excluded |= set(ids)
        self.num_discarded += 1

    def _incident(self, cause: str, message: str, policy: Policy) -> Incident:
        if policy != "stop" and self.num_discarded >= self.config.max_discarded:
            message += f"; guards.max_discarded = {self.config.max_discarded} steps were discarded already"
            policy = "stop"
        return Incident(cause, message, policy)

    def _limit(self, history: deque[float], factor: float) -> float:
        if self.config.spike == "ignore" or len(history) < _LEAST:
            return math.inf
        median = statistics.median(history)
        return factor * median if median > 0 else math.inf

    def _masked(self, batch: Batch) -> Batch:
        out = torch.tensor([name in self.excluded for name in batch.ids])
        # The data too: 0 times a gradient that is not finite would not be 0.
        zeroed: dict[str, Any] = {
            f.name: value.masked_fill(out.view(-1, *[1] * (value.ndim - 1)), 0)
            for f in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, f.name), Tensor)
        }
        return dataclasses.replace(batch, **zeroed)
