"""Losses of an adversarial pair, and the weight that balances one loss against another by their gradients.

Losses are one fp32 number per sample. The balance is measured at a *tensor* (the reconstruction, or the latents), never
at a weight: where an engine shards the weights no process holds a whole one, and every process must still find the same
number. Knows nothing of networks, optimizers or processes; averaging over processes arrives as a callable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ltd.nn.seams import reduce_mean as keep_local

#: Added to the gradient that is divided by, so that a loss without gradient has a finite weight.
EPSILON = 1e-4


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute the discriminator's loss: push logits of real samples above 1 and those of fakes below -1.

    Args:
        real_logits: ``(b, ...)``, any float dtype.
        fake_logits: ``(b, ...)``, of reconstructions that carry no gradient to the generator.

    Returns:
        ``(b,)`` fp32: half the sum of both means over a sample's logits; 1 where all logits are 0.

    Raises:
        ValueError: If the numbers of samples differ.

    Reference: Lim and Ye (2017), arXiv 1705.02894, Eq. 2 (hinge); Esser et al. (2020), arXiv 2012.09841 (its half).
    """
    if real_logits.shape[0] != fake_logits.shape[0]:
        raise ValueError(f"fake_logits: got {fake_logits.shape[0]} samples, needed {real_logits.shape[0]} as of real")
    real = torch.relu(1.0 - real_logits.float()).flatten(1).mean(1)
    fake = torch.relu(1.0 + fake_logits.float()).flatten(1).mean(1)
    return 0.5 * (real + fake)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Compute the generator's loss: raise the discriminator's logits of its samples.

    Args:
        fake_logits: ``(b, ...)``, any float dtype.

    Returns:
        ``(b,)`` fp32: minus the mean of a sample's logits.
    """
    return -fake_logits.float().flatten(1).mean(1)


def gradient_penalty(logits: Tensor, moved_logits: Tensor, *, std: float) -> Tensor:
    """Estimate the squared gradient of the mean logit with respect to the pixels, from two forward passes.

    Needs no gradient of a gradient, so it works under sharded weights and recomputed activations.

    Args:
        logits: ``(b, ...)`` of samples.
        moved_logits: ``(b, ...)`` of the same samples plus ``std`` times standard normal noise.
        std: Spread of that noise, in [-1, 1] units; small, for example 0.01.

    Returns:
        ``(b,)`` fp32, unbiased over noise as ``std`` goes to 0. R1 of real samples, R2 of fakes; to be weighted by
        half the customary gamma.

    Raises:
        ValueError: If the spread is not positive.

    Reference: Mescheder et al. (2018), arXiv 1801.04406 (R1); Lin et al. (2025), arXiv 2501.08316 (by differences).
    """
    if std <= 0:
        raise ValueError(f"std: got {std}, needed more than 0")
    change = (moved_logits.float() - logits.float()).flatten(1).mean(1)
    return (change / std).square()


def gradient_at(loss: Tensor, tensor: Tensor, joint: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Differentiate a loss with respect to a tensor of its graph.

    Only the part of the graph between the two runs: no parameter's ``.grad`` is touched and no hook that reduces
    gradients fires. The graph is kept for the training step's own backward pass.

    Args:
        loss: A scalar.
        tensor: Part of the loss's graph, for example the reconstruction.
        joint: Two tensors of one value between the tensor and the loss, the earlier and the later: what the graph has
            between them (an engine's hooks) is passed over.

    Returns:
        Gradient of the tensor's shape and dtype, detached.

    Raises:
        ValueError: If the loss does not depend on the tensor.
    """
    gradient: Tensor | None = None
    outputs, given = loss, None
    if joint is not None and loss.requires_grad:
        outputs, given = joint[0], gradient_at(loss, joint[1])
    if outputs.requires_grad and tensor.requires_grad:
        (gradient,) = torch.autograd.grad(outputs, tensor, given, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"the loss does not depend on the tensor of shape {tuple(tensor.shape)} at which its gradient is asked "
            "for: it was detached, or computed without gradients, on the way"
        )
    return gradient.detach()


def adaptive_weight(reference_norm: Tensor, other_norm: Tensor, *, limit: float = 1e4) -> Tensor:
    """Compute the weight that gives another loss as strong a gradient as the reference loss has.

    Args:
        reference_norm: Scalar, norm of the reference loss's gradient.
        other_norm: Scalar, norm of the other loss's gradient at the same place.
        limit: Largest weight.

    Returns:
        Scalar within [0, limit], detached.

    Reference: Esser et al. (2020), arXiv 2012.09841, Eq. 7.
    """
    return (reference_norm / (other_norm + EPSILON)).clamp(0.0, limit).detach()


def balance(
    reference_loss: Tensor,
    other_loss: Tensor,
    at: Tensor,
    reduce_mean: Callable[[Tensor], Tensor] = keep_local,
    limit: float = 1e4,
    joint: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Measure how much another loss has to be weighted so that its gradient equals the reference loss's.

    Row i of ``at`` is touched by sample i's losses only, so gradients of different processes are parts of one long
    vector: the *squares* of their norms add up to that of the global batch, while norms themselves do not (and one
    process's own ratio belongs to its own samples). Sums of squares and the number of samples are therefore averaged
    over processes, in one call; all then have the weight that one process with all samples would have.

    Gradients are measured per pixel value (times the values per sample, root mean square), so that the
    mean absolute error has 1 at any resolution and ``EPSILON`` is small beside it.

    Args:
        reference_loss: ``(b,)``, each a mean over its own sample.
        other_loss: ``(b,)``, likewise.
        at: ``(b, ...)`` tensor that both losses depend on, for example the reconstruction or the latents.
        reduce_mean: Mean over processes of a tensor; every process calls it equally often.
        limit: Largest weight.
        joint: Where the reference loss's graph is passed over on the way to ``at``, see ``gradient_at``.

    Returns:
        fp32 scalar within [0, limit], without gradient, on the device of ``at``; the same on every process.

    Raises:
        ValueError: If a loss is not one number per sample, or does not depend on ``at``.

    Reference: Esser et al. (2020), arXiv 2012.09841, Eq. 7, with the reconstruction in place of the last layer.
    """
    sums = []
    for name, loss, jump in (("reference_loss", reference_loss, joint), ("other_loss", other_loss, None)):
        if loss.shape != at.shape[:1]:
            raise ValueError(f"{name}: got shape {tuple(loss.shape)}, needed one number per sample, ({at.shape[0]},)")
        gradient = gradient_at(loss.sum(), at, jump).float() * at[0].numel()
        sums.append(gradient.flatten(1).square().mean(1).sum())
    reference, other, count = reduce_mean(torch.stack([*sums, sums[0].new_tensor(float(at.shape[0]))])).unbind()
    return adaptive_weight((reference / count).sqrt(), (other / count).sqrt(), limit=limit)
