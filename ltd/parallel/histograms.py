"""Histograms of weights and optimizer state over all processes, from each process's shards: nothing is gathered.

Bins are fixed and symmetric, with logarithmic widths, so that counts of processes and of steps add up. Values are of
the fp32 masters and of Adam's first moment, the running mean of the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltd.parallel.interface import Engine, decay_groups, flat
from ltd.parallel.layout import Layout

#: Exponents of the smallest and the largest edge, and edges per factor of 10.
_SMALLEST, _LARGEST, _PER_DECADE = -12, 4, 4
#: Elements looked at in one operation, so that little memory is needed beside the shards.
_CHUNK = 2**22


def bin_edges() -> list[float]:
    """List the edges: -10^4 ... -10^-12, 10^-12 ... 10^4, four to a factor of 10; zeros lie in the middle bin."""
    exponents = range(_SMALLEST * _PER_DECADE, _LARGEST * _PER_DECADE + 1)
    positive = [10.0 ** (exponent / _PER_DECADE) for exponent in exponents]
    return [*(-edge for edge in reversed(positive)), *positive]


def count_bins(values: Tensor, edges: Tensor) -> Tensor:
    """Count values per bin.

    Args:
        values: Any shape; what is not finite is not counted.
        edges: (n + 1,), ascending, float64, on the device of ``values``.

    Returns:
        (n,) int64: values in [edges[i], edges[i + 1]); those beyond the ends are in the first and the last bin.
    """
    num_bins = len(edges) - 1
    total = edges.new_zeros(num_bins, dtype=torch.int64)
    for part in flat(values).split(_CHUNK):
        finite = part[torch.isfinite(part)].double()
        bins = (torch.bucketize(finite, edges, right=True) - 1).clamp_(0, num_bins - 1)
        total += torch.bincount(bins, minlength=num_bins)
    return total


@torch.no_grad()
def shard_histograms(engine: Engine, layout: Layout, kinds: tuple[str, ...]) -> dict[str, list[int]]:
    """Count the values of an engine's shards over all processes, by group of parameters; called by all processes.

    Args:
        engine: The engine.
        layout: This process's position.
        kinds: ``master`` (the weights), and names of optimizer state, the same on all processes.

    Returns:
        Counts per bin of ``bin_edges()`` by ``KIND/GROUP``, where groups are the model's ``decay`` and ``no_decay``.
    """
    groups = {name: group for group, names in decay_groups(engine.module).items() for name in names}
    keys = [(kind, group) for kind in kinds for group in ("decay", "no_decay")]
    edges, num_bins = torch.tensor(bin_edges(), dtype=torch.float64), len(bin_edges()) - 1
    counts = {key: torch.zeros(num_bins, dtype=torch.int64) for key in keys}
    for shard in engine.master_shards():
        if not shard.owner:
            continue
        for kind in kinds:
            values = shard.data if kind == "master" else shard.state.get(kind)
            if values is not None:
                counts[kind, groups[shard.name]] += count_bins(values, edges.to(values.device)).cpu()
    # As float64, which holds every count below 2^53, in one collective.
    summed = layout.sum_(torch.stack([counts[key] for key in keys]).double().to(layout.device))
    return {f"{kind}/{group}": row for (kind, group), row in zip(keys, summed.long().tolist(), strict=True)}
