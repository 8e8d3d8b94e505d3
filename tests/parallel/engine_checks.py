"""What engines must do, measured on two processes; part of ``worker.py``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import deepspeed.comm.comm
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from ltd.config import ConfigError
from ltd.parallel import (
    DiscardedStepError,
    Layout,
    OptimizerSettings,
    ParallelConfig,
    build_engine,
)
from ltd.storage import StorageError
from tests.parallel.setup import (
    LR,
    OPTIM,
    batch,
    build,
    difference,
    forward_weights,
    loss,
    part,
    single,
    tiny,
    torch_weights,
    train,
)
from tools.proofs._parallel_worker import whole_weights


def check_views(zero: int, offload: str = "none") -> dict[str, Any]:
    engine, layout = build(zero, offload=offload)
    before = [shard.data.data_ptr() for shard in engine.master_shards()]
    for step in range(2):
        engine.backward(loss(engine, part(layout, step), with_unused=True))
        engine.step(LR)
    shards = engine.master_shards()
    wrong = []
    for name, parameter in engine.module.named_parameters():
        for group in ("master", "exp_avg", "exp_avg_sq"):
            public = public_value(engine, zero, parameter, group)
            for shard in (shard for shard in shards if shard.name == name):
                view = shard.data if group == "master" else shard.state[group]
                stop = shard.start + view.numel()
                if not torch.equal(view.reshape(-1), public.reshape(-1)[shard.start : stop]) or not view.any():
                    wrong.append(f"{group}/{name}")
    covered = covered_elements(layout, shards)
    sizes = {name: p.numel() for name, p in tiny().named_parameters()}
    return {
        "wrong": [name for names in layout.gather_objects(wrong) for name in names],
        "covered": covered == {name: list(range(size)) for name, size in sizes.items()},
        "stable": before == [shard.data.data_ptr() for shard in shards],
    }


def public_value(engine: Any, zero: int, parameter: Tensor, group: str) -> Tensor:
    if zero == 0:
        return parameter if group == "master" else engine._engine.optimizer.state[parameter][group]
    if group == "master":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, group)


def covered_elements(layout: Layout, shards: list) -> dict[str, list[int]]:
    """Every element that some process writes, as often as it is written."""
    found: dict[str, list[int]] = {}
    mine = [(s.name, s.start, s.data.numel()) for s in shards if s.owner]
    for name, start, length in (item for items in layout.gather_objects(mine) for item in items):
        found.setdefault(name, []).extend(range(start, start + length))
    return {name: sorted(elements) for name, elements in found.items()}


def check_lr(zero: int) -> dict[str, Any]:
    optim = OptimizerSettings(kind="sgd", grad_clip=None)
    engine, layout = build(zero, optim=optim)
    start = whole_weights(engine, layout)
    train(engine, layout, range(1), lr=0.0)
    at_zero = whole_weights(engine, layout)
    engine.backward(loss(engine, part(layout, 0)))
    gradient = engine.gradients()
    engine.step(0.25)
    moved = whole_weights(engine, layout)
    expected = {name: value - 0.25 * gradient[name] for name, value in start.items()}
    return {"zero": difference(start, at_zero), "quarter": difference(moved, expected)}


def check_non_finite(zero: int, precision: str, offload: str = "none") -> dict[str, Any]:
    engine, layout = build(zero, precision=precision, offload=offload)
    norms = train(engine, layout, range(1))
    before, forward = whole_weights(engine, layout), forward_weights(engine, layout)
    raised = []
    for bad in (float("nan"), float("inf")):
        factor = bad if layout.global_rank == 1 else 1.0
        engine.backward(loss(engine, part(layout, 1)) * factor)
        try:
            engine.step(LR)
        except DiscardedStepError:
            raised.append(True)
    unchanged = difference(before, whole_weights(engine, layout)) == 0
    forward_unchanged = torch.equal(forward, forward_weights(engine, layout))
    norms += train(engine, layout, range(1, 3))
    reference, expected = single(precision), []
    expected = train(reference, None, range(3))
    return {
        "raised": [len(r) for r in layout.gather_objects(raised)],
        "unchanged": all(layout.gather_objects(unchanged)) and forward_unchanged,
        "after": difference(whole_weights(engine, layout), torch_weights(reference)),
        "norms": max(abs(a - b) / b for a, b in zip(norms, expected, strict=True)),
        "applied": engine.applied_steps,
    }


def check_limit(zero: int, precision: str, offload: str = "none") -> dict[str, Any]:
    """A norm above the limit, and a discarded step, must leave no trace in weights, moments or the next gradient."""
    engine, layout = build(zero, precision=precision, offload=offload)
    norms = train(engine, layout, range(1))
    before = whole_weights(engine, layout)
    engine.backward(loss(engine, part(layout, 1)) * 100)
    try:
        engine.step(LR, limit=1.0)
        norm = 0.0
    except DiscardedStepError as error:
        norm = error.norm
    engine.backward(loss(engine, part(layout, 1)) * 100)
    engine.discard()
    unchanged = difference(before, whole_weights(engine, layout)) == 0
    engine.backward(loss(engine, part(layout, 1)))
    norms.append(engine.step(LR, limit=1e6))
    reference = single(precision)
    expected = train(reference, None, range(2))
    return {
        "unchanged": all(layout.gather_objects(unchanged)),
        "norm": norm / (100 * expected[1]),
        "norms": max(abs(a - b) / b for a, b in zip(norms, expected, strict=True)),
        "after": difference(whole_weights(engine, layout), torch_weights(reference)),
        "applied": engine.applied_steps,
    }


def check_unused(zero: int, offload: str = "none") -> dict[str, Any]:
    """A parameter that took part in step 0 only must have gradient zero in step 1, not a stale one."""
    optim = OptimizerSettings(kind="sgd", grad_clip=None)
    engine, layout = build(zero, optim=optim, offload=offload)
    reference = single(optim=optim)
    for model, data in ((engine, part(layout, 0)), (reference, batch(0))):
        model.backward(loss(model, data, with_unused=True))
        model.step(0.1)
    before = whole_weights(engine, layout)["unused"]
    engine.backward(loss(engine, part(layout, 1)))
    reference.backward(loss(reference, batch(1)))
    norm, expected = engine.step(0.1), reference.step(0.1)
    return {
        "moved": float((whole_weights(engine, layout)["unused"] - before).abs().max()),
        "norm": abs(norm - expected) / expected,
    }


def check_accumulation_count(zero: int) -> dict[str, Any]:
    engine, layout = build(zero, accumulation=2)
    engine.backward(loss(engine, part(layout, 0)))
    try:
        engine.step(LR)
    except RuntimeError as error:
        return {"message": str(error)}
    return {"message": ""}


def check_bf16(zero: int) -> dict[str, Any]:
    """Compare with the plain engine's bf16: same masters at the start, same rounding of the weights."""
    engine, layout = build(zero, precision="bf16", accumulation=2)
    reference = single("bf16")
    start = difference(whole_weights(engine, layout), {n: p.detach() for n, p in tiny().named_parameters()})
    for micro in range(2):
        engine.backward(loss(engine, part(layout, 0, micro)))
        reference.backward(loss(reference, batch(0, micro)))
    mine, theirs = engine.gradients(), reference.gradients()
    total = torch.cat([g.flatten() for g in theirs.values()]).norm()
    gradient = torch.cat([(mine[n] - theirs[n]).flatten() for n in mine]).norm() / total
    engine.step(LR), reference.step(LR)
    masters = whole_weights(engine, layout)
    rounded = all(
        value is None or torch.equal(value, masters[name].bfloat16()) for name, value in lp_weights(engine, zero)
    )
    return {
        "start": start,
        "gradient": float(gradient),
        "rounded": rounded,
        "dtypes": sorted({str(p.dtype) for p in engine.module.parameters()}),
        "buffer": str(engine.module.mean.dtype),
    }


def lp_weights(engine: Any, zero: int) -> Iterator[tuple[str, Tensor | None]]:
    for name, parameter in engine.module.named_parameters():
        if zero < 3:
            yield name, parameter.detach()
        else:
            # small parameters stay whole at stage 3
            yield name, parameter.detach() if parameter.numel() else None


def _decide(layout: Layout) -> list[Any]:
    """Give what the main process found, how it failed twice, and on which processes the work was done."""
    called: list[int] = []

    def find(error: Exception | None = None) -> str:
        called.append(layout.global_rank)
        if error is not None:
            raise error
        return f"of {layout.global_rank}"

    told: list[Any] = [layout.decide(find)]
    for error in (ConfigError("field: wrong"), StorageError("file: damaged")):
        try:
            layout.decide(functools.partial(find, error))
        except (ConfigError, StorageError) as caught:
            told.append(f"{type(caught).__name__} {caught}")
    return [told, called]


def check_layout() -> dict[str, Any]:
    config = ParallelConfig(precision="fp32", timeout_s=77)
    layout = Layout.from_environment(config)
    engine = build_engine(tiny(), config=config, optim=OPTIM, layout=layout, num_backwards=1)
    group = engine._engine.data_parallel_group
    messages = {}
    for name, fields in {"sequence": {"sequence": 3}, "engine": {"engine": "torch"}}.items():
        try:
            Layout.from_environment(ParallelConfig(**fields))
        except ConfigError as error:
            messages[name] = str(error)
    return {
        "group": group is layout.world_group,
        "timeout_s": layout.world_group._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
        "any": [layout.any(layout.global_rank == 1), layout.any(False)],
        "broadcast": layout.broadcast_object({"rank": layout.global_rank}),
        "gather": layout.gather_objects(layout.global_rank),
        "decided": layout.gather_objects(_decide(layout)),
        "sum": layout.sum_(torch.tensor([1.0 + layout.global_rank])).item(),
        "messages": messages,
        "compiled": getattr(deepspeed.comm.comm.cdb, "shm_comm_op", None) is not None,
    }
