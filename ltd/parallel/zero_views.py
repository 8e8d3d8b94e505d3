"""Views of ZeRO's fp32 partitions: which elements of which parameter this process holds, and where.

DeepSpeed has no public access to these at stages 1 and 2, so everything that leans on its internals is here (0.19.8);
``tests/parallel`` compares each view, element by element, with what the public getters gather, so a DeepSpeed that
changes its internals fails there and not in a checkpoint. Never imports deepspeed.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltd.parallel.interface import full_shape


@dataclass(frozen=True)
class Fragment:
    """Part of one parameter inside a flat fp32 partition that the optimizer steps over."""

    name: str
    shape: tuple[int, ...]
    #: First element of the parameter that is held here.
    start: int
    #: Flat fp32 tensor that the torch optimizer knows.
    partition: Tensor
    #: Where the part begins in the partition, and its length.
    offset: int
    length: int
    #: Whether this process is the one that writes it.
    owner: bool

    def view(self, tensor: Tensor) -> Tensor:
        """View the part in a tensor of the partition's shape: the partition itself, or a moment of it."""
        return tensor.detach() if self.is_whole else tensor.detach().narrow(0, self.offset, self.length)

    @property
    def is_whole(self) -> bool:
        """Whether the fragment is the tensor's own storage rather than a slice of a flat partition."""
        return tuple(self.partition.shape) == self.shape and self.offset == 0


def stage0_fragments(parameters: dict[str, Any], global_rank: int, world_size: int) -> list[Fragment]:
    """List whole parameters; every process holds all of them, and they write in turn.

    Args:
        parameters: Trainable parameters by name.
        global_rank: Index of this process.
        world_size: Number of processes.

    Returns:
        One fragment per parameter.
    """
    return [
        Fragment(name, tuple(p.shape), 0, p, 0, p.numel(), index % world_size == global_rank)
        for index, (name, p) in enumerate(parameters.items())
    ]


def stage12_fragments(parameters: dict[str, Any], optimizer: Any) -> list[Fragment]:
    """List the parts of the flat partitions of stages 1 and 2, and of the bf16 optimizer.

    Args:
        parameters: Trainable parameters by name.
        optimizer: DeepSpeed's ZeRO optimizer.

    Returns:
        One fragment per parameter that reaches into this process's partitions.
    """
    partitions = flat_partitions(optimizer)
    fragments = []
    for name, parameter in parameters.items():
        # None where none of the parameter lies in this process's partition.
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        address = mapping.hp_fragment_address
        partition = partitions[mapping.param_group_index]
        start = mapping.lp_fragment_address.start
        length = mapping.lp_fragment_address.numel
        fragments.append(Fragment(name, full_shape(parameter), start, partition, address.start, length, True))
    return fragments


def stage3_fragments(parameters: dict[str, Any], optimizer: Any) -> list[Fragment]:
    """List the parts of stage 3's sub-groups; the padding behind the last element of a parameter is left out.

    Args:
        parameters: Trainable parameters by name.
        optimizer: DeepSpeed's stage 3 optimizer.

    Returns:
        One fragment per parameter of which this process holds at least one element.
    """
    fragments = []
    for name, parameter in parameters.items():
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = torch.distributed.get_rank(parameter.ds_process_group) * padded
        length = min(padded, parameter.ds_numel - start)
        if length > 0:
            partition = optimizer.fp32_partitioned_groups_flat[group]
            fragments.append(Fragment(name, full_shape(parameter), start, partition, offset, length, True))
    return fragments


def flat_partitions(optimizer: Any) -> list[Tensor]:
    """List the flat fp32 tensors that the wrapped torch optimizer steps over, at stages 1 to 3."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            partitions: list[Tensor] = list(getattr(optimizer, attribute))
            return partitions
    raise RuntimeError(f"{type(optimizer).__name__}: this version of DeepSpeed keeps its fp32 partitions elsewhere")


class NormGate:
    """Let an update through only if the global gradient norm is within a limit.

    DeepSpeed measures the norm inside ``step`` and then updates; on one that is not finite it discards the step, on
    every process alike. The gate makes a norm above the limit look like that.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, of stages 1 to 3.
    """

    def __init__(self, optimizer: Any) -> None:
        #: Norm of the last step, where it was above a limit; infinite where it was not finite.
        self.norm = math.inf
        self._limit = math.inf
        self._optimizer = optimizer
        # Stages 1 and 2, stage 3, and the optimizer that stage 1 has in bf16.
        for measure, gated in (
            ("scaled_global_norm", self._gated_norm),
            ("_get_norm_groups", self._gated_groups),
            ("get_grads_for_norm", self._gated_gradients),
        ):
            if hasattr(optimizer, measure):
                self._measure = getattr(optimizer, measure)
                setattr(optimizer, measure, gated)
                return
        raise RuntimeError(f"{type(optimizer).__name__}: this version of DeepSpeed measures gradients elsewhere")

    def set_limit(self, limit: float) -> None:
        """Set the largest norm before clipping that the next step may have."""
        self._limit, self.norm = limit, math.inf

    def _gated_norm(self) -> Any:
        found = self._measure()
        # Without a limit nothing is read: that would wait for the device.
        return found if self._limit == math.inf or self._within(float(found)) else math.inf

    def _gated_groups(self) -> list[Any]:
        found: list[Any] = self._measure()
        if self._limit == math.inf:
            return found
        norms = [float(norm) for norm in found]
        total = math.hypot(*norms) if all(norm >= 0 for norm in norms) else math.inf  # -1 is its sign for not finite
        return found if self._within(total) else [math.inf] * len(found)

    def _gated_gradients(self, for_clipping: bool = False) -> Any:
        found = self._measure(for_clipping=for_clipping)
        if for_clipping or self._limit == math.inf:
            return found
        functions: Any = sys.modules[type(self._optimizer).__module__]
        norm = functions.get_global_norm_of_tensors(
            input_tensors=found[0], mpu=self._optimizer.mpu, norm_type=self._optimizer.norm_type
        )
        return found if self._within(float(norm)) else ([torch.tensor(math.inf)], found[1])

    def _within(self, norm: float) -> bool:
        self.norm = norm if math.isfinite(norm) and norm >= 0 else math.inf
        return self.norm <= self._limit


def refresh_stage3(optimizer: Any) -> None:
    """Copy stage 3's fp32 partitions into the forward weights, and gather the parameters that stay whole.

    Args:
        optimizer: DeepSpeed's stage 3 optimizer.
    """
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].all_gather(persistent)


def clear_gradients(optimizer: Any, *, offloaded: bool) -> None:
    """Forget what stays of a step's gradients: a parameter without gradient would meet its last one again.

    Stages 1 and 2 keep nothing unless they are offloaded.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, of stages 1 to 3.
        offloaded: Whether gradients, and their norms, are collected in host memory.
    """
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        optimizer.grad_partitions_flat_buffer.zero_()
    if offloaded:
        optimizer.reset_cpu_buffers()
        # Left behind by a discarded step of stages 1 and 2: the next one would be added to it.
        for kept in (optimizer.averaged_gradients, getattr(optimizer, "all_grad_tensors", {})):
            kept.update(dict.fromkeys(kept))
        for partition in flat_partitions(optimizer):
            if partition.grad is not None:
                partition.grad.zero_()
