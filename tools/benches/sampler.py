"""The sampling loop against diffusers' pipeline: equal weights, noise, times and guidance, latents checked equal first.

Outside the model is the same call with a network that answers at once: in theirs the pipeline's checks, the scheduler's
steps, casts, guidance's arithmetic and the bookkeeping (its progress bar is off), in ours the loop around the network.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltd import denoisers
from ltd.denoisers import Conditioning
from ltd.diffusion import GuidanceConfig, PrepareSteps, SamplerConfig, ShiftConfig, guided, sample
from ltd.parallel import ParallelConfig
from ltd.parallel.compilation import compile_blocks
from tools.benches._diffusers import (
    FULL,
    TEXT_TOKENS,
    TINY,
    Size,
    build,
    check_equal,
    imported,
    prompts,
    verdicts,
    version,
)
from tools.benches.table import Row, System, interleave

KIND = "sampler"
NAME = "sampler"
LAYOUT = "one process"


def _shapes(size: Size) -> str:
    return (
        f"width {size.width}, {size.depth} blocks, {size.heads} heads; one clip of 16 x {size.sampled} latents, "
        f"patches of 1 x 2 x 2, fp32; {size.steps} steps with guidance, prompt of {size.prompt} and negative prompt of "
        f"{(size.prompt + 1) // 2} tokens padded to {TEXT_TOKENS}"
    )


_LARGE = (21, 60, 104)
SHAPES, TINY_SHAPES = f"{_shapes(FULL)}; outside the model also a clip of 16 x {_LARGE}", _shapes(TINY)
#: What is asked for: the peer's time over ours, and the least that passes.
TARGETS: dict[str, tuple[float, float | None]] = {"outside the model": (10.0, None), "sampling": (1.3, None)}
_SCALE, _SHIFT = 5.0, 3.0


def measure(repeats: int, *, tiny: bool = False) -> list[Row]:
    """Check equality, then time whole loops, and loops around a network that answers at once.

    Args:
        repeats: Rounds of each.
        tiny: The smallest sizes, to see that it runs.

    Returns:
        Rows per 1,000 sampled clips.
    """
    size = TINY if tiny else FULL
    theirs = build("WanTransformer3DModel", size.wan()).eval()
    network = imported(theirs).eval()
    loops = _Loops(theirs, size.sampled, size.steps, size.prompt)
    with torch.no_grad():
        check_equal("sampling", loops.ours(network, network.prepare_steps), loops.theirs(theirs), limit=1e-4)
    systems = [
        System(name="ltd, eager", run=_one(lambda: loops.ours(network, network.prepare_steps)), ours=not size.compiled)
    ]
    systems.append(System(name=f"{version()} WanPipeline, eager", run=_one(lambda: loops.theirs(theirs))))
    if size.compiled:
        own, peer = copy.deepcopy(network), copy.deepcopy(theirs)
        compile_blocks(own, ParallelConfig(engine="torch", precision="fp32", compile="blocks"))
        peer.compile()
        run = _one(lambda: loops.ours(own, own.prepare_steps))
        systems.insert(0, System(name="ltd, compiled", run=run, ours=True))
        systems.append(System(name=f"{version()} WanPipeline, compiled", run=_one(lambda: loops.theirs(peer))))
    with torch.no_grad():
        rows = interleave(f"sampling, {size.steps} steps with guidance (Wan)", systems, repeats=repeats)
        for clip in (size.sampled,) if tiny else (size.sampled, _LARGE):
            rows += _outside(theirs, clip, size.steps, repeats)
    return rows


def summary(rows: Sequence[Row]) -> list[str]:
    """Say which targets hold."""
    return verdicts(rows, TARGETS)


def _outside(theirs: nn.Module, clip: tuple[int, int, int], steps: int, repeats: int) -> list[Row]:
    loops, still = _Loops(theirs, clip, steps, 4), _Still(theirs)
    systems = [
        System(name="ltd", run=_one(lambda: loops.ours(lambda x, t, cond: x, None)), ours=True),
        System(name=f"{version()} WanPipeline", run=_one(lambda: loops.theirs(still))),
    ]
    return interleave(f"{steps} steps with guidance, 16 x {clip} latents, outside the model", systems, repeats=repeats)


class _Loops:
    """Both loops on the same noise and prompts."""

    def __init__(self, theirs: nn.Module, clip: tuple[int, int, int], steps: int, prompt: int) -> None:
        generator = torch.Generator().manual_seed(4)
        self.noise, self.clip, self.steps = torch.randn(1, 16, *clip, generator=generator), clip, steps
        self.padded, cond = prompts(2, prompt, generator)
        self.negative, self.cond = (self._cond(cond, row) for row in (0, 1))
        self.config = SamplerConfig(steps=steps, grid="flow_match", shift=ShiftConfig(factor=_SHIFT), state="float32")
        self.pipeline = _pipeline(theirs)

    @staticmethod
    def _cond(both: Conditioning, row: int) -> Conditioning:
        assert both.text is not None and both.text_mask is not None
        length = int(both.text_mask[row].sum())
        return Conditioning(text=both.text[row : row + 1, :length], text_mask=both.text_mask[row : row + 1, :length])

    def ours(self, model: Any, prepare_steps: PrepareSteps | None) -> Tensor:
        guide = GuidanceConfig(scale=_SCALE)
        led = guided(model, self.negative, guide, stack=denoisers.stack, prepare_steps=prepare_steps)
        return sample(led, self.noise, self.cond, self.config)

    def theirs(self, model: Any) -> Tensor:
        self.pipeline.transformer = model
        frames, height, width = self.clip
        found: Tensor = self.pipeline(
            prompt_embeds=self.padded[1:],
            negative_prompt_embeds=self.padded[:1],
            latents=self.noise.clone(),
            height=8 * height,
            width=8 * width,
            num_frames=1 + 4 * (frames - 1),
            num_inference_steps=self.steps,
            guidance_scale=_SCALE,
            output_type="latent",
        ).frames
        return found


class _Still(nn.Module):
    """A model that answers at once: what is left is the loop's own time."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = like.config, torch.float32, torch.device("cpu")
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (hidden_states,)

    @staticmethod
    def cache_context(name: str, **_: Any) -> Any:
        return contextlib.nullcontext(name)


def _pipeline(transformer: nn.Module) -> Any:
    import diffusers

    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=_SHIFT)
    made = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer
    )
    made.set_progress_bar_config(disable=True)
    return made


def _one(run: Callable[[], Any]) -> Callable[[], int]:
    def once() -> int:
        run()
        return 1

    return once
