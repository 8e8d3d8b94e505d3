"""The fast columns of docs/proofs/tiling.md, and that they can miss."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ltd.autoencoders import ConvVae
from tools.proofs import tiling


def test_tiles_hold_their_limits_and_a_wrong_halo_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiling.architectures()["convolutional, no attention"]
    config = dataclasses.replace(config, multipliers=(1, 2), halve_time=(True,))
    model = tiling.model_of(config, torch.float64)
    with torch.no_grad():
        decode, encode, blended, _ = tiling._tiles(model, torch.float64)
        assert decode is not None and encode is not None
        assert max(decode, encode) < 1e-10 < blended
        halo = model.spatial_halo("decode")
        assert halo is not None
        monkeypatch.setattr(ConvVae, "spatial_halo", lambda self, side: (halo[0] // 3, halo[1] // 3))
        wrong, _, _, _ = tiling._tiles(model, torch.float64)
    assert wrong is not None and wrong > 1e-6
