"""Vectors of a token's level: the rows that indexing gives, and its gradients, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ltd.denoisers.modulation import of_tokens


def _made(dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 4, (3, 50), generator=random)
    pull = torch.randn(3, 50, 8, generator=random).to(dtype)
    return torch.randn(rows, 4, 16, generator=random).to(dtype).requires_grad_(), levels, pull


def _by_index(vectors: tuple[Tensor, ...], levels: Tensor) -> list[Tensor]:
    return [torch.take_along_dim(vector, levels.unsqueeze(-1), 1) for vector in vectors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tokens_get_the_rows_of_their_levels_and_their_gradients(dtype: torch.dtype) -> None:
    made, levels, pull = _made(dtype, 3)
    found: list[list[Tensor]] = []
    for take in (of_tokens, _by_index):
        vectors = take(made.chunk(2, -1), levels)
        total = torch.stack([(vector * pull * (1 + i)).sum() for i, vector in enumerate(vectors)]).sum()
        found.append([*vectors, *torch.autograd.grad(total, made)])
    assert all(torch.equal(own, reference) for own, reference in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_share_one_row_of_vectors(dtype: torch.dtype) -> None:
    made, levels, _ = _made(dtype, 1)
    pairs = zip(of_tokens(made.chunk(2, -1), levels), _by_index(made.chunk(2, -1), levels), strict=True)
    assert all(torch.equal(own, reference) for own, reference in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_index_is_kept_for_every_channel(dtype: torch.dtype) -> None:
    made, levels, _ = _made(dtype, 3)
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        of_tokens(made.chunk(2, -1), levels)
    assert 0 < sum(kept.values()) <= 2 * levels.nbytes
