"""Peaks of devices by their name, and one that is measured."""

from __future__ import annotations

import pytest
import torch

from ltd.planning import find_peak, measure_peak
from ltd.planning.devices import PEAKS


@pytest.mark.parametrize(
    ("name", "peak", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100", 312),
        ("NVIDIA A100-PCIE-40GB", "A100", 312),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.4),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756),
        ("NVIDIA H200", "H200", 989.4),
        ("NVIDIA GH200 480GB", "H200", 989.4),
        ("NVIDIA H20", "H20", 148),
        ("NVIDIA B200", "B200", 2250),
        ("NVIDIA L40S", "L40S", 362),
        ("NVIDIA L40", "L40", 181),
        ("NVIDIA L4", "L4", 121),
        ("NVIDIA A10", "A10", 125),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2),
        ("AMD Instinct MI300X", "MI300X", 1307.4),
    ],
)
def test_name(name: str, peak: str, bf16: float) -> None:
    found = find_peak(name)
    assert found is not None and found.name == peak
    assert found.flops("bf16") == bf16 * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "CPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
    ],
)
def test_unknown_devices_and_parts_of_one_have_none(name: str) -> None:
    assert find_peak(name) is None


def test_types_that_a_device_lacks() -> None:
    found = find_peak("Tesla V100-SXM2-16GB")
    assert found is not None and found.flops("bf16") is None and found.flops("fp16") == 125e12


def test_wider_types_are_not_faster() -> None:
    for _, peak in PEAKS:
        steps = [value for value in (peak.fp16, peak.tf32, peak.fp32) if value is not None]
        assert steps == sorted(steps, reverse=True), peak.name
        assert peak.bf16 in (None, peak.fp16)


def test_measured_peak_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    assert 1e8 < measure_peak(torch.device("cpu"), torch.float32, seconds=0.01) < 1e14
    assert torch.equal(torch.get_rng_state(), state)
