"""The fast part of docs/proofs/metrics.md, and that a broken metric is found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ltd.evaluation import kernel, manifold
from tools.proofs import metrics

pytest.importorskip("prdc")
pytest.importorskip("torchmetrics")


def _small() -> Iterator[metrics.Comparison]:
    yield from metrics._frechet(60, 50, 8)
    yield from metrics._kernel(40, 8)
    yield from metrics._inception(60, 7)
    yield from metrics._manifolds(60, 50, 8, 3)
    yield from metrics._clip(20, 256)
    yield from metrics._fidelity()
    yield from metrics._motion()


def test_metrics_equal_their_references_and_breaks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "comparisons", _small)
    assert not metrics.measure().misses
    monkeypatch.setattr(kernel, "generator", lambda seed, stream, subset: None)  # other subsets than documented
    genuine = manifold._radii
    monkeypatch.setattr(manifold, "_radii", lambda points, neighbours, moved: genuine(points, neighbours + 1, moved))
    misses = " ".join(metrics.measure().misses)
    assert "KID, 20 subsets" in misses and "precision, recall, density, coverage" in misses
