"""What a member of a sequence group is dealt of tokens, packs and heads; no processes needed to tell."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from ltd.config import ConfigError
from ltd.denoisers import Dit, DitConfig
from ltd.parallel import sequence
from ltd.parallel.heads import deal_heads
from ltd.parallel.sequence import TokenSeam


class Place(SimpleNamespace):
    """Stands for a layout; unlike its parent, it can be referred to weakly."""


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(5, 3, 8), (1,), (7, 1, 1, 1, 3), (2, 2), (1, 9)])
def test_lengths_are_those_of_the_slice_and_padding_is_the_last_samples(lengths: tuple[int, ...], degree: int) -> None:
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    size = -(-len(owners) // degree)
    padded = torch.cat((owners, owners[-1:].expand(size * degree - len(owners))))
    for rank in range(degree):
        seam = TokenSeam(Place(sequence=degree, sequence_rank=rank))  # type: ignore[arg-type]
        held = padded[rank * size : (rank + 1) * size]
        assert seam.lengths(lengths) == tuple(torch.bincount(held, minlength=len(lengths)).tolist())


@pytest.mark.parametrize("degree", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 5, 6, 12, 16, 40])
def test_heads_are_dealt_once_and_evenly(num_heads: int, degree: int) -> None:
    dealt = deal_heads(num_heads, degree)
    met = Counter((h, part) for shares in dealt for share in shares for h in share.heads for part in share.queries)
    assert met == Counter((h, part) for h in range(num_heads) for part in range(degree))
    assert {sum(len(share.heads) * len(share.queries) for share in shares) for shares in dealt} == {num_heads}
    copies = sum(len(share.heads) for shares in dealt for share in shares)
    assert copies <= num_heads + degree - 1, "a member boundary cuts one head at most"
    if num_heads % degree == 0:
        assert copies == num_heads, "whole heads where the degree divides them"


def test_module_that_needs_all_tokens_is_refused() -> None:
    model = Dit(DitConfig(latent_channels=2, patch=(1, 1, 1), width=16, depth=2, num_heads=2))
    layout = Place(sequence=2, sequence_rank=0)
    model.blocks[1].mlp.needs_all_tokens = True
    attend = model.blocks[0].attention.attend
    with pytest.raises(ConfigError, match=r"parallel\.sequence: got 2, but blocks\.1\.mlp \(SwiGLU\) works on all tok"):
        sequence.shard(model, layout)  # type: ignore[arg-type]
    assert model.blocks[0].attention.attend is attend, "a refused model is left as it was"
    model.blocks[1].mlp.needs_all_tokens = False
    assert sequence.shard(model, layout) == 2  # type: ignore[arg-type]
