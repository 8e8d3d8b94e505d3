"""What a model computes once for many calls: the modulation of every step of a sampler, the tables of a grid."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ltd.denoisers.conditioning import Conditioning, Prepared, StepCondition

#: Numbers that the modulations of a sampler's steps may take: 1 GiB in fp32.
MAX_STEP_ELEMENTS = 1 << 28
#: Tables of positions that a model keeps.
MAX_TABLES = 16


def step_conditions(
    make: Callable[[Tensor, Conditioning], Any],
    cond: Conditioning,
    times: Tensor,
    *,
    vectors: int,
    known: bool,
    like: Tensor,
) -> list[StepCondition] | None:
    """Compute what modulates at every one of some times, in one product for all of them.

    Args:
        make: Maps times ``(r, k)`` and conditions of r rows to (of the blocks, of the last layer).
        cond: Prepared conditions of a batch.
        times: ``(steps,)``.
        vectors: How many vectors of the width of ``like`` a row has.
        known: Whether a sample has a second time, 0, of what is known of it.
        like: Weight ``(width, ...)``: device and dtype.

    Returns:
        One per time; a row of it for all samples where they are alike. None if that were more than
        ``MAX_STEP_ELEMENTS`` numbers.
    """
    assert cond.prepared is not None
    steps, varying = len(times), (cond.label, cond.scalars, cond.prepared.pooled)
    rows = next((len(field) for field in varying if field is not None), 1)
    if steps * rows * (1 + known) * vectors * len(like) > MAX_STEP_ELEMENTS:
        return None
    wide = times.to(like.device, torch.promote_types(like.dtype, torch.float32))
    columns = torch.stack((wide, torch.zeros_like(wide)), 1) if known else wide[:, None]
    label, scalars, pooled = (None if x is None else x.repeat(steps, *[1] * (x.ndim - 1)) for x in varying)
    alike = Conditioning(label=label, scalars=scalars, prepared=Prepared(cond.prepared.text, pooled=pooled))
    made = make(columns.repeat_interleave(rows, 0), alike)
    return [
        StepCondition(time, *_rows(made, slice(step * rows, (step + 1) * rows)))
        for step, time in enumerate(times.tolist())
    ]


def _rows(tree: Any, rows: slice) -> Any:
    if isinstance(tree, Tensor):
        return tree[rows]
    return None if tree is None else tuple(_rows(part, rows) for part in tree)


class Tables:
    """Tables that depend on the grid of tokens alone, for the last few grids."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable | None, make: Callable[[], Any]) -> Any:
        """Make a table, or find it under its key; without a key it is made."""
        if key is None:
            return make()
        if key not in self._kept:
            if len(self._kept) >= MAX_TABLES:
                del self._kept[next(iter(self._kept))]
            with torch.inference_mode(False):  # an inference tensor would fail in a later backward pass
                self._kept[key] = make()
        self._kept[key] = self._kept.pop(key)  # now the last to go
        return self._kept[key]
