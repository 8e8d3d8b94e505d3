"""A pack of samples on two processes against the samples one by one on one; part of ``worker.py``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ltd.denoisers import Conditioning, Dit, DitConfig, Frames
from ltd.parallel import Layout, OptimizerSettings, ParallelConfig, activation, build_engine, sequence

#: Packs of samples (t, h, w) for two processes: odd and even totals, a cut inside a sample, a process of padding only.
PACKS = {
    "odd": [(1, 2, 3), (3, 2, 2), (1, 2, 3), (2, 3, 3), (1, 1, 1)],
    "one token": [(1, 1, 1)],
    "cut between": [(1, 2, 3), (1, 3, 2)],
}


def packed_model(config: ParallelConfig, layout: Layout | None, heads: int = 2, frames: bool = False) -> Dit:
    options = DitConfig(
        latent_channels=2,
        patch=(1, 1, 1),
        width=8 * heads,
        depth=2,
        num_heads=heads,
        text_dim=3,
        pooled_text=True,
        frames="times" if frames else "none",
    )
    torch.manual_seed(4)
    model = Dit(options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    if layout is not None:
        activation.checkpoint_blocks(model, config)
        sequence.shard(model, layout)
    return model


def packed_batch(name: str) -> tuple[list[Tensor], Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(6)
    latents = [torch.randn(2, *size, generator=generator) for size in PACKS[name]]
    t = torch.rand(len(latents), generator=generator)
    mask = torch.rand(len(latents), 4, generator=generator) < 0.6
    mask[-1] = False
    return latents, t, Conditioning(torch.randn(len(latents), 4, 3, generator=generator), mask)


def known_frames(latents: list[Tensor]) -> tuple[Frames, ...]:
    """Known cells of every sample, about a half of them, none of the second."""
    generator = torch.Generator().manual_seed(8)
    frames = []
    for number, x in enumerate(latents):
        mask = torch.rand(1, 1, *x.shape[1:], generator=generator) < (0.5 if number != 1 else 0.0)
        frames.append(Frames(torch.randn(1, *x.shape, generator=generator), mask))
    return tuple(frames)


def check_packed(degree: int, zero: int, heads: int = 2) -> dict[str, Any]:
    """A pack through DeepSpeed against its samples one by one in a plain process; recomputed blocks, split sequence."""
    config = ParallelConfig(zero=zero, sequence=degree, precision="fp32", activation_checkpointing="full")
    layout = Layout.from_environment(config)
    optim = OptimizerSettings(kind="sgd", grad_clip=None)
    figures = {}
    cases = [(name, name, False) for name in PACKS] + [("odd, known frames", "odd", True)]
    for name, sizes, frames in cases:
        model = packed_model(config, layout, heads, frames)
        engine = build_engine(model, config=config, optim=optim, layout=layout, num_backwards=1)
        plain = packed_model(config, None, heads, frames)
        latents, t, cond = packed_batch(sizes)
        rows = [slice(i, i + 1) for i in range(len(latents))]
        conds = [cond.select(row) for row in rows]
        if frames:
            cond = dataclasses.replace(cond, frames=known_frames(latents))
            conds = [dataclasses.replace(c, frames=f) for c, f in zip(conds, known_frames(latents), strict=True)]
        alone = [plain(x[None], t[row], c)[0] for x, row, c in zip(latents, rows, conds, strict=True)]
        packed = engine(latents, t, cond)
        losses = [torch.stack([x.square().mean() for x in outs]).sum() for outs in (alone, packed)]
        losses[0].backward()
        engine.backward(losses[1] / (layout.world_size // degree))  # every group holds the whole pack
        gradients = engine.gradients()
        total = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
        errors = [(gradients[n] - p.grad).norm() / total for n, p in plain.named_parameters()]
        figures[f"{name}: gradient"] = float(torch.stack(errors).norm())
        figures[f"{name}: loss"] = float((losses[1] - losses[0]).detach().abs() / losses[0].detach())
    return figures
