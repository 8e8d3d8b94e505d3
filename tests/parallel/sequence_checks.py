"""Sequence parallelism, measured on two processes; part of ``worker.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.nn import seams
from ltd.nn.attention import SelfAttention
from ltd.parallel import (
    Layout,
    OptimizerSettings,
    ParallelConfig,
    activation,
    build_engine,
    sequence,
)


class Tokens(nn.Module):
    """One attention between the token seams."""

    def __init__(self, heads: int = 2, head_dim: int = 6) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.shard_tokens = seams.shard_tokens
        self.gather_tokens = seams.gather_tokens
        self.blocks = nn.ModuleList([TokenBlock(heads, heads * head_dim)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.shard_tokens(x)
        mask = None if mask is None else self.shard_tokens(mask)
        for block in self.blocks:
            x = block(x, mask)
        return self.gather_tokens(x)


class TokenBlock(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, qk_norm=False)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        attention = self.attention
        q, k, v = (part.unflatten(2, (attention.num_heads, -1)) for part in attention.qkv(x).chunk(3, 2))
        return x + attention.out(attention.attend(q, k, v, key_mask=mask).flatten(2)) * self.gain


def check_sequence(degree: int = 2) -> dict[str, Any]:
    config = ParallelConfig(zero=0, sequence=degree, precision="fp32", activation_checkpointing="full")
    layout = Layout.from_environment(config)
    figures = {}
    for heads in (1, 2, 3, 4, 5, 7):
        for num_tokens in (1, 4, 5, 45):
            for masked in (False, True):
                name = f"{heads} heads, {num_tokens}{' masked' if masked else ''} tokens"
                figures[name] = token_difference(layout, config, heads, num_tokens, masked)
    if degree == 2:
        figures["5 bf16"] = half_difference(layout)
    return {
        "differences": figures,
        "collectives": [count_collectives(layout, heads) for heads in (1, 2, 3)],
        "refused": refusal(layout),
        "exchanged": check_exchange(layout),
    }


def refusal(layout: Layout) -> str:
    model = Tokens()
    model.blocks[0].needs_all_tokens = True
    try:
        sequence.shard(model, layout)
    except ConfigError as error:
        return str(error)
    return ""


def token_difference(layout: Layout, config: ParallelConfig, heads: int, num_tokens: int, masked: bool) -> float:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(2, num_tokens, 6 * heads, generator=generator)
    later = torch.randn(2, 9, 6 * heads, generator=generator)
    mask = torch.ones(2, num_tokens, dtype=torch.bool) if masked else None
    if mask is not None and num_tokens > 1:
        mask[:, 1] = False
    plain, parallel = Tokens(heads), Tokens(heads)
    activation.checkpoint_blocks(parallel, config)
    sequence.shard(parallel, layout)
    # Two forward passes of different lengths before one backward: recomputation must not mix their token counts up.
    outputs = [(model(x, mask), model(later)) for model in (plain, parallel)]
    for a, b in outputs:
        (a.square().sum() + b.square().sum()).backward()
    errors = [float((outputs[0][0] - outputs[1][0]).detach().abs().max())]
    for p, q in zip(plain.parameters(), parallel.parameters(), strict=True):
        # each group holds the whole gradient, in parts
        errors.append(float((p.grad - group_sum(layout, q.grad)).abs().max() / p.grad.abs().max()))
    return max(errors)


def group_sum(layout: Layout, x: Tensor) -> Tensor:
    return layout.sum_(x) / (layout.world_size // layout.sequence)


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
