"""What accelerators can do at most: makers' figures by name, and a product of matrices that is timed."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

#: Type of a product: its operands and, for tf32, how fp32 operands are rounded. Sums are fp32.
Precision: TypeAlias = Literal["bf16", "fp16", "tf32", "fp32"]


@dataclass(frozen=True)
class Peak:
    """Dense peak of a device in 10^12 operations per second, by type; None where the device lacks it."""

    name: str
    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float

    def flops(self, precision: Precision) -> float | None:
        """Give the peak of a type in operations per second."""
        tflops: float | None = getattr(self, precision)
        return None if tflops is None else tflops * 1e12


#: Pattern of ``torch.cuda.get_device_name`` and the makers' figures without sparsity; the first that fits counts.
PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"GB200|GB300", Peak("GB200", 2500, 2500, 1250, 80)),
    (r"\bB200\b|\bB300\b", Peak("B200", 2250, 2250, 1125, 75)),
    (r"H200 NVL", Peak("H200 NVL", 835.5, 835.5, 417.5, 60)),
    (r"\bG?H200\b", Peak("H200", 989.4, 989.4, 494.7, 66.9)),
    (r"H100 PCIe", Peak("H100 PCIe", 756, 756, 378, 51)),
    (r"H100 NVL", Peak("H100 NVL", 835.5, 835.5, 417.5, 60)),
    (r"\bH[18]00\b", Peak("H100 SXM", 989.4, 989.4, 494.7, 66.9)),
    (r"\bH20\b", Peak("H20", 148, 148, 74, 44)),
    (r"\bA[18]00\b", Peak("A100", 312, 312, 156, 19.5)),
    (r"\bA40\b", Peak("A40", 149.7, 149.7, 74.8, 37.4)),
    (r"RTX A6000", Peak("RTX A6000", 154.8, 154.8, 77.4, 38.7)),
    (r"\bA10\b", Peak("A10", 125, 125, 62.5, 31.2)),
    (r"\bL40S\b", Peak("L40S", 362, 362, 183, 91.6)),
    (r"\bL40\b", Peak("L40", 181, 181, 90.5, 90.5)),
    (r"\bL4\b", Peak("L4", 121, 121, 60, 30.3)),
    (r"RTX 5090(?! D)", Peak("RTX 5090", 209.5, 209.5, 104.8, 104.8)),
    (r"RTX 4090(?! D)", Peak("RTX 4090", 165.2, 165.2, 82.6, 82.6)),
    (r"RTX 3090(?! Ti)", Peak("RTX 3090", 71, 71, 35.6, 35.6)),
    (r"V100", Peak("V100", None, 125, None, 15.7)),
    (r"\bT4\b", Peak("T4", None, 65, None, 8.1)),
    (r"MI325X", Peak("MI325X", 1307.4, 1307.4, 653.7, 163.4)),
    (r"MI300X", Peak("MI300X", 1307.4, 1307.4, 653.7, 163.4)),
    (r"MI250X", Peak("MI250X, one of two dies", 191.5, 191.5, None, 47.9)),
)
#: Parts of a device, and slower devices of the same name.
_OTHERS = re.compile(r"\bMIG\b|Laptop|Max-Q", re.IGNORECASE)
_SIDE_GPU, _SIDE_CPU = 8192, 768


def find_peak(device_name: str) -> Peak | None:
    """Look up a device.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it.

    Returns:
        Its peak; None for a device that is not in the table, and for a part of one.
    """
    if _OTHERS.search(device_name):
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_name)), None)


def measure_peak(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """Time products of large square matrices; draws no random numbers.

    Args:
        device: Where.
        dtype: Of the operands. fp32 is rounded as torch's settings say.
        seconds: How long, about; the first product comes on top.

    Returns:
        Operations per second of the fastest of several runs.
    """
    gpu = device.type == "cuda"
    side = _SIDE_GPU if gpu else _SIDE_CPU
    factor = torch.full((side, side), 1.0 / side, device=device, dtype=dtype)
    out = torch.empty_like(factor)

    def once(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(factor, factor, out=out)
        if gpu:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / count

    with torch.no_grad():
        once(1)
        count = max(1, round(seconds / 5 / max(once(1), 1e-9)))
        best = min(once(count) for _ in range(5))
    return 2.0 * side**3 / best
