import pytest
import torch

from ltd.nn.patch import grid_positions, patchify, token_grid, unpatchify
from ltd.shapes import VideoShape


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 4)])
def test_unpatchify_inverts_patchify(patch):
    x = torch.randn(2, 3, 4, 6, 8)
    grid = token_grid(VideoShape(4, 6, 8), patch)
    assert torch.equal(unpatchify(patchify(x, patch), grid, patch), x)


def test_a_token_holds_the_cells_at_its_position():
    x, patch = torch.randn(1, 3, 4, 6, 8), (2, 3, 2)
    tokens, positions = patchify(x, patch), grid_positions((2, 2, 4))
    for token, (t, h, w) in zip(tokens[0], positions[0].int().tolist(), strict=True):
        cells = x[0, :, 2 * t : 2 * t + 2, 3 * h : 3 * h + 3, 2 * w : 2 * w + 2]
        assert torch.equal(token, cells.permute(1, 2, 3, 0).flatten())


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"axis w of size 7 does not divide by model.patch\[w\] = 2"):
        patchify(torch.zeros(1, 3, 1, 4, 7), (1, 2, 2))
