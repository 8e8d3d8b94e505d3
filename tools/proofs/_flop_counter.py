"""torch's counter of operations; the CPU's kernel of fused attention, which it leaves out, has the GPU's formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import flop_counter

_ATEN = torch.ops.aten


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query, key, value))


def _backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_backward_flop_count(gradient, query, key, value))


def counted(function: Callable[[], object]) -> int:
    """Count the operations of a call.

    Args:
        function: What is called, once.

    Returns:
        Operations; a multiplication and its addition are two.
    """
    mapping: dict[Any, Any] = {
        _ATEN._scaled_dot_product_flash_attention_for_cpu: _forward,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return int(counter.get_total_flops())
