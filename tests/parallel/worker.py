"""One process of the distributed tests: runs every check in turn and writes what it measured; the tests assert.

One launch for all checks, because importing DeepSpeed takes longer than most of them. Run under torchrun:
``-m tests.parallel.worker OUT.json FOLDER``.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed.comm.comm
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from ltd import storage
from ltd.config import ConfigError
from ltd.nn import seams
from ltd.nn.attention import SelfAttention
from ltd.parallel import (
    Ema,
    EmaConfig,
    Layout,
    NonFiniteError,
    OptimizerSettings,
    ParallelConfig,
    activation,
    build_engine,
    checkpoint,
    sequence,
)
from ltd.parallel.torch_engine import TorchEngine
from tests.parallel.packed_check import check_packed
from tools.proofs._parallel_worker import Case, run_case, whole_weights

STAGES = (0, 1, 2, 3)
#: Rows of the ``parallel`` proof that are in the tests too.
PROOF_ROWS = (
    Case(0, sequence=2, accumulation=2),
    Case(2),
    Case(2, sequence=2, accumulation=2),
    Case(3, sequence=2, checkpointing="full"),
    Case(2, factor=0.5),
)
OPTIM = OptimizerSettings(weight_decay=0.1, grad_clip=1.0)
LR = 1e-2


class Tiny(nn.Module):
    """Odd sizes on purpose: partitions cut through tensors, and padding is needed at every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(3))
        self.out = nn.Linear(7, 3)
        self.unused = nn.Parameter(torch.randn(5))
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.arange(3.0))

    def forward(self, x: Tensor, with_unused: bool = False) -> Tensor:
        x = x.to(self.out.weight.dtype)
        for block in self.blocks:
            x = x + block(x)
        x = self.out(x) * self.scale + self.mean.to(x.dtype)
        return x + self.unused.sum() if with_unused else x


def tiny() -> Tiny:
    torch.manual_seed(3)
    return Tiny()


def batch(step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randn(4, 7, generator=generator), torch.randn(4, 3, generator=generator)


def part(layout: Layout, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    x, y = batch(step, micro)
    size = 4 // layout.world_size
    rows = slice(layout.global_rank * size, (layout.global_rank + 1) * size)
    return x[rows], y[rows]


def loss(model: Callable[..., Tensor], data: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
    return (model(data[0], **kwargs).float() - data[1]).square().sum() / 4


def build(zero: int, *, precision: str = "fp32", accumulation: int = 1, optim: OptimizerSettings = OPTIM) -> tuple:
    config = ParallelConfig(zero=zero, precision=precision, accumulation=accumulation, timeout_s=100)
    layout = Layout.from_environment(config)
    engine = build_engine(tiny(), config=config, optim=optim, layout=layout, num_backwards=accumulation)
    return engine, layout


def single(precision: str = "fp32", optim: OptimizerSettings = OPTIM) -> TorchEngine:
    return TorchEngine(tiny(), config=ParallelConfig(engine="torch", precision=precision), optim=optim)


def train(engine: Any, layout: Layout | None, steps: range, ema: Ema | None = None, lr: float = LR) -> list[float]:
    norms = []
    for step in steps:
        engine.backward(loss(engine, batch(step) if layout is None else part(layout, step)))
        norms.append(engine.step(lr))
        if ema is not None:
            ema.update(step)
    return norms


def torch_weights(engine: TorchEngine) -> dict[str, Tensor]:
    return {s.name: s.data.clone() for s in engine.master_shards()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def forward_weights(engine: Any, layout: Layout) -> Tensor:
    """What the module computes now, which shows its forward weights whatever holds them."""
    with torch.no_grad():
        return engine.module(batch(77)[0], with_unused=True).float().clone()


def check_views(zero: int) -> dict[str, Any]:
    engine, layout = build(zero)
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


def check_non_finite(zero: int, precision: str) -> dict[str, Any]:
    engine, layout = build(zero, precision=precision)
    norms = train(engine, layout, range(1))
    before, forward = whole_weights(engine, layout), forward_weights(engine, layout)
    raised = []
    for bad in (float("nan"), float("inf")):
        factor = bad if layout.global_rank == 1 else 1.0
        engine.backward(loss(engine, part(layout, 1)) * factor)
        try:
            engine.step(LR)
        except NonFiniteError:
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


def check_unused(zero: int) -> dict[str, Any]:
    """A parameter that took part in step 0 only must have gradient zero in step 1, not a stale one."""
    optim = OptimizerSettings(kind="sgd", grad_clip=None)
    engine, layout = build(zero, optim=optim)
    engine.backward(loss(engine, part(layout, 0), with_unused=True))
    engine.step(0.1)
    before = whole_weights(engine, layout)["unused"]
    engine.backward(loss(engine, part(layout, 1)))
    engine.step(0.1)
    return {"moved": float((whole_weights(engine, layout)["unused"] - before).abs().max())}


def check_accumulation_count(zero: int) -> dict[str, Any]:
    engine, layout = build(zero, accumulation=2)
    engine.backward(loss(engine, part(layout, 0)))
    try:
        engine.step(LR)
    except RuntimeError as error:
        return {"message": str(error)}
    return {"message": ""}


def check_ema(zero: int) -> dict[str, Any]:
    config = EmaConfig(decay=0.9)
    engine, layout = build(zero)
    ema = Ema(engine, config)
    train(engine, layout, range(6), ema)
    reference = single()
    plain = {name: p.detach().clone() for name, p in reference.module.named_parameters()}
    for step in range(6):
        train(reference, None, range(step, step + 1))
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in reference.module.named_parameters():
            plain[name] = decay * plain[name] + (1 - decay) * p.detach()
    before = forward_weights(engine, layout)
    with ema.applied():
        inside = forward_weights(engine, layout)
    after = forward_weights(engine, layout)
    averaged = tiny()
    averaged.load_state_dict({**plain, "mean": averaged.mean})
    return {
        "difference": difference(gathered(layout, ema.slices()), plain),
        "inside": float((inside - averaged(batch(77)[0], with_unused=True)).abs().max()),
        "moved": float((inside - before).abs().max()),
        "restored": torch.equal(before, after),
    }


def gathered(layout: Layout, slices: list) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    mine = [(s.name, s.shape, s.start, s.data.clone()) for s in slices]
    for name, shape, start, data in (item for items in layout.gather_objects(mine) for item in items):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        target.view(-1)[start : start + len(data)] = data
    return whole


def check_resume(zero: int, precision: str, folder: Path) -> dict[str, Any]:
    run_dir = folder / f"run-{zero}-{precision}"
    engine, layout = build(zero, precision=precision)
    ema = Ema(engine, EmaConfig(decay=0.9))
    train(engine, layout, range(4), ema)
    checkpoint.save(run_dir, 4, engine, ema, {"data": {"position": 16}}, layout)
    rest = train(engine, layout, range(4, 8), ema)
    again, _ = build(zero, precision=precision)
    with torch.no_grad():
        again.module.mean.fill_(9.0)
    ema_again = Ema(again, EmaConfig(decay=0.9))
    path = checkpoint.resolve("auto", run_dir)
    manifest = checkpoint.load(path, again, ema_again)
    rest_again = train(again, layout, range(4, 8), ema_again)
    ends = [
        gathered(layout, [i for s in e.master_shards() if s.owner for i in s.slices()[:1]]) for e in (engine, again)
    ]
    moments = [gathered(layout, [s.slices()[2] for s in e.master_shards() if s.owner]) for e in (engine, again)]
    emas = [gathered(layout, e.slices()) for e in (ema, ema_again)]
    return {
        "norms": rest == rest_again,
        "weights": difference(*ends),
        "moments": difference(*moments),
        "ema": difference(*emas),
        "forward": float((forward_weights(engine, layout) - forward_weights(again, layout)).abs().max()),
        "manifest": manifest,
        "buffer": again.module.mean.tolist(),
    }


def check_elastic(source: int, target: int, folder: Path) -> dict[str, Any]:
    """Go on at another stage, and in one plain process, from what ``check_resume`` saved."""
    path = checkpoint.resolve(str(folder / f"run-{source}-fp32"), folder)
    engine, layout = build(target)
    ema = Ema(engine, EmaConfig(decay=0.9))
    checkpoint.load(path, engine, ema)
    train(engine, layout, range(4, 8), ema)
    alone = single()
    ema_alone = Ema(alone, EmaConfig(decay=0.9))
    checkpoint.load(path, alone, ema_alone)
    train(alone, None, range(4, 8), ema_alone)
    never = single()
    ema_never = Ema(never, EmaConfig(decay=0.9))
    train(never, None, range(8), ema_never)
    expected = {s.name: s.data.view(s.shape) for s in ema_never.slices()}
    return {
        "weights": difference(whole_weights(engine, layout), torch_weights(never)),
        "alone": difference(torch_weights(alone), torch_weights(never)),
        "ema": difference(gathered(layout, ema.slices()), expected),
    }


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


def check_disk_full(folder: Path) -> dict[str, Any]:
    run_dir = folder / "full"
    engine, layout = build(2)
    checkpoint.save(run_dir, 1, engine, None, {}, layout)
    write = storage.write_shard

    def refuse(directory: Path, shard_name: str, slices: Any) -> None:
        if layout.global_rank == 1:
            raise OSError(28, "cannot write 123 bytes (7 free)", str(directory))
        write(directory, shard_name, slices)

    storage.write_shard = refuse
    try:
        checkpoint.save(run_dir, 2, engine, None, {}, layout)
        message = ""
    except OSError as error:
        message = str(error)
    finally:
        storage.write_shard = write
    latest = storage.latest_checkpoint(run_dir)
    assert latest is not None
    storage.verify(latest)
    left = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    for step in (3, 4, 5):
        checkpoint.save(run_dir, step, engine, None, {}, layout, keep_last=2)
    layout.barrier()
    kept = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    return {"messages": layout.gather_objects(message), "latest": latest.name, "left": left, "kept": kept}


def check_wrong_model(folder: Path) -> dict[str, Any]:
    config = ParallelConfig(zero=3, precision="fp32")
    layout = Layout.from_environment(config)
    model = tiny()
    model.out = nn.Linear(7, 4)
    model.extra = nn.Parameter(torch.zeros(2))
    del model.unused
    engine = build_engine(model, config=config, optim=OPTIM, layout=layout, num_backwards=1)
    path = checkpoint.resolve(str(folder / "run-2-fp32"), folder)
    try:
        checkpoint.load(path, engine, None)
    except ConfigError as error:
        return {"message": str(error)}
    return {"message": ""}


class Tokens(nn.Module):
    """One attention between the token seams."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.shard_tokens = seams.shard_tokens
        self.gather_tokens = seams.gather_tokens
        self.blocks = nn.ModuleList([TokenBlock(heads)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.shard_tokens(x)
        mask = None if mask is None else self.shard_tokens(mask)
        for block in self.blocks:
            x = block(x, mask)
        return self.gather_tokens(x)


class TokenBlock(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(12, heads, qk_norm=False)
        self.gain = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        attention = self.attention
        q, k, v = (part.unflatten(2, (attention.num_heads, -1)) for part in attention.qkv(x).chunk(3, 2))
        return x + attention.out(attention.attend(q, k, v, key_mask=mask).flatten(2)) * self.gain


def check_sequence() -> dict[str, Any]:
    config = ParallelConfig(zero=0, sequence=2, precision="fp32", activation_checkpointing="full")
    layout = Layout.from_environment(config)
    figures = {}
    for num_tokens in (1, 4, 5):
        for masked in (False, True):
            figures[f"{num_tokens}{' masked' if masked else ''}"] = token_difference(layout, config, num_tokens, masked)
    figures["5 bf16"] = half_difference(layout)
    counts = count_collectives(layout)
    try:
        sequence.shard(Tokens(heads=3), layout)
        heads = ""
    except ConfigError as error:
        heads = str(error)
    return {"differences": figures, "collectives": counts, "heads": heads, "exchanged": check_exchange(layout)}


def token_difference(layout: Layout, config: ParallelConfig, num_tokens: int, masked: bool) -> float:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(2, num_tokens, 12, generator=generator)
    later = torch.randn(2, 9, 12, generator=generator)
    mask = torch.ones(2, num_tokens, dtype=torch.bool) if masked else None
    if mask is not None and num_tokens > 1:
        mask[:, 1] = False
    plain, parallel = Tokens(), Tokens()
    activation.checkpoint_blocks(parallel, config)
    sequence.shard(parallel, layout)
    # Two forward passes of different lengths before one backward: recomputation must not mix their token counts up.
    outputs = [(model(x, mask), model(later)) for model in (plain, parallel)]
    for a, b in outputs:
        (a.square().sum() + b.square().sum()).backward()
    errors = [float((outputs[0][0] - outputs[1][0]).detach().abs().max())]
    for p, q in zip(plain.parameters(), parallel.parameters(), strict=True):
        errors.append(float((p.grad - layout.sum_(q.grad)).abs().max() / p.grad.abs().max()))
    return max(errors)


def half_difference(layout: Layout) -> float:
    """Difference in bf16, times 1e-4 so that the limit of the fp32 rows (1e-5) amounts to 0.1."""
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2)).bfloat16()
    plain, parallel = Tokens().bfloat16(), Tokens().bfloat16()
    sequence.shard(parallel, layout)
    with torch.no_grad():
        return float((plain(x) - parallel(x)).abs().max()) * 1e-4


def check_recompute(zero: int) -> dict[str, Any]:
    """Blocks with parameters of their own, recomputed in the backward pass, over a split sequence."""
    config = ParallelConfig(zero=zero, sequence=2, precision="fp32", activation_checkpointing="full")
    layout = Layout.from_environment(config)
    plain, parallel = Tokens(), Tokens()
    num_blocks = activation.checkpoint_blocks(parallel, config)
    sequence.shard(parallel, layout)
    optim = OptimizerSettings(kind="sgd", grad_clip=None)
    engine = build_engine(parallel, config=config, optim=optim, layout=layout, num_backwards=1)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    plain(x).square().sum().backward()
    engine.backward(engine(x).square().sum())
    gradients = engine.gradients()
    worst = max(float((gradients[n] - p.grad).norm() / p.grad.norm()) for n, p in plain.named_parameters())
    return {"gradient": worst, "blocks": num_blocks}


def count_collectives(layout: Layout) -> dict[str, int]:
    """Count what one attention sends in a forward pass."""
    model = Tokens()
    sequence.shard(model, layout)
    counts = {"all_to_all": 0, "gather": 0}
    swap, gather = layout.swap_sequence, layout.gather_sequence

    def counted_swap(x: Tensor) -> Tensor:
        counts["all_to_all"] += 1
        return swap(x)

    def counted_gather(x: Tensor) -> list[Tensor]:
        counts["gather"] += 1
        return gather(x)

    layout.swap_sequence, layout.gather_sequence = counted_swap, counted_gather
    with torch.no_grad():
        model(torch.zeros(1, 5, 12))
    layout.swap_sequence, layout.gather_sequence = swap, gather
    return counts


def check_exchange(layout: Layout) -> bool:
    def own(member: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(member)
        return {
            "x": torch.randn(2, 3 + member, generator=generator),
            "mask": torch.rand(2, 1 + member, generator=generator) < 0.5,
            "label": torch.arange(2 + member),
            "half": torch.randn(3, generator=generator).bfloat16(),
        }

    received = sequence.exchange(own(layout.sequence_rank), layout)
    return len(received) == 2 and all(
        torch.equal(got, want)
        for member, batches in enumerate(received)
        for got, want in zip(batches.values(), own(member).values(), strict=True)
    )


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
        "sum": layout.sum_(torch.tensor([1.0 + layout.global_rank])).item(),
        "messages": messages,
        "compiled": getattr(deepspeed.comm.comm.cdb, "shm_comm_op", None) is not None,
    }


def checks(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {"layout": check_layout, "sequence": check_sequence}
    for zero in STAGES:
        for name, function in {
            "views": check_views,
            "lr": check_lr,
            "unused": check_unused,
            "count": check_accumulation_count,
            "ema": check_ema,
            "bf16": check_bf16,
        }.items():
            found[f"{name}-{zero}"] = lambda f=function, z=zero: f(z)
        for precision in ("fp32", "bf16"):
            found[f"non_finite-{zero}-{precision}"] = lambda z=zero, p=precision: check_non_finite(z, p)
            found[f"resume-{zero}-{precision}"] = lambda z=zero, p=precision: check_resume(z, p, folder)
    for index, case in enumerate(PROOF_ROWS):
        found[f"proof-{index}"] = lambda c=case: run_case(c)
    found["recompute-0"] = lambda: check_recompute(0)
    for degree, zero in ((1, 2), (2, 0), (2, 3)):
        found[f"packed-{degree}-{zero}"] = lambda d=degree, z=zero: check_packed(d, z)
    found["recompute-3"] = lambda: check_recompute(3)
    for source, target in ((2, 3), (3, 0), (0, 1), (1, 2)):
        found[f"elastic-{source}-{target}"] = lambda s=source, t=target: check_elastic(s, t, folder)
    found["disk_full"] = lambda: check_disk_full(folder)
    found["wrong_model"] = lambda: check_wrong_model(folder)
    return found


def main(out: str, folder: str) -> None:
    results = {}
    for name, function in checks(Path(folder)).items():
        start = time.monotonic()
        try:
            results[name] = function()
        except Exception:
            # A check fails on all processes alike; the others still run.
            results[name] = {"error": traceback.format_exc()}
        results[name]["seconds"] = time.monotonic() - start
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
