"""What a member of a sequence group holds of each sample of a pack; no processes needed to tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ltd.parallel.sequence import TokenSeam


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(5, 3, 8), (1,), (7, 1, 1, 1, 3), (2, 2), (1, 9)])
def test_lengths_are_those_of_the_slice_and_padding_is_the_last_samples(lengths: tuple[int, ...], degree: int) -> None:
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    size = -(-len(owners) // degree)
    padded = torch.cat((owners, owners[-1:].expand(size * degree - len(owners))))
    for rank in range(degree):
        seam = TokenSeam(SimpleNamespace(sequence=degree, sequence_rank=rank))  # type: ignore[arg-type]
        held = padded[rank * size : (rank + 1) * size]
        assert seam.lengths(lengths) == tuple(torch.bincount(held, minlength=len(lengths)).tolist())
