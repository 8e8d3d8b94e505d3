"""Recomputed blocks give the bits of kept ones, and attention runs as often as each mode says."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltd.config import ConfigError
from ltd.denoisers import Conditioning, Dit, DitConfig
from ltd.parallel import ParallelConfig, activation
from ltd.parallel.activation import ATTENTION_OPERATIONS, checkpoint_blocks

DEPTH = 3
MODES = [("full", 1), ("full", 2), ("selective", 1), ("selective", 2), ("selective", 5)]


class CountAttention(TorchDispatchMode):
    """Count the attention operations that really run: what a checkpoint gives back does not come by here."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ATTENTION_OPERATIONS
        return func(*args, **(kwargs or {}))


def config(mode: str, every: int) -> ParallelConfig:
    return ParallelConfig(activation_checkpointing=mode, activation_checkpointing_every=every)


def model(mode: str, every: int = 1, *, text: bool = True) -> Dit:
    torch.manual_seed(0)
    options = DitConfig(latent_channels=2, patch=(1, 1, 1), width=32, depth=DEPTH, num_heads=2)
    made = Dit(DitConfig(**{**vars(options), "text_dim": 3}) if text else options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    checkpoint_blocks(made, config(mode, every))
    return made


def run(denoiser: Dit, *, packed: bool, passes: int = 2) -> tuple[list[Tensor], tuple[int, int]]:
    """Loss and gradients of forward passes of different sizes before one backward; attentions in each direction."""
    draw = torch.Generator().manual_seed(1)
    t, text = torch.rand(2, generator=draw), torch.randn(2, 4, 3, generator=draw)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    cond = Conditioning(text, mask) if denoiser.config.text_dim else None
    outs: list[Tensor] = []
    with CountAttention() as counter:
        for size in range(3, 3 + passes):
            x = torch.randn(2, 2, 2, 3, size, generator=draw)
            outs += denoiser([x[0], x[1, :, :1]], t, cond) if packed else [denoiser(x, t, cond)]
        loss = torch.stack([out.float().square().sum() for out in outs]).sum()
        forward = counter.count
        loss.backward()
    return [loss.detach(), *(p.grad for p in denoiser.parameters() if p.grad is not None)], (
        forward,
        counter.count - forward,
    )


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mode", "every"), MODES)
def test_recomputation_changes_no_bit(mode: str, every: int, dtype: torch.dtype, packed: bool) -> None:
    kept, _ = run(model("none").to(dtype), packed=packed)
    recomputed, _ = run(model(mode, every).to(dtype), packed=packed)
    assert len(kept) == len(recomputed) == 1 + len(list(model("none").parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("text", [False, True], ids=["self", "self and cross"])
@pytest.mark.parametrize(
    ("mode", "every", "again"),
    [("none", 1, 0), ("full", 1, DEPTH), ("full", 2, 2), ("selective", 1, 0), ("selective", 2, 0)],
)
def test_selective_never_attends_again(mode: str, every: int, again: int, text: bool) -> None:
    _, counts = run(model(mode, every, text=text), packed=False, passes=1)
    assert counts == (DEPTH * (1 + text), again * (1 + text))


def test_a_pack_keeps_every_call_of_every_attention() -> None:
    _, (forward, backward) = run(model("selective"), packed=True)
    assert forward > 2 * 2 * DEPTH, "blocks of different sizes need calls of their own"
    assert backward == 0


def test_selective_may_be_asked_twice_for_gradients() -> None:
    grads = []
    for mode in ("none", "selective"):
        denoiser = model(mode, text=False)
        loss = denoiser(torch.ones(1, 2, 1, 2, 2), torch.ones(1)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([p.grad for p in denoiser.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_is_kept_does_not_keep_its_graph_alive() -> None:
    x = torch.ones(1, 2, 1, 2, 2, requires_grad=True)
    seen = []
    denoiser = model("selective", text=False)
    denoiser.blocks[1].register_forward_pre_hook(lambda block, inputs: seen.append(weakref.ref(inputs[0])))
    denoiser(x, torch.ones(1))  # a forward pass whose backward never comes
    assert [tokens() for tokens in seen] == [None]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_state_dict_keeps_its_names(mode: str) -> None:
    assert list(model(mode).state_dict()) == list(model("none").state_dict())


def test_no_gradients_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "checkpoint", None)
    with torch.no_grad():
        model("selective", text=False)(torch.ones(1, 2, 1, 2, 2), torch.ones(1))


def test_number_of_blocks_is_told() -> None:
    numbers = [checkpoint_blocks(model("none"), config("full", every)) for every in (1, 2, 3, 4)]
    assert numbers == [3, 2, 1, 1]


class Products(nn.Module):
    """Attention as torch's fallback computes it: products and a softmax, no single operation."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        for block in self.blocks:
            block.forward = lambda x, linear=block.forward: F.softmax(linear(x) @ x.transpose(1, 2), -1) @ x

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_attention_that_cannot_be_kept_is_recomputed_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    activation._warn_nothing_kept.cache_clear()
    grads = []
    for mode in ("none", "selective"):
        torch.manual_seed(2)
        products = Products()
        checkpoint_blocks(products, config(mode, 1))
        with caplog.at_level(logging.WARNING, logger="ltd.parallel.activation"):
            products(torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3))).square().sum().backward()
        grads.append([p.grad for p in products.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert len(caplog.messages) == 1 and "flash-attn 4" in caplog.messages[0]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_model_without_blocks_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="parallel.activation_checkpointing: Linear has no blocks; set it to none"):
        checkpoint_blocks(nn.Linear(2, 2), config(mode, 1))
    assert checkpoint_blocks(nn.Linear(2, 2), config("none", 1)) == 0
