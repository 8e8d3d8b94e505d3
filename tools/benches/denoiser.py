"""Training steps of denoisers against diffusers, from equal weights, in fp32 and bf16.

Before anything is timed the losses of both must agree in fp32. A training step is forward, loss, backward, clipping,
AdamW and the average of the weights: ours through the plain engine, theirs with torch's AdamW, torch's clipping and
diffusers' EMAModel; in bf16 ours keeps bf16 weights and fp32 masters, theirs runs under autocast, as its scripts do.
Compiled means torch.compile on both sides: of the whole model in theirs, of the blocks in ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltd.denoisers import Conditioning, Dit
from tools.benches._diffusers import (
    FULL,
    TEXT_TOKENS,
    TINY,
    Precision,
    Size,
    build,
    check_equal,
    imported,
    our_step,
    prompts,
    step_systems,
    their_step,
    verdicts,
    version,
)
from tools.benches.table import Row, System, interleave

KIND = "denoiser"
NAME = "denoiser"
LAYOUT = "one process, plain engine, no sharding"


def _shapes(size: Size, longest: int) -> str:
    shortest = (size.prompt + 1) // 2
    return (
        f"width {size.width}, {size.depth} blocks, {size.heads} heads; images: {size.images} of 4 x {size.image_side} "
        f"x {size.image_side} latents, patches of 2; text and video: 2 clips of 16 x {size.clip} latents, patches of "
        f"1 x 2 x 2, prompts of {shortest} and {size.prompt} tokens padded to {TEXT_TOKENS}, or of {longest}; "
        f"mixed sizes: {len(size.mixed)} samples of {', '.join(map(str, dict.fromkeys(size.mixed)))} latents, prompts "
        f"of {shortest} to {size.prompt} tokens"
    )


SHAPES, TINY_SHAPES = _shapes(FULL, TEXT_TOKENS), _shapes(TINY, TINY.prompt)
#: What is asked for: the peer's time over ours, and the least that passes.
TARGETS: dict[str, tuple[float, float | None]] = {
    "image": (2.0, 1.4),
    "video": (2.0, 1.5),
    "mixed sizes": (3.5, None),
}
Losses = tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]


def measure(repeats: int, *, tiny: bool = False) -> list[Row]:
    """Check equality, then time training steps.

    Args:
        repeats: Rounds of each.
        tiny: The smallest sizes, to see that it runs.

    Returns:
        Rows per 1,000 steps.
    """
    size = TINY if tiny else FULL
    theirs_dit, theirs_wan = build("DiTTransformer2DModel", size.dit()), build("WanTransformer3DModel", size.wan())
    dit, wan = imported(theirs_dit), imported(theirs_wan)
    full = TEXT_TOKENS if not tiny else size.prompt
    works: list[tuple[str, nn.Module, Dit, Losses]] = [
        ("image (DiT)", theirs_dit, dit, _image(size)),
        ("text and video (Wan)", theirs_wan, wan, _video(size, size.prompt)),
        (f"text and video (Wan), prompts of {full} tokens", theirs_wan, wan, _video(size, full)),
    ]
    rows: list[Row] = []
    for name, theirs, ours, losses in works:
        with torch.no_grad():
            check_equal(f"{name}: loss", losses[0](ours), losses[1](theirs))
        precisions: tuple[Precision, ...] = ("fp32", "bf16") if "prompts of" not in name else ("fp32",)
        for precision in precisions:
            systems = step_systems(ours, theirs, losses, precision=precision, compiled=size.compiled)
            rows += interleave(f"train step, {name}, {precision}", systems, repeats=repeats)
    return rows + interleave("train step, mixed sizes (Wan), fp32", _mixed(theirs_wan, wan, size), repeats=repeats)


def padding(size: Size = FULL) -> float:
    """Compute how many tokens padding to the largest size makes of one."""
    counts = [_tokens(shape) for shape in size.mixed]
    return len(counts) * max(counts) / sum(counts)


def summary(rows: Sequence[Row]) -> list[str]:
    """Say which targets hold."""
    lines = [f"- Mixed sizes: padding to the largest makes {padding():.2f} tokens of one."]
    return lines + verdicts(rows, TARGETS)


def _tokens(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2] // 4


def _image(size: Size) -> Losses:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, size.images, 4, size.image_side, size.image_side, generator=generator).unbind(0)
    steps, label = torch.arange(size.images) * 100 + 7, torch.arange(size.images) * 9

    def their_loss(model: Any) -> Tensor:
        return F.mse_loss(model(x, steps, label, return_dict=False)[0][:, :4].float(), noise)

    def our_loss(model: Any) -> Tensor:
        return F.mse_loss(model(x[:, :, None], steps / 1000, Conditioning(label=label))[:, :, 0], noise)

    return our_loss, their_loss


def _video(size: Size, prompt: int) -> Losses:
    generator = torch.Generator().manual_seed(2)
    x, noise = torch.randn(2, 2, 16, *size.clip, generator=generator).unbind(0)
    t, (text, cond) = torch.tensor([0.3, 0.8]), prompts(2, prompt, generator)

    def their_loss(model: Any) -> Tensor:
        return F.mse_loss(model(x, 1000 * t, text, return_dict=False)[0].float(), noise)

    def our_loss(model: Any) -> Tensor:
        return F.mse_loss(model(x, t, cond), noise)

    return our_loss, their_loss


def _mixed(theirs: nn.Module, ours: Dit, size: Size) -> list[System]:
    """Packed in ours; in theirs every sample is padded to the largest clip, and the loss is masked.

    Wan's class takes no mask of tokens: what is padded is computed, and attended to, as in a model that masks it. The
    losses therefore differ; what is equal is checked for each size on its own.
    """
    generator = torch.Generator().manual_seed(3)
    samples = [torch.randn(2, 16, *shape, generator=generator) for shape in size.mixed]
    t, (text, cond) = torch.rand(len(samples), generator=generator), prompts(len(samples), size.prompt, generator)
    largest = max(size.mixed, key=_tokens)
    x, noise, mask = (torch.zeros(len(samples), c, *largest) for c in (16, 16, 1))
    for row, sample in enumerate(samples):
        flat = sample.flatten(2)
        x[row].flatten(1)[:, : flat.shape[2]] = flat[0]
        noise[row].flatten(1)[:, : flat.shape[2]] = flat[1]
        mask[row].flatten(1)[:, : flat.shape[2]] = 1

    def their_loss(model: Any) -> Tensor:
        error = (model(x, 1000 * t, text, return_dict=False)[0] - noise).square() * mask
        return (error.flatten(1).sum(1) / mask.flatten(1).sum(1) / 16).mean()

    def our_loss(model: Any) -> Tensor:
        found = model([s[0] for s in samples], t, cond)
        return torch.stack([F.mse_loss(v, s[1]) for v, s in zip(found, samples, strict=True)]).mean()

    with torch.no_grad():
        packed = ours([s[0] for s in samples], t, cond)
        for row, own in enumerate(packed):
            one = theirs(samples[row][:1], 1000 * t[row : row + 1], text[row : row + 1], return_dict=False)[0][0]
            check_equal("mixed sizes", own, one)
    peers = [("eager", False), ("compiled", True)] if size.compiled else [("eager", False)]
    return [
        System(name="ltd, packed", run=our_step(ours, our_loss, compiled=False, precision="fp32"), ours=True),
        *(
            System(
                name=f"{version()}, padded, {name}",
                run=their_step(theirs, their_loss, compiled=compiled, precision="fp32"),
            )
            for name, compiled in peers
        ),
    ]
