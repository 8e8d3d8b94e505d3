"""The single-process engine against plain torch, and its checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ltd.config import ConfigError
from ltd.parallel import (
    DiscardedStepError,
    Ema,
    EmaConfig,
    Layout,
    OptimizerSettings,
    ParallelConfig,
    activation,
    build_engine,
    checkpoint,
)
from ltd.parallel.interface import Engine, decay_groups, flat
from tests.parallel.setup import save

SETTINGS = OptimizerSettings(weight_decay=0.1, grad_clip=0.5)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(x.to(self.out.weight.dtype))))


def make(precision: str = "fp32", settings: OptimizerSettings = SETTINGS, module: nn.Module | None = None) -> Engine:
    config = ParallelConfig(engine="torch", precision=precision)  # type: ignore[arg-type]
    layout = Layout(config, global_rank=0, world_size=1, local_rank=0)
    layout.device = torch.device("cpu")
    return build_engine(module or Small(), config=config, optim=settings, layout=layout, num_backwards=2)


def loss(model: nn.Module | Engine, step: int) -> Tensor:
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(step))
    return model(x).float().square().sum() * 3


def run(engine: Engine, steps: range) -> list[float]:
    norms = []
    for step in steps:
        engine.backward(loss(engine, 2 * step))
        engine.backward(loss(engine, 2 * step + 1))
        norms.append(engine.step(0.01))
    return norms


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_plain_torch(memory_format: torch.memory_format) -> None:
    engine = make(module=Small().to(memory_format=memory_format))
    norms = run(engine, range(5))
    model = Small()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=SETTINGS.betas, foreach=False)
    expected = []
    for step in range(5):
        optimizer.zero_grad(set_to_none=False)
        (loss(model, 2 * step) + loss(model, 2 * step + 1)).backward()
        model.unused.grad = torch.zeros(3)
        expected.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    assert norms == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(engine.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert engine.module.conv.weight.is_contiguous(memory_format=memory_format)


def test_gradients_are_the_sum_over_backwards() -> None:
    engine, model = make(), Small()
    engine.backward(loss(engine, 0))
    engine.backward(loss(engine, 1))
    (loss(model, 0) + loss(model, 1)).backward()
    torch.testing.assert_close(engine.gradients()["conv.weight"], model.conv.weight.grad)
    assert not engine.gradients()["unused"].any()


def test_bf16_sums_gradients_and_keeps_masters_in_fp32() -> None:
    engine = make("bf16")
    assert engine.module.conv.weight.dtype == torch.bfloat16 and engine.module.mean.dtype == torch.float32
    for number in range(2):
        engine.backward(loss(engine, number))
    single = []
    for number in range(2):
        again = make("bf16")
        again.backward(loss(again, number))
        single.append(again.gradients()["conv.weight"])
    # a sum in bf16 would round these
    assert torch.equal(engine.gradients()["conv.weight"], single[0] + single[1])
    engine.step(1e-6)
    master = next(s for s in engine.master_shards() if s.name == "conv.weight")
    assert master.data.dtype == torch.float32
    assert not torch.equal(master.data, master.data.bfloat16().float()), "a step below bf16's resolution is kept"
    assert torch.equal(engine.module.conv.weight, master.data.bfloat16())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_non_finite_gradient_changes_nothing(precision: str) -> None:
    engine = make(precision)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.backward(loss(engine, 0) * float("inf"))
    with pytest.raises(DiscardedStepError):
        engine.step(0.01)
    assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
    assert engine.applied_steps == 0
    assert run(engine, range(2)) == run(make(precision), range(2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_resume_is_bit_identical(tmp_path: Path, precision: str, memory_format: torch.memory_format) -> None:
    layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)
    engine = make(precision, module=Small().to(memory_format=memory_format))
    ema = Ema(engine, EmaConfig(decays=(0.9,)))
    run(engine, range(3))
    ema.update(0)
    save(tmp_path, 3, engine, ema, {"tracker": "abc"}, layout)
    norms = run(engine, range(3, 5))
    # into the other memory format: slices are in logical order
    again = make(precision)
    ema_again = Ema(again, EmaConfig(decays=(0.9,)))
    path = checkpoint.resolve("auto", tmp_path)
    assert path is not None
    assert checkpoint.load(path, again, ema_again)["tracker"] == "abc"
    for a, b in zip(ema.slices(), ema_again.slices(), strict=True):
        assert torch.equal(a.data, b.data)
    if memory_format is torch.contiguous_format:
        assert run(again, range(3, 5)) == norms
        for a, b in zip(engine.master_shards(), again.master_shards(), strict=True):
            assert torch.equal(a.data, b.data) and all(torch.equal(a.state[key], b.state[key]) for key in a.state)
    else:
        assert run(again, range(3, 5)) == pytest.approx(norms, rel=1e-2 if precision == "bf16" else 1e-5)


def test_other_optimizer_in_the_checkpoint_is_refused(tmp_path: Path) -> None:
    layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)
    path = save(tmp_path, 0, make(settings=OptimizerSettings(kind="sgd")), None, {}, layout)
    with pytest.raises(ConfigError, match=r"optim\.kind"):
        checkpoint.load(path, make(), None)


def test_resume_modes(tmp_path: Path) -> None:
    assert checkpoint.resolve("never", tmp_path) is None
    assert checkpoint.resolve("auto", tmp_path) is None
    with pytest.raises(ConfigError, match="resume"):
        checkpoint.resolve(str(tmp_path), tmp_path)
    layout = Layout(ParallelConfig(engine="torch"), global_rank=0, world_size=1, local_rank=0)
    path = save(tmp_path, 7, make(), None, {}, layout)
    assert checkpoint.resolve("auto", tmp_path) == checkpoint.resolve(str(path), "elsewhere") == path
    assert checkpoint.resolve(str(tmp_path), "elsewhere") == path


def test_ema_applied_comes_back() -> None:
    engine = make("bf16")
    ema = Ema(engine, EmaConfig(decays=(0.9,), warmup=False))
    start = engine.module.conv.weight.clone()
    run(engine, range(3))
    after = engine.module.conv.weight.clone()
    with ema.applied():
        assert torch.equal(engine.module.conv.weight, start)
    assert torch.equal(engine.module.conv.weight, after) and not torch.equal(after, start)


def test_decay_groups() -> None:
    groups = decay_groups(Small())
    assert groups == {"decay": ["conv.weight", "out.weight"], "no_decay": ["unused", "conv.bias", "out.bias"]}
    model = Small()
    model.decay_groups = lambda: {"decay": ["conv.weight"], "no_decay": ["conv.bias"]}
    with pytest.raises(ConfigError, match=r"'out\.bias'"):
        decay_groups(model)


def test_flat_is_in_logical_order() -> None:
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert torch.equal(flat(x.to(memory_format=torch.channels_last)), x.flatten())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def test_every_second_block_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ParallelConfig(engine="torch", activation_checkpointing="full", activation_checkpointing_every=2)
    plain, model = Blocks(), Blocks()
    calls = [0] * 5
    for index, block in enumerate(model.blocks):

        def counted(x: Tensor, i: int = index, forward: object = block.forward) -> Tensor:
            calls[i] += 1
            return forward(x)  # type: ignore[operator]

        monkeypatch.setattr(block, "forward", counted)
    assert activation.checkpoint_blocks(model, config) == 3
    x = torch.randn(3, 4)
    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    assert calls == [2, 1, 2, 1, 2]
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert list(model.state_dict()) == list(plain.state_dict())
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        activation.checkpoint_blocks(nn.Linear(2, 2), config)


def test_torch_engine_starts_nothing_heavy() -> None:
    code = (
        "import sys, torch\n"
        "from ltd.parallel import Layout, ParallelConfig\n"
        "layout = Layout.from_environment(ParallelConfig(engine='torch'))\n"
        "assert (layout.global_rank, layout.world_size, layout.is_main) == (0, 1, True)\n"
        "assert not torch.distributed.is_initialized() and 'deepspeed' not in sys.modules\n"
        "assert layout.any(True) and layout.gather_objects(3) == [3]; layout.barrier(); layout.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_half_set_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        Layout.from_environment(ParallelConfig(engine="torch"))


@pytest.mark.slow
def test_deepspeed_without_a_launcher() -> None:
    code = (
        "import torch\n"
        "from ltd.parallel import *\n"
        "config = ParallelConfig(zero=2, precision='fp32')\n"
        "layout = Layout.from_environment(config)\n"
        "module = torch.nn.Linear(3, 2)\n"
        "optim = OptimizerSettings(kind='sgd', grad_clip=None)\n"
        "engine = build_engine(module, config=config, optim=optim, layout=layout, num_backwards=1)\n"
        "before = module.bias.detach().clone()\n"
        "engine.backward(engine(torch.ones(1, 3)).sum())\n"
        "assert abs(engine.step(0.5) - 8 ** 0.5) < 1e-5\n"
        "assert torch.allclose(module.bias, before - 0.5)\n"
        "layout.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
