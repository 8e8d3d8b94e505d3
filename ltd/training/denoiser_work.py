"""What a forward and backward pass of a denoiser amounts to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ltd.denoisers import Conditioning, DitConfig, DitFlops, DitInputs, count_flops
from ltd.diffusion import FlowMatching
from ltd.nn.patch import token_grid
from ltd.parallel.config import ParallelConfig
from ltd.rng import DrawRandom
from ltd.shapes import VideoShape
from ltd.training.condition_dropout import ConditionDropout
from ltd.training.work import Work, count_real


class DenoiserWork:
    """Count passes of one denoiser.

    Args:
        config: The denoiser's.
        parallel: Which blocks are recomputed.
        objective: Draws the times.
        dropout: Tells which conditions are dropped.
    """

    def __init__(
        self, config: DitConfig, parallel: ParallelConfig, objective: FlowMatching, dropout: ConditionDropout
    ) -> None:
        self.config, self.objective, self.dropout = config, objective, dropout
        recomputes = parallel.activation_checkpointing != "none"
        self._every = parallel.activation_checkpointing_every if recomputes else 0
        self._keeps_attention = parallel.activation_checkpointing == "selective"
        self._known: dict[DitInputs, DitFlops] = {}

    def count(self, latents: Tensor | Sequence[Tensor], cond: Conditioning, weight: Tensor, random: DrawRandom) -> Work:
        """Count a pass; waits for no device.

        Args:
            latents: ``(b, c, t, h, w)``, or a pack of ``(c, t, h, w)``.
            cond: Conditions, after some were dropped.
            weight: Weight of each sample ``(b,)``.
            random: Random numbers of the samples.

        Returns:
            What it amounts to.
        """
        flops = self._flops(DitInputs.of(latents, cond))
        every = flops.all
        tokens = [self._tokens(x) for x in latents]
        real = count_real(weight, tokens)
        if cond.text_mask is not None:
            real = real + count_real(weight, cond.text_mask.sum(1))
        return Work(
            tokens=flops.patches,
            computed=flops.patches + flops.text,
            real=real,
            model_flops=every.training,
            repeated_flops=every.scores_again + flops.recomputed(self._every, keep_attention=self._keeps_attention),
            quantiles=self.objective.quantiles(random).tolist(),
            dropped=self.dropout.dropped(random),
        )

    def _tokens(self, latents: Tensor) -> int:
        t, h, w = token_grid(VideoShape(*latents.shape[-3:]), self.config.patch)
        return t * h * w

    def _flops(self, inputs: DitInputs) -> DitFlops:
        if isinstance(inputs.text, Tensor):  # of a pack, whose sizes hardly come twice
            return count_flops(self.config, inputs)
        if inputs not in self._known:
            self._known[inputs] = count_flops(self.config, inputs)
        return self._known[inputs]
