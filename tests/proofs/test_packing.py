"""The fast rows of docs/proofs/packing.md."""

from __future__ import annotations

from tools.proofs import packing


def test_a_mixed_pack_holds_and_wrong_ones_fail() -> None:
    rows, misses = packing.equality_rows(["images and clips"], ["text, pooled, shared, predicts data"])
    assert misses == []
    assert [row[0] for row in rows] == ["packed", "neighbours time", "moved boundary", "summed"]


def test_the_padded_baseline_computes_the_same() -> None:
    samples = packing.draw_samples(packing.MIXES["images and clips"], text=True)
    model = packing.build_model(64, 2, text_dim=packing.TEXT_DIM)
    assert max(packing.errors(model, samples, packing.padded)) < packing.LIMIT
    assert max(packing.errors(model, samples, packing.packed)) < packing.LIMIT
