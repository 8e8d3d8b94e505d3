"""One process of the ``parallel`` proof: train a small DiT by every layout asked for and compare with a plain process.

The plain process is torch alone: one model, the whole global batch (packs: sample by sample) before one update,
``torch.optim`` and ``clip_grad_norm_``; it shares no code with ``ltd.parallel``. Run under torchrun:
``-m tools.proofs._parallel_worker OUT.json CASES.json``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltd.denoisers.conditioning import Conditioning
from ltd.denoisers.dit import Dit, DitConfig
from ltd.parallel import Layout, OptimizerSettings, ParallelConfig, activation, build_engine, sequence
from ltd.parallel.compilation import compile_blocks

GLOBAL_BATCH = 8
STEPS = 10
CHANNELS = 4
#: Latent cells (t, h, w) of every sample: 45 tokens, which neither 2 nor 4 divides.
SIZE = (3, 3, 5)
#: Of the samples of packs: 1 to 45 tokens, so that every process has another number of them.
SIZES = ((1, 3, 5), (3, 3, 5), (1, 1, 1), (2, 3, 3), (3, 2, 2), (1, 5, 3), (2, 2, 5), (1, 2, 3))
#: With unequal numbers of real samples: those that weigh nothing, as samples that could not be read do.
MISSING = (5, 6, 7)
LR = {"sgd": 0.1, "adamw": 1e-2}
CLIP = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to train the same thing."""

    zero: int
    sequence: int = 1
    accumulation: int = 1
    kind: str = "sgd"
    engine: str = "deepspeed"
    checkpointing: str = "none"
    every: int = 1
    offload: str = "none"
    compile: str = "none"
    #: Attention heads; their number changes the model.
    heads: int = 4
    #: Each process lays its samples, of different sizes, one behind another.
    packed: bool = False
    #: Processes hold different numbers of samples that count.
    unequal: bool = False
    #: Train a second time and compare every bit.
    repeat: bool = False
    #: Deliberate error: what every loss is multiplied by.
    factor: float = 1.0
    #: Deliberate error: the gradient of one attention of a split sequence is multiplied by the degree.
    wrong_seam: bool = False

    @property
    def task(self) -> tuple[str, int, bool, bool]:
        """Name what is learned, apart from how."""
        return self.kind, self.heads, self.packed, self.unequal


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training gave."""

    losses: list[float]
    #: Full gradients of the first step, before clipping.
    gradients: dict[str, Tensor]
    #: Full weights after the last step.
    weights: dict[str, Tensor]


def build_model(heads: int) -> Dit:
    """Make the DiT of the proof with every parameter drawn, so that none has gradient zero by its initial value."""
    torch.manual_seed(0)
    width = 32 if heads in (2, 4) else 8 * heads
    model = Dit(DitConfig(latent_channels=CHANNELS, patch=(1, 1, 1), width=width, depth=2, num_heads=heads, text_dim=6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@dataclasses.dataclass(frozen=True)
class Samples:
    """Part of a step's global batch."""

    x_t: list[Tensor]
    target: list[Tensor]
    #: ``t``, ``text``, ``text_mask`` and ``weight``, one row per sample.
    rows: dict[str, Tensor]

    def select(self, part: slice) -> Samples:
        """Take some of the samples."""
        return Samples(self.x_t[part], self.target[part], {name: value[part] for name, value in self.rows.items()})


def make_batch(step: int, task: tuple[str, int, bool, bool]) -> Samples:
    """Draw the global batch of a step."""
    _, _, packed, unequal = task
    generator = torch.Generator().manual_seed(100 + step)
    draw = functools.partial(torch.randn, generator=generator)
    sizes = SIZES if packed else (SIZE,) * GLOBAL_BATCH
    weight = torch.ones(GLOBAL_BATCH)
    if unequal:
        weight[list(MISSING)] = 0
    rows = {
        "t": torch.rand(GLOBAL_BATCH, generator=generator),
        "text": draw(GLOBAL_BATCH, 7, 6),
        "text_mask": torch.rand(GLOBAL_BATCH, 7, generator=generator) < 0.7,
        "weight": weight,
    }
    return Samples([draw(CHANNELS, *size) for size in sizes], [draw(CHANNELS, *size) for size in sizes], rows)


def total_weight(task: tuple[str, int, bool, bool]) -> int:
    """Count the samples of a global batch that weigh something."""
    return GLOBAL_BATCH - len(MISSING) * task[3]


def loss_of(model: Callable[..., Any], samples: Samples, total: int, *, as_list: bool) -> Tensor:
    """Compute the samples' share of the weighted mean squared error over the global batch."""
    rows = samples.rows
    cond = Conditioning(text=rows["text"], text_mask=rows["text_mask"])
    outputs = model(samples.x_t if as_list else torch.stack(samples.x_t), rows["t"], cond)
    errors = [(out.float() - y).square().mean() for out, y in zip(outputs, samples.target, strict=True)]
    return (torch.stack(errors) * rows["weight"]).sum() / total


@functools.cache
def plain(task: tuple[str, int, bool, bool]) -> Trained:
    """Train one plain process; samples that weigh nothing are not there at all."""
    kind, heads, packed, _ = task
    model = build_model(heads)
    optimizer = make_plain_optimizer(model, kind)
    total = total_weight(task)
    first: dict[str, Tensor] = {}
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        samples = make_batch(step, task).select(slice(0, total))
        parts = [slice(row, row + 1) for row in range(total)] if packed else [slice(0, total)]
        loss = torch.stack([loss_of(model, samples.select(part), total, as_list=False) for part in parts]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        first = first or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return Trained(losses, first, {name: p.detach().clone() for name, p in model.named_parameters()})


def make_plain_optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    """Make the reference optimizer: torch's own loops, not the fused kernels the engines use."""
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=LR[kind], foreach=False)
    return torch.optim.AdamW(model.parameters(), lr=LR[kind], betas=(0.9, 0.95), weight_decay=0.0, foreach=False)


def train(case: Case, layout: Layout, config: ParallelConfig) -> Trained:
    """Train by one layout.

    Args:
        case: What to do.
        layout: This process.
        config: The case as a configuration.

    Returns:
        Losses of the global batches, gradients and weights, whole and on every process.
    """
    model = build_model(case.heads)
    activation.checkpoint_blocks(model, config)
    sequence.shard(model, layout)
    if case.wrong_seam:
        _plant_error(model, float(layout.sequence))
    compile_blocks(model, config)
    optim = OptimizerSettings(kind=case.kind, grad_clip=CLIP, betas=(0.9, 0.95))  # type: ignore[arg-type]
    num_backwards = case.accumulation * case.sequence
    engine = build_engine(model, config=config, optim=optim, layout=layout, num_backwards=num_backwards)
    first: dict[str, Tensor] = {}
    losses = torch.zeros(STEPS, dtype=torch.float64)
    for step in range(STEPS):
        for samples in deal(make_batch(step, case.task), case, layout):
            loss = loss_of(engine, samples, total_weight(case.task), as_list=case.packed)
            losses[step] += loss.detach() / layout.sequence  # every member of a sequence group has the whole loss
            engine.backward(loss * case.factor)
        first = first or engine.gradients()
        engine.step(LR[case.kind])
    return Trained(layout.sum_(losses).tolist(), first, whole_weights(engine, layout))


def deal(batch: Samples, case: Case, layout: Layout) -> list[Samples]:
    """Cut this process's micro-batches out of a global batch and exchange them in the sequence group."""
    size = GLOBAL_BATCH // (layout.world_size * case.accumulation)
    dealt = []
    for micro in range(case.accumulation):
        first = (micro * layout.world_size + layout.global_rank) * size
        own = batch.select(slice(first, first + size))
        flat = {name: torch.cat([x.flatten() for x in getattr(own, name)]) for name in ("x_t", "target")}
        shapes = torch.tensor([x.shape for x in own.x_t])
        for received in sequence.exchange({**own.rows, **flat, "shapes": shapes}, layout):
            sizes = received.pop("shapes").tolist()
            x_t, target = (_split(received.pop(name), sizes) for name in ("x_t", "target"))
            dealt.append(Samples(x_t, target, received))
    return dealt


def whole_weights(engine: Any, layout: Layout) -> dict[str, Tensor]:
    """Put the full fp32 masters together from every process's shards."""
    shards = [(s.name, s.shape, s.start, s.data.reshape(-1).clone()) for s in engine.master_shards() if s.owner]
    whole: dict[str, Tensor] = {}
    for name, shape, start, data in (item for part in layout.gather_objects(shards) for item in part):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        target.view(-1)[start : start + len(data)] = data
    return whole


def compare(found: Trained, true: Trained) -> dict[str, float]:
    """Measure the differences to the plain process; a tensor whose true gradient is rounding only counts in the sum.

    Args:
        found: Of a layout.
        true: Of the plain process.

    Returns:
        ``loss``: largest relative difference of a step's loss; ``gradient``: relative L2 difference of the first
        gradient; ``worst``: the same for the worst single tensor; ``weights``: largest difference of a weight after
        the last step.
    """
    total = torch.cat([gradient.flatten() for gradient in true.gradients.values()]).norm()
    errors = {name: (found.gradients[name] - gradient).norm() for name, gradient in true.gradients.items()}
    worst = [errors[name] / g.norm() for name, g in true.gradients.items() if g.norm() > 1e-4 * total]
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(found.losses, true.losses, strict=True)),
        "gradient": float(torch.stack(list(errors.values())).norm() / total),
        "worst": float(max(worst)),
        "weights": max(float((found.weights[name] - value).abs().max()) for name, value in true.weights.items()),
    }


def identical(a: Trained, b: Trained) -> bool:
    """Say whether two trainings have the same losses, gradients and weights, bit for bit."""
    pairs = [(a.gradients, b.gradients), (a.weights, b.weights)]
    return a.losses == b.losses and all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)


def run_case(case: Case) -> dict[str, Any]:
    """Train by one layout, under torchrun, and compare; return the case's fields and its figures."""
    config = ParallelConfig(
        engine=case.engine,  # type: ignore[arg-type]
        zero=case.zero,
        sequence=case.sequence,
        accumulation=case.accumulation,
        precision="fp32",
        activation_checkpointing=case.checkpointing,  # type: ignore[arg-type]
        activation_checkpointing_every=case.every,
        offload=case.offload,  # type: ignore[arg-type]
        compile=case.compile,  # type: ignore[arg-type]
        timeout_s=120,
    )
    layout = Layout.from_environment(config)
    found = train(case, layout, config)
    figures: dict[str, Any] = compare(found, plain(case.task))
    figures["identical"] = identical(found, train(case, layout, config)) if case.repeat else None
    return {**dataclasses.asdict(case), "processes": layout.world_size, **figures}


def main(out: str, cases: str) -> None:
    """Run the cases of a JSON file and let the main process write their figures.

    Args:
        out: File that is written.
        cases: File with the cases; one that raises does so on all processes, and the others still run.
    """
    layout = Layout.from_environment(ParallelConfig())
    results = []
    for fields in json.loads(Path(cases).read_text()):
        try:
            results.append(run_case(Case(**fields)))
        except Exception as error:
            traceback.print_exc()
            results.append({**fields, "processes": layout.world_size, "error": f"{type(error).__name__}: {error}"})
    if layout.is_main:
        Path(out).write_text(json.dumps(results))
    layout.close()


def _split(flat: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    pieces = flat.split([torch.Size(shape).numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _plant_error(model: Dit, factor: float) -> None:
    attention: Any = next(module for module in model.modules() if "attend" in vars(module))
    attend = attention.attend

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = attend(*args, **kwargs)
        # The same values, with another gradient.
        return out * factor - out.detach() * (factor - 1.0)

    attention.attend = wrong


if __name__ == "__main__":
    main(*sys.argv[1:])
