"""Compiled blocks give what eager ones give, share their graphs, and say so."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.denoisers import Dit, DitConfig
from ltd.parallel import ParallelConfig, compilation
from ltd.parallel.activation import ATTENTION_OPERATIONS, checkpoint_blocks
from ltd.parallel.compilation import compile_blocks

DEPTH = 3


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def model() -> Dit:
    torch.manual_seed(0)
    made = Dit(DitConfig(latent_channels=2, patch=(1, 1, 1), width=16, depth=DEPTH, num_heads=2))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


def gradient(denoiser: Dit, width: int) -> Tensor:
    """Loss and gradients of two forward passes before one backward, as one vector."""
    denoiser.zero_grad()
    draw = torch.Generator().manual_seed(width)
    x, t = torch.randn(2, 2, 1, 3, width, generator=draw), torch.rand(2, generator=draw)
    loss = denoiser(x, t).square().mean() + denoiser(x, t * 0.5).square().mean()
    loss.backward()
    return torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in denoiser.parameters())])


def num_attentions(denoiser: Dit, width: int) -> int:
    """Attentions of two forward passes and a backward one; torch's profiler sees those of compiled code too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradient(denoiser, width)
    return sum(event.name in ATTENTION_OPERATIONS for event in profile.events())


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "attentions"), [("none", 1), ("full", 2), ("selective", 1)])
def test_compiled_blocks_equal_eager_ones(mode: str, attentions: int) -> None:
    config = ParallelConfig(compile="blocks", activation_checkpointing=mode)
    denoiser = model()
    names = list(denoiser.state_dict())
    checkpoint_blocks(denoiser, config)
    compiled = compile_blocks(denoiser, config)
    assert compiled.modules == ("blocks.0", "blocks.1", "blocks.2")
    assert compiled.num_graphs() == 0, "nothing is compiled before the first call"
    # Inductor fuses and reorders sums, so that results differ by rounding.
    eager = gradient(model(), 4)
    assert (gradient(denoiser, 4) - eager).norm() < 1e-5 * eager.norm()
    assert compiled.num_graphs() == 1, "the blocks share a graph"
    assert num_attentions(denoiser, 4) == 2 * DEPTH * attentions
    assert compiled.num_graphs() == 1
    assert list(denoiser.state_dict()) == names


def test_graphs_are_counted_and_too_many_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph, inputs: graph.forward)
    monkeypatch.setattr(compilation, "MAX_GRAPHS", 3)
    stack = nn.Module()
    stack.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    compiled = compile_blocks(stack, ParallelConfig(compile="blocks"))
    counts = []
    with caplog.at_level(logging.WARNING, logger="ltd.parallel.compilation"):
        for x in (torch.ones(4), torch.ones(2, 4), torch.ones(2, 2, 4), torch.ones(2, 2, 2, 4)):
            for block in stack.blocks:
                block(x)
            counts.append(compiled.num_graphs())
    assert counts == [1, 2, 3, 4]
    assert len(caplog.messages) == 1
    assert "3 graphs" in caplog.messages[0] and "data.batching" in caplog.messages[0]


def test_none_compiles_nothing() -> None:
    denoiser = model()
    compiled = compile_blocks(denoiser, ParallelConfig())
    assert compiled.modules == () and compiled.num_graphs() == 0
    assert all("forward" not in vars(block) for block in denoiser.blocks)


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="parallel.compile: Linear has no blocks; set it to none"):
        compile_blocks(nn.Linear(2, 2), ParallelConfig(compile="blocks"))


def test_stage_3_is_refused() -> None:
    with pytest.raises(ConfigError, match="parallel.compile: blocks needs parallel.zero of 0, 1 or 2, got 3"):
        compile_blocks(model(), ParallelConfig(compile="blocks", zero=3))
