"""The fast part of docs/proofs/samplers.md, and that it can miss."""

from __future__ import annotations

import pytest

from ltd.diffusion.solvers import Dpmpp2m
from tools.proofs import samplers


def test_a_wrong_solver_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "CASES", {("dpmpp_2m", 2): (1.65, 1.95)})
    monkeypatch.setattr(samplers, "WAYS", samplers.WAYS[:1])
    assert not samplers.measure().misses

    genuine = Dpmpp2m.step

    def forgetful(self: Dpmpp2m, velocity, x, now, after):  # type: ignore[no-untyped-def]
        self._before = None
        return genuine(self, velocity, x, now, after)

    monkeypatch.setattr(Dpmpp2m, "step", forgetful)
    misses = samplers.measure().misses
    assert any("order" in miss for miss in misses) and any("differs by" in miss for miss in misses)
