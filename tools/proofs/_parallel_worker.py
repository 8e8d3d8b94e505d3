"""One process of the ``parallel`` proof: train a small DiT by every layout asked for and compare with a plain process.

The plain process is torch alone: one model, the whole global batch in one backward pass, ``torch.optim`` and
``clip_grad_norm_``; it shares no code with ``ltd.parallel``. Run under torchrun:
``-m tools.proofs._parallel_worker OUT.json CASES.json``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltd.denoisers.conditioning import Conditioning
from ltd.denoisers.dit import Dit, DitConfig
from ltd.parallel import Layout, OptimizerSettings, ParallelConfig, activation, build_engine, sequence

GLOBAL_BATCH = 8
STEPS = 10
LATENT = (4, 3, 3, 5)  # channels, t, h, w: 45 tokens, which neither 2 nor 4 divides
LR = {"sgd": 0.1, "adamw": 1e-2}
CLIP = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to train the same thing."""

    zero: int
    sequence: int = 1
    accumulation: int = 1
    kind: str = "sgd"
    checkpointing: str = "none"
    #: Deliberate error: what every loss is multiplied by.
    factor: float = 1.0


def build_model() -> Dit:
    """Make the DiT of the proof with every parameter drawn, so that none has gradient zero by its initial value."""
    torch.manual_seed(0)
    config = DitConfig(latent_channels=LATENT[0], patch=(1, 1, 1), width=32, depth=2, num_heads=4, text_dim=6)
    model = Dit(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_batch(step: int) -> dict[str, Tensor]:
    """Draw the global batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    draw = functools.partial(torch.randn, generator=generator)
    mask = torch.rand(GLOBAL_BATCH, 7, generator=generator) < 0.7
    return {
        "x_t": draw(GLOBAL_BATCH, *LATENT),
        "t": torch.rand(GLOBAL_BATCH, generator=generator),
        "target": draw(GLOBAL_BATCH, *LATENT),
        "text": draw(GLOBAL_BATCH, 7, 6),
        "text_mask": mask,
    }


def loss_of(model: Callable[..., Tensor], batch: dict[str, Any]) -> Tensor:
    """Compute a batch's share of the mean squared error over the global batch."""
    cond = Conditioning(text=batch["text"], text_mask=batch["text_mask"])
    error = (model(batch["x_t"], batch["t"], cond).float() - batch["target"]).square().flatten(1).mean(1)
    return error.sum() / GLOBAL_BATCH


@functools.cache
def plain(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train one plain process; return its first pre-clip gradients and its weights after the last step."""
    model = build_model()
    optimizer = make_plain_optimizer(model, kind)
    first: dict[str, Tensor] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, make_batch(step)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        first = first or {name: gradient.clone() for name, gradient in gradients.items()}
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return first, {name: p.detach().clone() for name, p in model.named_parameters()}


def make_plain_optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    """Make the reference optimizer: torch's own loops, not the fused kernels the engines use."""
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=LR[kind], foreach=False)
    return torch.optim.AdamW(model.parameters(), lr=LR[kind], betas=(0.9, 0.95), weight_decay=0.0, foreach=False)


def run(case: Case, layout: Layout, config: ParallelConfig) -> dict[str, float]:
    """Train by one layout and compare.

    Args:
        case: What to do.
        layout: This process.
        config: The case as a configuration.

    Returns:
        ``gradient``: relative L2 difference of the first gradient; ``worst``: the same for the worst single tensor;
        ``weights``: largest difference of a weight after the last step.
    """
    model = build_model()
    activation.checkpoint_blocks(model, config)
    sequence.shard(model, layout)
    optim = OptimizerSettings(kind=case.kind, grad_clip=CLIP, betas=(0.9, 0.95))  # type: ignore[arg-type]
    num_backwards = case.accumulation * case.sequence
    engine = build_engine(model, config=config, optim=optim, layout=layout, num_backwards=num_backwards)
    first: dict[str, Tensor] = {}
    for step in range(STEPS):
        for batch in deal(make_batch(step), case, layout):
            engine.backward(loss_of(engine, batch) * case.factor)
        first = first or engine.gradients()
        engine.step(LR[case.kind])
    return compare(first, whole_weights(engine, layout), case.kind)


def deal(batch: dict[str, Tensor], case: Case, layout: Layout) -> list[dict[str, Any]]:
    """Cut this process's micro-batches out of a global batch and exchange them in the sequence group."""
    size = GLOBAL_BATCH // (layout.world_size * case.accumulation)
    dealt: list[dict[str, Any]] = []
    for micro in range(case.accumulation):
        first = (micro * layout.world_size + layout.global_rank) * size
        dealt += sequence.exchange({name: value[first : first + size] for name, value in batch.items()}, layout)
    return dealt


def whole_weights(engine: Any, layout: Layout) -> dict[str, Tensor]:
    """Put the full fp32 masters together from every process's shards."""
    shards = [(s.name, s.shape, s.start, s.data.reshape(-1).clone()) for s in engine.master_shards() if s.owner]
    whole: dict[str, Tensor] = {}
    for name, shape, start, data in (item for part in layout.gather_objects(shards) for item in part):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        target.view(-1)[start : start + len(data)] = data
    return whole


def compare(gradients: dict[str, Tensor], weights: dict[str, Tensor], kind: str) -> dict[str, float]:
    """Measure the differences to the plain process; a tensor whose true gradient is rounding only counts in the sum."""
    true_gradients, true_weights = plain(kind)
    total = torch.cat([gradient.flatten() for gradient in true_gradients.values()]).norm()
    errors = {name: (gradients[name] - gradient).norm() for name, gradient in true_gradients.items()}
    worst = [errors[name] / g.norm() for name, g in true_gradients.items() if g.norm() > 1e-4 * total]
    return {
        "gradient": float(torch.stack(list(errors.values())).norm() / total),
        "worst": float(max(worst)),
        "weights": max(float((weights[name] - value).abs().max()) for name, value in true_weights.items()),
    }


def run_case(case: Case) -> dict[str, Any]:
    """Train by one layout, under torchrun, and compare; return the case's fields and its figures."""
    config = ParallelConfig(
        zero=case.zero,
        sequence=case.sequence,
        accumulation=case.accumulation,
        precision="fp32",
        activation_checkpointing=case.checkpointing,  # type: ignore[arg-type]
        timeout_s=120,
    )
    layout = Layout.from_environment(config)
    return {**dataclasses.asdict(case), "processes": layout.world_size, **run(case, layout, config)}


def main(out: str, cases: str) -> None:
    """Run the cases of a JSON file and let the main process write their figures."""
    results = [run_case(Case(**fields)) for fields in json.loads(Path(cases).read_text())]
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
