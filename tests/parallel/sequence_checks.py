"""Sequence parallelism, measured on two and four processes; part of ``worker.py`` and ``wide_worker.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.denoisers import DitConfig
from ltd.denoisers.blocks import DitBlock, TokenContext
from ltd.nn import seams
from ltd.nn.attention import SelfAttention
from ltd.nn.packing import Segments
from ltd.nn.rope import rope_tables
from ltd.parallel import (
    Layout,
    OptimizerSettings,
    ParallelConfig,
    activation,
    build_engine,
    sequence,
)

#: Head counts below, at, above and between the degrees 2 and 4; token counts that leave members without a real token.
HEADS = (1, 2, 3, 4, 5, 6)
TOKENS = (1, 4, 5, 45)


class Tokens(nn.Module):
    """One attention between the token seams."""

    def __init__(self, heads: int = 2, head_dim: int = 6) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.shard_tokens = seams.shard_tokens
        self.gather_tokens = seams.gather_tokens
        self.blocks = nn.ModuleList([TokenBlock(heads, heads * head_dim)])

    def forward(self, x: Tensor, mask: Tensor | None = None, segments: Segments | None = None) -> Tensor:
        x = self.shard_tokens(x)
        mask = None if mask is None else self.shard_tokens(mask)
        for block in self.blocks:
            x = block(x, mask, segments)
        return self.gather_tokens(x)


class TokenBlock(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, qk_norm=False)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, mask: Tensor | None, segments: Segments | None) -> Tensor:
        attention = self.attention
        q, k, v = (part.unflatten(2, (attention.num_heads, -1)) for part in attention.qkv(x).chunk(3, 2))
        mixed = attention.attend(q, k, v, key_mask=mask, **({} if segments is None else {"segments": segments}))
        return x + attention.out(mixed.flatten(2)) * self.gain


class Conditioned(nn.Module):
    """DiT blocks that read text, with a condition of its own for every token, as of a video with a time per frame."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.shard_tokens = seams.shard_tokens
        self.gather_tokens = seams.gather_tokens
        width = 6 * heads
        config = DitConfig(latent_channels=1, width=width, depth=2, num_heads=heads, mlp_width=16, text_dim=width)
        self.blocks = nn.ModuleList(DitBlock(config) for _ in range(2))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def forward(self, x: Tensor, condition: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], dtype=torch.float32).view(1, -1, 1).expand(1, -1, 3)
        x, condition, positions = (self.shard_tokens(y) for y in (x, condition, positions))
        tables = rope_tables(positions, (2, 2, 2))
        for block in self.blocks:
            x = block(x, condition, TokenContext(*tables, text=text, text_mask=text_mask))
        return self.gather_tokens(x)


def check_sequence(degree: int = 2) -> dict[str, Any]:
    config = ParallelConfig(zero=0, sequence=degree, precision="fp32", activation_checkpointing="full")
    layout = Layout.from_environment(config)
    figures = {}
    for heads in HEADS:
        for num_tokens in TOKENS:
            for kind in ("plain", "masked", "packed"):
                name = f"{heads} heads, {num_tokens} tokens, {kind}"
                figures[name] = token_difference(layout, config, heads, num_tokens, kind)
    return {
        "differences": figures,
        "bf16": half_difference(layout),
        "collectives": [count_collectives(layout, heads) for heads in (1, 2, 3)],
        "refused": refusal(layout),
        "exchanged": check_exchange(layout),
    }


def check_conditioned(degree: int, zero: int, heads: int) -> dict[str, Any]:
    """Per-token conditions, rotations and text through an engine, against one plain process."""
    config = ParallelConfig(zero=zero, sequence=degree, precision="fp32", activation_checkpointing="full")
    layout = Layout.from_environment(config)
    plain, parallel = Conditioned(heads), Conditioned(heads)
    num_blocks = activation.checkpoint_blocks(parallel, config)
    sequence.shard(parallel, layout)
    optim = OptimizerSettings(kind="sgd", grad_clip=None)
    engine = build_engine(parallel, config=config, optim=optim, layout=layout, num_backwards=1)
    draw = torch.Generator().manual_seed(0)
    x, condition = torch.randn(2, 2, 7, 6 * heads, generator=draw)
    text, mask = torch.randn(2, 3, 6 * heads, generator=draw), torch.rand(2, 3, generator=draw) < 0.7
    outputs = []
    for model in (plain, engine):
        out = model(x, condition, text, mask)
        outputs.append(out.detach())
        loss = out.square().sum() / (1 if model is plain else layout.world_size // degree)
        loss.backward() if model is plain else engine.backward(loss)
    gradients = engine.gradients()
    worst = max(float((gradients[n] - p.grad).norm() / p.grad.norm()) for n, p in plain.named_parameters())
    same = float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max())
    return {"gradient": worst, "output": same, "blocks": num_blocks}


def refusal(layout: Layout) -> str:
    model = Tokens()
    model.blocks[0].needs_all_tokens = True
    try:
        sequence.shard(model, layout)
    except ConfigError as error:
        return str(error)
    return ""


def token_difference(layout: Layout, config: ParallelConfig, heads: int, num_tokens: int, kind: str) -> float:
    generator = torch.Generator().manual_seed(num_tokens)
    rows = 1 if kind == "packed" else 2
    x = torch.randn(rows, num_tokens, 6 * heads, generator=generator)
    later = torch.randn(2, 9, 6 * heads, generator=generator)
    mask = torch.ones(2, num_tokens, dtype=torch.bool) if kind == "masked" else None
    if mask is not None and num_tokens > 1:
        mask[:, 1] = False
    lengths = tuple(length for length in (num_tokens - num_tokens // 3 - 1, num_tokens // 3, 1) if length)
    segments = Segments(lengths, lengths) if kind == "packed" else None
    plain, parallel = Tokens(heads), Tokens(heads)
    activation.checkpoint_blocks(parallel, config)
    sequence.shard(parallel, layout)
    # Two forward passes of different lengths before one backward: recomputation must not mix their token counts up.
    outputs = [(model(x, mask, segments), model(later)) for model in (plain, parallel)]
    for a, b in outputs:
        (a.square().sum() + b.square().sum()).backward()
    errors = [float((a - b).detach().abs().max()) for a, b in zip(*outputs, strict=True)]
    for p, q in zip(plain.parameters(), parallel.parameters(), strict=True):
        # each group holds the whole gradient, in parts
        errors.append(float((p.grad - group_sum(layout, q.grad)).abs().max() / p.grad.abs().max()))
    return max(errors)


def group_sum(layout: Layout, x: Tensor) -> Tensor:
    return layout.sum_(x) / (layout.world_size // layout.sequence)


def half_difference(layout: Layout) -> float:
    x = torch.randn(2, 5, 18, generator=torch.Generator().manual_seed(2)).bfloat16()
    plain, parallel = Tokens(3).bfloat16(), Tokens(3).bfloat16()
    sequence.shard(parallel, layout)
    with torch.no_grad():
        return float((plain(x) - parallel(x)).abs().max())


def count_collectives(layout: Layout, heads: int) -> dict[str, int]:
    """Count what one attention sends in a forward pass: collectives, and elements that leave this process."""
    model = Tokens(heads)
    sequence.shard(model, layout)
    counts = {"all_to_all": 0, "gather": 0, "sent": 0}
    swap, gather = layout.swap_sequence, layout.gather_sequence

    def counted_swap(x: Tensor, send: Any, receive: Any) -> Tensor:
        counts["all_to_all"] += 1
        counts["sent"] += (sum(send) - send[layout.sequence_rank]) * x[0].numel()
        return swap(x, send, receive)

    def counted_gather(x: Tensor) -> list[Tensor]:
        counts["gather"] += 1
        return gather(x)

    layout.swap_sequence, layout.gather_sequence = counted_swap, counted_gather
    with torch.no_grad():
        model(torch.zeros(1, 8, 6 * heads))
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
    return len(received) == layout.sequence and all(
        torch.equal(got, want)
        for member, batches in enumerate(received)
        for got, want in zip(batches.values(), own(member).values(), strict=True)
    )
