"""Fields of the parallel section and what an engine needs to know of the optimizer. Knows no process group."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ltd.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How training is spread over processes. Nothing here changes what is learned, only where it is computed."""

    #: ``deepspeed`` for any number of processes; ``torch`` for exactly one process, without DeepSpeed.
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    #: ZeRO stage, 0 to 3: what is sharded over all processes (1 optimizer state, 2 gradients too, 3 weights too).
    zero: int = 2
    #: Sequence parallel degree: processes that share the tokens of one sample; divides the world size.
    sequence: int = 1
    #: Micro-batches per process and optimizer step; splits the global batch further, never multiplies it.
    accumulation: int = 1
    #: Dtype of forward and backward; master weights, gradient sums and optimizer state are fp32 in both.
    precision: Literal["bf16", "fp32"] = "bf16"
    #: ``full`` recomputes blocks of the model in the backward pass instead of keeping their activations; ``selective``
    #: keeps what attention gave and recomputes the rest.
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    #: With ``full`` or ``selective``: recompute every k-th block; 1 is every block.
    activation_checkpointing_every: int = 1
    #: ``blocks`` compiles each block of the model with torch.compile.
    compile: Literal["none", "blocks"] = "none"
    #: ``optimizer`` keeps masters and optimizer state in host memory and updates there (ZeRO 1 to 3); ``all`` keeps the
    #: weights there too (ZeRO 3).
    offload: Literal["none", "optimizer", "all"] = "none"
    #: Seconds after which a run whose processes wait for one that does not come ends, naming it and what it was doing.
    timeout_s: float = 600.0
    #: Seconds without progress after which the process that the others wait for is named in a warning.
    slow_s: float = 60.0
    #: Before the first step: compare configuration, code, packages and shard lists over processes, and measure matrix
    #: products, links and storage of each; a world of one process skips it.
    preflight: bool = True
    #: Merged last into the DeepSpeed configuration; refused where it contradicts a field above.
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"parallel.zero: ZeRO stage, got {self.zero}, needs 0, 1, 2 or 3")
        for name in ("sequence", "accumulation", "activation_checkpointing_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}: got {getattr(self, name)}, needs 1 or more")
        for name in ("timeout_s", "slow_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"parallel.{name}: seconds, got {getattr(self, name)}, needs more than 0, and finite")
        if self.offload != "none" and (self.engine == "torch" or self.zero == 0):
            raise ConfigError(
                f"parallel.offload: got {self.offload}, needs parallel.engine=deepspeed and parallel.zero of 1 or more"
            )
        if self.offload == "all" and self.zero != 3:
            raise ConfigError(f"parallel.offload: all needs parallel.zero=3, got {self.zero}; use optimizer")
        if self.activation_checkpointing == "none" and self.activation_checkpointing_every != 1:
            raise ConfigError(
                f"parallel.activation_checkpointing_every: got {self.activation_checkpointing_every} while "
                "parallel.activation_checkpointing is none; set that to full or selective"
            )
        if self.engine == "torch" and self.sequence != 1:
            raise ConfigError(f"parallel.sequence: got {self.sequence}, parallel.engine=torch is one process; needs 1")
        if self.engine == "torch" and self.deepspeed:
            raise ConfigError(
                "parallel.deepspeed: not read by parallel.engine=torch; remove it or use engine=deepspeed"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What an engine applies to the summed gradients; the learning rate arrives with every step."""

    #: ``adamw`` (Loshchilov & Hutter 2019, arXiv 1711.05101) or plain ``sgd`` without momentum.
    kind: Literal["adamw", "sgd"] = "adamw"
    #: Decay rates of AdamW's two moments, each in [0, 1).
    betas: tuple[float, float] = (0.9, 0.95)
    #: AdamW's denominator offset.
    eps: float = 1e-8
    #: Decoupled decay per step and learning rate; only on the parameters that the module names for it.
    weight_decay: float = 0.0
    #: Largest global gradient norm; larger gradients are scaled down to it. ``None`` never clips.
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optim.betas: got {self.betas}, needs two numbers in [0, 1)")
        if self.eps <= 0.0:
            raise ConfigError(f"optim.eps: got {self.eps}, needs more than 0, and finite")
        if self.weight_decay < 0.0:
            raise ConfigError(f"optim.weight_decay: got {self.weight_decay}, needs 0 or more")
        if self.grad_clip is not None and self.grad_clip <= 0.0:
            raise ConfigError(f"optim.grad_clip: got {self.grad_clip}, needs more than 0, or null for none")
