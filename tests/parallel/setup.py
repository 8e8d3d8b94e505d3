"""A tiny model, its data and how it is trained; shared by the checks of ``worker.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltd.parallel import (
    Ema,
    Layout,
    OptimizerSettings,
    ParallelConfig,
    build_engine,
    checkpoint,
)
from ltd.parallel.torch_engine import TorchEngine

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


def build(
    zero: int,
    *,
    precision: str = "fp32",
    accumulation: int = 1,
    optim: OptimizerSettings = OPTIM,
    offload: str = "none",
) -> tuple:
    config = ParallelConfig(zero=zero, precision=precision, accumulation=accumulation, timeout_s=100, offload=offload)
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


def gathered(layout: Layout, slices: list) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    mine = [(s.name, s.shape, s.start, s.data.clone()) for s in slices]
    for name, shape, start, data in (item for items in layout.gather_objects(mine) for item in items):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        target.view(-1)[start : start + len(data)] = data
    return whole


def save(
    run_dir: Path,
    step: int,
    engine: Any,
    ema: Ema | None,
    extra: dict[str, Any],
    layout: Layout,
    *,
    keep_last: int | None = None,
) -> Path:
    """Write one checkpoint, there and then."""
    saver = checkpoint.Saver(run_dir, engine, ema, layout, keep_last=keep_last, background=False)
    path = saver.save(step, extra)
    saver.close()
    return path
