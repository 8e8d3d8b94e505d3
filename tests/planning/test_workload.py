"""Rates of work, by hand."""

from __future__ import annotations

import pytest

from ltd.planning import Workload, rates

WORK = Workload(
    samples=8, tokens=800, computed=1000, real=900, model_flops=6e12, repeated_flops=2e12, encoder_flops=4e12
)


def test_rates_by_hand() -> None:
    found = rates(WORK, 2.0, 2, 5e12)
    assert (found.samples_per_s, found.tokens_per_s) == (4.0, 400.0)
    assert (found.model_tflops, found.total_tflops) == (1.5, 2.5)
    assert (found.mfu, found.mfu_with_encoders, found.hfu) == (0.3, 0.5, 0.6)
    assert found.padding_waste == pytest.approx(0.1)


def test_without_a_peak_and_without_work() -> None:
    found = rates(Workload(), 1.0, 1, None)
    assert found.mfu is None and found.mfu_with_encoders is None and found.hfu is None
    assert found.padding_waste == 0.0


def test_sum() -> None:
    assert (WORK + WORK).model_flops == 12e12 and (WORK + Workload()) == WORK


@pytest.mark.parametrize(("seconds", "devices", "peak"), [(0.0, 1, 1.0), (1.0, 0, 1.0), (1.0, 1, 0.0)])
def test_what_cannot_be_is_refused(seconds: float, devices: int, peak: float) -> None:
    with pytest.raises(ValueError, match="needed all above 0"):
        rates(WORK, seconds, devices, peak)
