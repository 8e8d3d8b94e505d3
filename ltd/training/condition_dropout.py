"""Which conditions of a training sample are dropped, for guidance: a function of the seed and the draw alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ltd.denoisers import NULL_LABEL, Conditioning
from ltd.rng import DrawRandom

if TYPE_CHECKING:
    from ltd.training.denoiser import DenoiserRun


class ConditionDropout:
    """Drop captions (with labels), labels alone, single text encoders, and numbers, each by a stream of its own.

    Args:
        run: Its rates.
        null: What stands for a dropped caption; without text, for a model that takes none.
        parts: Of the joined text of several encoders, which tokens and channels are each one's.
    """

    def __init__(self, run: DenoiserRun, null: Conditioning, parts: Sequence[tuple[slice, slice]] = ()) -> None:
        self.run, self.null, self.parts = run, null, tuple(parts)

    def __call__(self, cond: Conditioning, random: DrawRandom) -> Conditioning:
        """Drop some conditions of a batch.

        Args:
            cond: What the samples have.
            random: Random numbers of the batch; streams ``"condition"``, ``"label"``, ``"scalars"`` and ``"text0"`` on.

        Returns:
            What the denoiser is told. A dropped caption takes the label with it, so that the two are also absent
            together, which is what guidance leads away from.
        """
        run = self.run
        if cond.text is not None:
            cond = self._single_texts(cond, random)
            cond = cond.drop(run.caption_dropout, self.null, random)
        if cond.label is not None and run.label_dropout:
            gone = (random.uniform((), "label") < run.label_dropout).to(cond.label.device)
            cond = dataclasses.replace(cond, label=torch.where(gone, NULL_LABEL, cond.label))
        if cond.scalars is not None and run.scalar_dropout:
            gone = (random.uniform((), "scalars") < run.scalar_dropout).to(cond.scalars.device)
            cond = dataclasses.replace(cond, scalars=torch.where(gone[:, None], math.nan, cond.scalars))
        return cond

    def dropped(self, random: DrawRandom) -> Sequence[bool]:
        """Say which samples lost their caption; without text, their label; () where none ever does."""
        run = self.run
        stream, rate = ("label", run.label_dropout) if run.text is None else ("condition", run.caption_dropout)
        if run.text is None and run.model.num_classes is None:
            return ()
        return (random.uniform((), stream) < rate).tolist() if rate else ()

    def _single_texts(self, cond: Conditioning, random: DrawRandom) -> Conditioning:
        """Put the null caption's embeddings of single encoders in the place of theirs."""
        text, mask, null = cond.text, cond.text_mask, self.null
        assert text is not None and mask is not None and null.text is not None and null.text_mask is not None
        rates = self.run.text_dropout if self.parts else ()
        if not any(rates):
            return cond
        text, mask = text.clone(), mask.clone()
        for number, (tokens, channels) in enumerate(self.parts):
            if not rates[number]:
                continue
            gone = (random.uniform((), f"text{number}") < rates[number]).to(text.device)
            rows = torch.where(gone[:, None, None], null.text[:, tokens, channels].to(text), text[:, tokens, channels])
            text[:, tokens, channels] = rows
            if tokens != slice(None):  # along channels all encoders share the mask
                mask[:, tokens] = torch.where(gone[:, None], null.text_mask[:, tokens], mask[:, tokens])
        return dataclasses.replace(cond, text=text, text_mask=mask)
