"""The DeepSpeed engine, and the choice between the two. The only importer of deepspeed, and only when it is asked for.

What DeepSpeed would do by itself and what is undone here: it averages gradients over processes (the loss is multiplied
by their number first: exact for powers of two), and over accumulation steps (told not to). Its learning-rate and
checkpoint machinery is not used.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.parallel import zero_views
from ltd.parallel.config import OptimizerSettings, ParallelConfig
from ltd.parallel.frozen import FrozenWeights
from ltd.parallel.interface import (
    DiscardedStepError,
    Engine,
    MasterShard,
    copy_parameters,
    decay_groups,
    flat,
    full_shape,
    restore_shards,
)
from ltd.parallel.layout import Layout
from ltd.parallel.optimizer import (
    build_optimizer,
    clip_gradients,
    ensure_state,
    set_lr,
    set_step,
    trainable_parameters,
)
from ltd.parallel.torch_engine import TorchEngine
from ltd.storage import Reader

if TYPE_CHECKING:
    from types import ModuleType

logger = logging.getLogger(__name__)

_NAMED_FIELDS = {
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer": "parallel.offload",
    "zero_optimization.offload_param": "parallel.offload",
    "zero_optimization.cpu_offload": "parallel.offload",
    "bf16": "parallel.precision",
    "fp16": "parallel.precision",
    "gradient_accumulation_steps": "parallel.accumulation",
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.global_batch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "sequence_parallel_size": "parallel.sequence",
}


def build_engine(
    module: nn.Module, *, config: ParallelConfig, optim: OptimizerSettings, layout: Layout, num_backwards: int
) -> Engine:
    """Make the engine that ``parallel.engine`` names.

    Args:
        module: Module with fp32 parameters, the same values on all processes; moved to the layout's device.
        config: The parallel section.
        optim: Optimizer settings.
        layout: This process's position.
        num_backwards: Backward calls per optimizer step: accumulation times the sequence degree.

    Returns:
        The engine.

    Raises:
        ConfigError: If a parameter is not fp32, or ``parallel.deepspeed`` contradicts a named field.
    """
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"{name}: an engine is given fp32 parameters, got {parameter.dtype}; use parallel.precision"
            )
    if config.engine == "torch" or config.zero < 3:
        module.to(layout.device)
    match config.engine:
        case "torch":
            return TorchEngine(module, config=config, optim=optim)
        case "deepspeed":
            return DeepSpeedEngine(module, config=config, optim=optim, layout=layout, num_backwards=num_backwards)


class DeepSpeedEngine:
    """Train a module on all processes of the layout with ZeRO.

    bf16 at stage 0 runs as stage 1: DeepSpeed's other bf16 path has no fp32 masters. The result is the same, the
    optimizer state is sharded.

    Args:
        module: Module with fp32 parameters, on its device, the same values on all processes.
        config: The parallel section.
        optim: Optimizer settings.
        layout: This process's position.
        num_backwards: Backward calls per optimizer step.

    Raises:
        ConfigError: If stage 3 is given frozen parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        config: ParallelConfig,
        optim: OptimizerSettings,
        layout: Layout,
        num_backwards: int,
    ) -> None:
        self.module = module
        self.applied_steps = 0
        self._layout = layout
        self._optim = optim
        self._num_backwards = num_backwards
        self._backwards = 0
        self._offloaded = config.offload != "none"
        self._stage = max(config.zero, 1) if config.precision == "bf16" else config.zero
        if self._stage != config.zero:
            logger.info(
                "parallel.zero=%d in bf16 runs as ZeRO stage %d, with the same result", config.zero, self._stage
            )
        if config.zero == 3 and any(not parameter.requires_grad for parameter in module.parameters()):
            raise ConfigError(
                "parallel.zero: stage 3 does not hold frozen parameters yet, got some; use stage 2 or less"
            )
        self._resolved = deepspeed_config(config, optim, stage=self._stage, num_backwards=num_backwards)
        self._parameters = trainable_parameters(module)
        self.frozen = FrozenWeights(module, config, layout.global_rank, layout.world_size)
        # DeepSpeed makes its masters from the already rounded weights: keep what is lost by that.
        exact = {name: p.detach().clone() for name, p in self._parameters.items()} if config.precision == "bf16" else {}
        self._torch_optimizer = build_optimizer(self._parameters, decay_groups(module), optim)
        deepspeed = _import_deepspeed(layout)
        if self._stage == 3:
            self._partition(deepspeed, layout)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module,
            optimizer=self._torch_optimizer,
            model_parameters=list(self._parameters.values()),
            config=self._resolved,
            dist_init_required=False,
        )
        self._gate = zero_views.NormGate(self._zero) if self._stage > 0 else None
        self._fragments = self._find_fragments()
        if exact:
            for shard in self.master_shards():
                values = flat(exact[shard.name]).narrow(0, shard.start, shard.data.numel())
                shard.data.copy_(values.view(shard.data.shape))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss."""
        self._backwards += 1
        self._engine.set_gradient_accumulation_boundary(self._backwards == self._num_backwards)
        self._engine.backward(loss * self._layout.world_size, scale_wrt_gas=False)

    def step(self, lr: float, *, limit: float = math.inf) -> float:
        """Clip, update the weights and clear the gradients.

        Args:
            lr: Learning rate of this step.
            limit: Largest norm before clipping.

        Returns:
            Global gradient norm before clipping, the same on all processes.

        Raises:
            DiscardedStepError: If it is not finite or above the limit; on all processes, with the weights unchanged.
            RuntimeError: If the step was called after another number of backward calls than announced.
        """
        if self._backwards != self._num_backwards:
            raise RuntimeError(f"step() needs {self._num_backwards} backward calls before it, got {self._backwards}")
        self._backwards = 0
        set_lr(self._zero, lr)
        if self._stage == 0:
            # DeepSpeed neither checks nor clips before it updates here.
            norm = clip_gradients(self._parameters.values(), self._optim.grad_clip)
            applied = math.isfinite(norm) and norm <= limit
            if applied:
                self._engine.step()
            else:
                self._engine.zero_grad()
        else:
            assert self._gate is not None
            self._gate.set_limit(limit)
            self._engine.step()
            applied = self._engine.was_step_applied()
            norm = float(self._engine.get_global_grad_norm()) if applied else self._gate.norm
            zero_views.clear_gradients(self._zero, offloaded=self._offloaded)
        if not applied:
            raise DiscardedStepError(norm, limit)
        self.applied_steps += 1
        return norm

    def discard(self) -> None:
        """Clear the gradients of the step without an update; called by all processes in place of ``step``."""
        with contextlib.suppress(DiscardedStepError):
            self.step(0.0, limit=-1.0)

    def master_shards(self) -> list[MasterShard]:
        """List this process's parts of the fp32 masters and moments, as views."""
        shards = []
        for fragment in self._fragments:
            moments = ensure_state(self._torch_optimizer, fragment.partition)
            state = {key: fragment.view(value) for key, value in moments.items()}
            data = fragment.view(fragment.partition)
            shards.append(MasterShard(fragment.name, fragment.shape, fragment.start, data, state, fragment.owner))
        return shards

    def refresh_weights(self) -> None:
        """Make the forward weights what the fp32 masters say, on all processes."""
        with torch.no_grad():
            if self._stage == 3:
                zero_views.refresh_stage3(self._zero)
            elif self._stage > 0:
                self._zero.update_lp_params()

    def load_shards(self, reader: Reader, step: int) -> None:
        """Restore masters, moments and step counters from a checkpoint of any layout.

        Args:
            reader: The checkpoint.
            step: Optimizer steps that were applied when it was written.
        """
        restore_shards(self.master_shards(), reader)
        for partition in {id(f.partition): f.partition for f in self._fragments}.values():
            set_step(self._torch_optimizer, partition, step)
        self.applied_steps = step
        self.refresh_weights()

    def gradients(self) -> dict[str, Tensor]:
        """Gather the full summed fp32 gradients; called by all processes after the last backward of a step."""
        from deepspeed.utils import safe_get_full_grad

        found = {}
        for name, parameter in self._parameters.items():
            gradient = parameter.grad if self._stage == 0 else safe_get_full_grad(parameter)
            if gradient is None:
                gradient = torch.zeros(full_shape(parameter), device=parameter.device)
            found[name] = gradient.detach().float().clone()
        return found

    def copy_weights(self, target: nn.Module) -> None:
        """Copy the whole forward weights into a plain module of the same parameters; called by all processes."""
        if self._stage < 3:
            copy_parameters(self.module, target)
            return
        from deepspeed import zero

        with zero.GatheredParameters(list(self.module.parameters())):
            copy_parameters(self.module, target)

    def resolved_config(self) -> dict[str, Any]:
        """Describe the engine as plain values: what DeepSpeed was given."""
        return {**self._resolved, "engine": "deepspeed", "optimizer_kind": self._optim.kind}

    def _partition(self, deepspeed: ModuleType, layout: Layout) -> None:
        """Move the module to its device parameter by parameter: it need not fit there whole."""
        if "bf16" in self._resolved:
            for parameter in self._parameters.values():
                parameter.data = parameter.data.bfloat16()
        for submodule in self.module.modules():
            for name, buffer in submodule._buffers.items():
                submodule._buffers[name] = None if buffer is None else buffer.to(layout.device)
        deepspeed.zero.Init(
            module=self.module,
            data_parallel_group=layout.world_group,
            mem_efficient_linear=False,
            config_dict_or_path=self._resolved,
        )

    def _find_fragments(self) -> list[zero_views.Fragment]:
        match self._stage:
            case 0:
                return zero_views.stage0_fragments(self._parameters, self._layout.global_rank, self._layout.world_size)
            case 3:
                return zero_views.stage3_fragments(self._parameters, self._zero)
            case _:
                return zero_views.stage12_fragments(self._parameters, self._zero)


def deepspeed_config(
    config: ParallelConfig, optim: OptimizerSettings, *, stage: int, num_backwards: int
) -> dict[str, Any]:
    """Resolve the dictionary that DeepSpeed is given; ``parallel.deepspeed`` may add to it, never contradict it.

    Args:
        config: The parallel section.
        optim: Optimizer settings; clipping is read.
        stage: ZeRO stage to run.
        num_backwards: Backward calls per optimizer step.

    Returns:
        Plain values.
    """
    resolved: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_backwards,
        "gradient_clipping": 0.0 if optim.grad_clip is None or stage == 0 else optim.grad_clip,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if config.precision == "bf16":
        resolved["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if config.offload != "none":
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        resolved["zero_optimization"]["offload_optimizer"] = host
        if config.offload == "all":
            resolved["zero_optimization"]["offload_param"] = host
        # torch's own fused optimizer updates on the host; DeepSpeed's is compiled at the first start.
        resolved["zero_force_ds_cpu_optimizer"] = False
    _merge(resolved, config.deepspeed, "")
    return resolved


def _merge(base: dict[str, Any], extra: dict[str, Any], prefix: str) -> None:
    for key, value in extra.items():
        path = f"{prefix}{key}"
        if path in _NAMED_FIELDS:
            raise ConfigError(
                f"parallel.deepspeed.{path}: got {value!r}, contradicts a named field; set {_NAMED_FIELDS[path]}"
            )
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value, f"{path}.")
        elif key in base and base[key] != value:
            raise ConfigError(f"parallel.deepspeed.{path}: got {value!r}, needs {base[key]!r}; remove it")
        else:
            base[key] = value


def _import_deepspeed(layout: Layout) -> ModuleType:
    """Import deepspeed and hand it the layout's groups."""
    import deepspeed
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    # A kernel for all-reduces at inference on CPUs, compiled for minutes at the first start; training never calls it.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    # Its copy of the world group would be made with torch's default time-out.
    groups._WORLD_GROUP = layout.world_group
    return deepspeed
