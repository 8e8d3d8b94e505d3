"""What a pass over a micro-batch amounts to, and its sums over a step; a count may be known to the device alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltd.nn.flops import Number
from ltd.planning import Workload

_SUMMED = ("tokens", "computed", "real", "model_flops", "repeated_flops", "encoder_flops")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one forward and backward pass amounts to; see ``Workload`` for the counts."""

    tokens: Number
    computed: Number
    real: Number
    model_flops: Number
    repeated_flops: Number = 0.0
    #: Where each sample's time lies in the distribution of training times, in [0, 1); none without times.
    quantiles: Sequence[float] = ()
    #: Whether each sample's caption was dropped; none without captions.
    dropped: Sequence[bool] = ()


class Counts:
    """Sums of a step's work on one process."""

    def __init__(self) -> None:
        self._sums: dict[str, Number] = dict.fromkeys(_SUMMED, 0.0)

    def add(self, work: Work) -> None:
        """Add a pass."""
        for name in _SUMMED[:-1]:
            self._sums[name] = self._sums[name] + getattr(work, name)

    def add_encoders(self, flops: float) -> None:
        """Add operations of frozen encoders."""
        self._sums["encoder_flops"] = self._sums["encoder_flops"] + flops

    def packed(self, like: Tensor) -> Tensor:
        """Put the sums into one tensor of the device and type of ``like``; waits for nothing."""
        values = like.new_tensor([0.0 if isinstance(x, Tensor) else float(x) for x in self._sums.values()])
        for place, value in enumerate(self._sums.values()):
            if isinstance(value, Tensor):
                values[place] = value.detach()
        return values

    @staticmethod
    def workload(values: Sequence[float], samples: float, sequence: int) -> Workload:
        """Name the sums over all processes.

        Args:
            values: Sums of what ``packed`` gave, divided by the sequence degree.
            samples: Samples with a weight; 0 for a step in which all failed, which counts no tokens.
            sequence: Sequence degree; encoders see each sample once.

        Returns:
            The step's work.
        """
        named = dict(zip(_SUMMED, values, strict=True))
        named["encoder_flops"] *= sequence
        return Workload(samples=samples, **named) if samples else Workload()


def count_real(weight: Tensor, tokens: Tensor | Sequence[int]) -> Tensor:
    """Count the tokens of samples with a weight, on the weights' device.

    Args:
        weight: ``(b,)``.
        tokens: Tokens of each sample.

    Returns:
        A number, 0-d float64.
    """
    counts = tokens if isinstance(tokens, Tensor) else torch.tensor(tokens).to(weight.device, non_blocking=True)
    return torch.where(weight > 0, counts.double(), 0).sum()
