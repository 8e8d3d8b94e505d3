"""The held-out loss of a denoiser: at fixed time quantiles, by size, by kind and by frame task."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltd.denoisers import TASKS, Conditioning, DitConfig, Frames, Task, draw_masks, told
from ltd.diffusion import Denoiser, FlowMatching
from ltd.parallel import sequence
from ltd.parallel.layout import Layout
from ltd.rng import DrawRandom, derive_seed
from ltd.training.accounting import bucket_of
from ltd.training.latent_inputs import LatentInputs
from ltd.training.run import heldout_batches

if TYPE_CHECKING:
    from ltd.training.denoiser import DenoiserRun

#: Equally likely parts of the training distribution of times, each stood for by its middle.
NUM_QUANTILES = 4


@torch.no_grad()
def heldout_losses(
    run: DenoiserRun, layout: Layout, inputs: LatentInputs, objective: FlowMatching, denoiser: Denoiser
) -> dict[str, float]:
    """Evaluate the loss on every held-out sample, with its caption and nothing else given; called by all processes.

    Args:
        run: The run.
        layout: Its processes.
        inputs: Makes latents and embeddings.
        objective: The loss.
        denoiser: What is evaluated.

    Returns:
        By name in ``metrics.jsonl``: means over samples and quantiles, of all samples, by kind and by size; of each
        quantile (``_q1`` nearest to the data), of all samples and by size; and of each frame task that is trained, at
        the middle quantile, over the samples that are long enough for it.
    """
    seed = derive_seed(run.seed, "heldout")
    names = [name for name in TASKS if getattr(run.frame_tasks, name, 0)]
    tasks = torch.zeros(len(names), 2, dtype=torch.float64, device=layout.device)
    # By size: for each quantile, the sum of losses and of weights. All processes get the same sizes in the same order.
    sizes: dict[str, Tensor] = {}
    images: dict[str, bool] = {}
    for batch in heldout_batches(run, layout):
        size = bucket_of(batch)
        sums = sizes.setdefault(size, tasks.new_zeros(NUM_QUANTILES, 2))
        images[size] = batch.kinds[0] == "image"
        prepared = inputs.prepare(batch.to(layout.device), DrawRandom(seed, batch.draws))
        for tensors in sequence.exchange(prepared, layout):
            random = DrawRandom(seed, tensors["draws"].tolist())
            cond = inputs.conditioning(tensors)
            latents, weight = tensors["latents"], tensors["weight"].double()
            channels, cells = latents.shape[1], latents[0, 0].numel()
            times = objective.evaluation_times(NUM_QUANTILES, cells, channels).tolist()
            for quantile, time in enumerate(times):
                losses = objective.loss_at(denoiser, latents, cond, random, time).double()
                sums[quantile] += torch.stack([(losses * weight).sum(), weight.sum()])
            for row, name in enumerate(names):
                tasks[row] += task_sums(name, run.model, objective, denoiser, (latents, weight, cond, random))
    total = layout.sum_(torch.cat([tasks, *sizes.values()]))
    by_size = dict(zip(sizes, total[len(names) :].split(NUM_QUANTILES), strict=True))
    result = _quantiles("eval/denoise", sum(by_size.values(), tasks.new_zeros(NUM_QUANTILES, 2)))
    for kind, wanted in (("video", False), ("image", True)):
        of_kind = [sums for size, sums in by_size.items() if images[size] == wanted]
        result |= _mean(f"eval/denoise_{kind}", sum(of_kind, tasks.new_zeros(NUM_QUANTILES, 2)).sum(dim=0))
    for size, sums in by_size.items():
        result |= _quantiles(f"eval/bucket/{size}/denoise", sums)
    for name, sums in zip(names, total, strict=False):
        result |= _mean(f"eval/denoise_{name}", sums)
    return result


def with_given(cond: Conditioning, latents: Tensor, mask: Tensor, model: DitConfig) -> Conditioning:
    """Tell a denoiser the latents ``(b, c, t, h, w)`` where the mask ``(b, 1, t, h, w)`` is True."""
    return dataclasses.replace(cond, frames=told(Frames(latents, mask), model.frames, model.frame_mask_channels))


def task_sums(
    task: Task,
    model: DitConfig,
    objective: FlowMatching,
    denoiser: Denoiser,
    batch: tuple[Tensor, Tensor, Conditioning, DrawRandom],
) -> Tensor:
    """Sum a frame task's loss over a batch.

    Args:
        task: What is given of the samples.
        model: The denoiser's.
        objective: The loss.
        denoiser: What is evaluated.
        batch: Latents ``(b, c, t, h, w)``, weights ``(b,)``, what the denoiser is told, random numbers.

    Returns:
        Sum of the losses and of the weights, ``(2,)``; zeros if the samples are too short for the task.
    """
    latents, weight, cond, random = batch
    mask = draw_masks(task, (latents.shape[2], latents.shape[3], latents.shape[4]), model.patch, random)
    if mask is None:
        return weight.new_zeros(2)
    mask = mask.to(latents.device)
    (time,) = objective.evaluation_times(1, latents[0, 0].numel(), latents.shape[1]).tolist()
    cond = with_given(cond, latents, mask, model)
    losses = objective.loss_at(denoiser, latents, cond, random, time, cell_weight=~mask[:, 0])
    return torch.stack([(losses.double() * weight).sum(), weight.sum()])


def _mean(name: str, sums: Tensor) -> dict[str, float]:
    """Divide a sum of losses by its sum of weights ``(2,)``; nothing of no sample."""
    value, count = sums.tolist()
    return {name: value / count} if count else {}


def _quantiles(name: str, sums: Tensor) -> dict[str, float]:
    """Give the mean over quantiles and of each, of sums ``(quantiles, 2)``."""
    result = _mean(name, sums.sum(dim=0))
    for number, quantile in enumerate(sums, start=1):
        result |= _mean(f"{name}_q{number}", quantile)
    return result
