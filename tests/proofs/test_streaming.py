"""The fast rows of docs/proofs/streaming.md."""

from __future__ import annotations

import torch

from tools.proofs import streaming


def test_every_limit_holds_for_the_narrow_models() -> None:
    narrow = {name: arch for name, arch in streaming.architectures().items() if name != "quickstart"}
    proof = streaming.measure(lambda: narrow)
    assert len(proof.rows) == 10 and not proof.misses


def test_a_model_that_looks_ahead_is_found() -> None:
    """The proof can fail: a convolution that reads the next frame breaks causality and streaming."""
    model = streaming.redrawn(streaming.architectures()["default 4x8x8, narrow, with linear path"], torch.float64)
    genuine = model.encoder[1].forward

    def ahead(x, state=None):  # type: ignore[no-untyped-def]
        return genuine(torch.roll(x, -1, dims=2), state)

    model.encoder[1].forward = ahead  # type: ignore[method-assign]
    video = streaming.clip(torch.float64)
    changed, _ = streaming.causality_violations(model, video)
    assert changed > 0
    assert max(streaming.chunk_differences(model, video).values()) > 1e-3
