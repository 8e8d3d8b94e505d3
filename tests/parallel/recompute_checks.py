"""Recomputed blocks through DeepSpeed, measured on two processes; part of ``worker.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltd.denoisers import Conditioning
from ltd.parallel import Layout, OptimizerSettings, ParallelConfig, activation, build_engine, compilation, sequence
from tests.parallel.packed_check import packed_batch, packed_model
from tools.proofs._parallel_worker import whole_weights

#: Without it, a model this small is never sharded at stage 3: every weight counts as too small to be worth it.
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 3000}}


def trained(mode: str, every: int, degree: int, zero: int, precision: str) -> dict[str, Tensor]:
    """Weights after steps whose packs differ, so that stage 3 prefetches by what an earlier step did."""
    config = ParallelConfig(
        zero=zero,
        sequence=degree,
        precision=precision,
        activation_checkpointing=mode,
        activation_checkpointing_every=every,
        deepspeed=SHARD_ALL if zero == 3 else {},
    )
    layout = Layout.from_environment(config)
    model = packed_model(config, None)
    activation.checkpoint_blocks(model, config)
    sequence.shard(model, layout)
    optim = OptimizerSettings(kind="sgd", grad_clip=1.0)
    engine = build_engine(model, config=config, optim=optim, layout=layout, num_backwards=1)
    for name in ("odd", "odd", "cut between", "odd"):
        latents, t, cond = packed_batch(name)
        outs = engine(latents, t, cond)
        engine.backward(torch.stack([x.float().square().mean() for x in outs]).sum())
        engine.step(1e-2)
    return whole_weights(engine, layout)


def check_modes(degree: int, zero: int, precision: str) -> dict[str, Any]:
    plain = trained("none", 1, degree, zero, precision)
    start = {name: p.detach() for name, p in packed_model(ParallelConfig(), None).named_parameters()}
    found = {"moved": max(float((plain[name] - start[name]).abs().max()) for name in plain)}
    for mode, every in (("full", 1), ("selective", 1), ("selective", 2)):
        weights = trained(mode, every, degree, zero, precision)
        found[f"{mode} {every}"] = max(float((weights[name] - plain[name]).abs().max()) for name in plain)
    return found


def stepped(compile: str, zero: int) -> tuple[dict[str, Tensor], int]:
    """Gradients of the second step over a split sequence of recomputed blocks, and the number of graphs."""
    config = ParallelConfig(
        zero=zero, sequence=2, precision="fp32", activation_checkpointing="selective", compile=compile
    )
    layout = Layout.from_environment(config)
    model = packed_model(config, None)
    activation.checkpoint_blocks(model, config)
    sequence.shard(model, layout)
    compiled = compilation.compile_blocks(model, config)
    optim = OptimizerSettings(kind="sgd", grad_clip=1.0)
    engine = build_engine(model, config=config, optim=optim, layout=layout, num_backwards=1)
    gradients: dict[str, Tensor] = {}
    for step in range(2):
        draw = torch.Generator().manual_seed(step)
        x, t = torch.randn(2, 2, 1, 3, 3, generator=draw), torch.rand(2, generator=draw)
        cond = Conditioning(torch.randn(2, 4, 3, generator=draw), torch.rand(2, 4, generator=draw) < 0.6)
        engine.backward(engine(x, t, cond).square().mean())
        gradients = engine.gradients()
        engine.step(1e-2)
    return gradients, compiled.num_graphs()


def check_compiled(zero: int) -> dict[str, Any]:
    (eager, none), (compiled, num_graphs) = stepped("none", zero), stepped("blocks", zero)
    error = torch.stack([(compiled[name] - value).norm() for name, value in eager.items()]).norm()
    total = torch.stack([value.norm() for value in eager.values()]).norm()
    return {"gradient": float(error / total), "graphs": [none, num_graphs]}
