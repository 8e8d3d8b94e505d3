"""Models of diffusers and ours with equal weights, training steps of both, and the check that they agree."""

from __future__ import annotations

import copy
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ltd.denoisers import Conditioning, Dit, Parametrized
from ltd.interop import import_denoiser
from ltd.parallel import Layout, OptimizerSettings, ParallelConfig, build_engine
from ltd.parallel.compilation import compile_blocks
from ltd.parallel.ema import Ema, EmaConfig
from tools.benches.table import Row, System

Precision = Literal["fp32", "bf16"]
#: Tokens that Wan reads of every prompt: diffusers pads with zeros to as many.
TEXT_TOKENS = 512
_TEXT_DIM = 256


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the models and their inputs are."""

    heads: int = 6
    head_dim: int = 64
    depth: int = 6
    #: Images of a step, and the side of their latents.
    images: int = 8
    image_side: int = 32
    #: Latents (t, h, w) of a clip; two clips a step.
    clip: tuple[int, int, int] = (5, 16, 24)
    #: Latents of a step of mixed sizes.
    mixed: tuple[tuple[int, int, int], ...] = field(
        default=((1, 16, 16),) * 3 + ((1, 24, 16),) * 2 + ((3, 16, 16),) * 5 + ((5, 16, 24), (1, 32, 24))
    )
    #: Real tokens of prompts.
    prompt: int = 120
    #: Latents (t, h, w) of a sampled clip, and steps.
    sampled: tuple[int, int, int] = (3, 16, 24)
    steps: int = 50
    #: Whether compiled systems are timed too.
    compiled: bool = True

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    def dit(self) -> dict[str, Any]:
        """Configure DiTTransformer2DModel."""
        heads = {"num_attention_heads": self.heads, "attention_head_dim": self.head_dim, "num_layers": self.depth}
        return heads | {"out_channels": 8}

    def wan(self) -> dict[str, Any]:
        """Configure WanTransformer3DModel."""
        heads = {"num_attention_heads": self.heads, "attention_head_dim": self.head_dim, "num_layers": self.depth}
        return heads | {"ffn_dim": 4 * self.width, "text_dim": _TEXT_DIM, "freq_dim": 256}


FULL = Size()
TINY = Size(
    heads=2,
    head_dim=32,
    depth=1,
    images=2,
    image_side=8,
    clip=(2, 4, 4),
    mixed=((1, 4, 4), (1, 4, 4), (2, 4, 6)),
    prompt=5,
    sampled=(2, 4, 4),
    steps=3,
    compiled=False,
)


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    """Build a model of diffusers with every weight moved off its start."""
    import diffusers

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = getattr(diffusers, name)(**settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        if name == "DiTTransformer2DModel":  # one embedding, as in the published weights
            blocks: Any = model.transformer_blocks
            for block in blocks:
                block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
                block.norm1.emb.class_embedder.dropout_prob = 0.0  # labels are dropped by the caller in ours
    return model.train()


def imported(theirs: nn.Module) -> Dit:
    """Make our model of the same weights."""
    with tempfile.TemporaryDirectory(prefix="ltd-bench-") as folder:
        theirs.save_pretrained(folder)  # type: ignore[operator]
        found = import_denoiser(Path(folder))
    network = found.network if isinstance(found, Parametrized) else found
    return network.requires_grad_(True).train()


def prompts(rows: int, longest: int, generator: torch.Generator) -> tuple[Tensor, Conditioning]:
    """Make the embeddings of prompts from half the longest to the longest, as a text encoder gives them.

    Args:
        rows: How many.
        longest: Real tokens of the last.
        generator: Random numbers.

    Returns:
        Padded with zeros to ``TEXT_TOKENS``, as diffusers' pipeline and training scripts do; and for ours.
    """
    lengths = torch.linspace((longest + 1) // 2 if longest < TEXT_TOKENS else longest, longest, rows).round()
    mask = torch.arange(longest) < lengths[:, None]
    text = torch.randn(rows, longest, _TEXT_DIM, generator=generator) * mask[..., None]
    padded = torch.nn.functional.pad(text, (0, 0, 0, TEXT_TOKENS - longest))
    return padded, Conditioning(text=text, text_mask=mask)


def check_equal(name: str, ours: Tensor, theirs: Tensor, limit: float = 1e-5) -> None:
    """Refuse to time what differs.

    Args:
        name: Of the work.
        ours: Result of ours.
        theirs: Result of theirs.
        limit: Largest difference over the standard deviation of theirs (or over its size, for a single number).

    Raises:
        AssertionError: If they differ by more.
    """
    scale = theirs.std() if theirs.numel() > 1 else theirs.abs()
    difference = float((ours - theirs).abs().max() / scale)
    if not difference <= limit:
        raise AssertionError(f"{name}: ours differs from diffusers by {difference:.2e} of its deviation")


def our_step(model: Dit, loss: Callable[[Any], Tensor], *, compiled: bool, precision: Precision) -> Callable[[], int]:
    """Make a training step of ours."""
    config = ParallelConfig(engine="torch", precision=precision, compile="blocks" if compiled else "none")
    network = copy.deepcopy(model)
    compile_blocks(network, config)
    layout = Layout(config, global_rank=0, world_size=1, local_rank=0)
    optim = OptimizerSettings(betas=(0.9, 0.999))
    engine = build_engine(network, config=config, optim=optim, layout=layout, num_backwards=1)
    ema = Ema(engine, EmaConfig(decays=(0.9999,)))
    steps = [0]

    def run() -> int:
        engine.backward(loss(engine))
        engine.step(1e-4)
        ema.update(steps[0])
        steps[0] += 1
        return 1

    return run


def their_step(
    model: nn.Module, loss: Callable[[Any], Tensor], *, compiled: bool, precision: Precision
) -> Callable[[], int]:
    """Make a training step as diffusers' scripts have it: fp32 weights, and autocast for bf16."""
    from diffusers.training_utils import EMAModel

    network = copy.deepcopy(model)
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    average = EMAModel(network.parameters(), decay=0.9999, foreach=True)

    def run() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = loss(forward)
        found.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.step(network.parameters())
        optimizer.zero_grad()
        return 1

    return run


def step_systems(
    ours: Dit,
    theirs: nn.Module,
    losses: tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]],
    *,
    precision: Precision = "fp32",
    compiled: bool = True,
) -> list[System]:
    """List training steps of both, eager and compiled; the first counts as ours.

    Args:
        ours: Our model.
        theirs: Theirs.
        losses: Of ours and of theirs.
        precision: Of the products.
        compiled: Whether compiled ones are among them.

    Returns:
        Systems.
    """
    kinds = (True, False) if compiled else (False,)
    own = [_named("ltd", kind, our_step(ours, losses[0], compiled=kind, precision=precision)) for kind in kinds]
    peers = [
        _named(version(), kind, their_step(theirs, losses[1], compiled=kind, precision=precision)) for kind in kinds
    ]
    first = System(name=own[0].name, run=own[0].run, ours=True)
    return [first, *own[1:], *peers]


def _named(who: str, compiled: bool, run: Callable[[], int]) -> System:
    return System(name=f"{who}, {'compiled' if compiled else 'eager'}", run=run)


def version() -> str:
    """Name the peer."""
    import diffusers

    return f"diffusers {diffusers.__version__}"


def verdicts(rows: Sequence[Row], targets: Mapping[str, tuple[float, float | None]]) -> list[str]:
    """Say which targets hold, by the medians of the paired wall and CPU ratios to the best peer.

    Args:
        rows: Measured.
        targets: By a part of the work's name: what is asked for, and the least that passes.

    Returns:
        A line per work.
    """
    lines = []
    for work in dict.fromkeys(row.work for row in rows):
        same = [row for row in rows if row.work == work and not row.missing]
        own = next(row for row in same if row.ours)
        key = next(name for name in targets if name in work)
        peers = [row for row in same if "diffusers" in row.system]
        best = [
            min(statistics.median(a / b for a, b in zip(times(row), times(own), strict=True)) for row in peers)
            for times in (_cpu, _wall)
        ]
        reach, least = targets[key]
        passed = min(best) >= (reach if least is None else least)
        wanted = f"{reach:g}" + ("" if least is None else f", {least:g} passes")
        lines.append(
            f"- {work}: the best peer takes {best[0]:.2f} times our CPU and {best[1]:.2f} times our wall time "
            f"(asked {wanted}): {'holds' if passed else 'MISSED'}."
        )
    return lines


def _cpu(row: Row) -> Sequence[float]:
    return row.cpu_s


def _wall(row: Row) -> Sequence[float]:
    return row.wall_s
