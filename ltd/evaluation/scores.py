"""Scores that need no real data: Inception score of class probabilities, CLIP score of images and their captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.frechet import check_features
from ltd.rng import generator


@dataclass(frozen=True)
class InceptionResult:
    """An Inception score and what it was computed from."""

    value: float  #: Mean over the splits, 1 to the number of classes.
    std: float  #: Deviation over the splits (of the population).
    num_samples: int
    num_splits: int


def inception_score(logits: FeatureBank, *, num_splits: int = 10, seed: int | None = 0) -> InceptionResult:
    """Compute the exponential of the mean divergence of each sample's class probabilities from their mean.

    A split of ``n`` samples scores at most ``n``: with few samples per split the score is biased downwards.

    Reference: Salimans et al. (2016), arXiv 1606.03498, Sec. 4; Barratt and Sharma (2018), arXiv 1801.01973.

    Args:
        logits: Logits (or log probabilities) of samples.
        num_splits: Splits, over which mean and deviation are taken.
        seed: Seed of the order that is split; None splits in the order of the keys, which samples sorted by class bias.

    Returns:
        The score.

    Raises:
        ValueError: If there are fewer samples than splits.
    """
    n = logits.num_samples
    if num_splits < 1 or n < num_splits:
        raise ValueError(
            f"Inception score: got {n} samples for {num_splits} splits, needed 1 in each or more; "
            "few samples per split bias it downwards (n samples score at most n)"
        )
    log_p = logits.features.log_softmax(dim=1)  # (n, classes)
    if seed is not None:
        log_p = log_p[torch.randperm(n, generator=generator(seed, "inception score"))]
    values = []
    for split in range(num_splits):
        part = log_p[split * n // num_splits : (split + 1) * n // num_splits]
        log_mean = part.logsumexp(dim=0) - torch.tensor(len(part), dtype=torch.float64).log()
        p = part.exp()
        terms = torch.where(p > 0, p * (part - log_mean), p)  # 0 log 0 = 0
        values.append(terms.sum(dim=1).mean().exp())
    scores = torch.stack(values)
    return InceptionResult(float(scores.mean()), float(scores.std(correction=0)), n, num_splits)


class ClipScore:
    """CLIP score: 100 times the mean cosine of images and their captions, a pair below zero counting as zero.

    Reference: Hessel et al. (2021), arXiv 2104.08718, Eq. 1, with the customary factor 100 in place of 2.5.
    """

    def __init__(self) -> None:
        self.num_pairs = 0
        self._sum = 0.0

    def update(self, images: Tensor, texts: Tensor) -> None:
        """Count pairs.

        Args:
            images: ``(n, dim)`` image embeddings, of any length.
            texts: ``(n, dim)`` embeddings of their captions.

        Raises:
            ValueError: If the shapes differ, or an embedding is zero or not finite.
        """
        if images.shape != texts.shape or images.dim() != 2:
            raise ValueError(f"CLIP score needs two (n, dim), got {tuple(images.shape)} and {tuple(texts.shape)}")
        for embeddings in (images, texts):
            check_features(embeddings, embeddings.shape[1], first=self.num_pairs)
            if (embeddings == 0).all(dim=1).any():
                raise ValueError("CLIP score: an embedding is zero and has no direction")
        x, y = (torch.nn.functional.normalize(e.detach().cpu().double(), dim=1, eps=0) for e in (images, texts))
        self._sum += float(100 * (x * y).sum(dim=1).clamp(min=0).sum())
        self.num_pairs += len(images)

    @property
    def value(self) -> float:
        """Mean over pairs, 0 to 100."""
        if self.num_pairs == 0:
            raise ValueError("CLIP score: no pair was counted yet: update or merge first")
        return self._sum / self.num_pairs

    def state(self) -> dict[str, Any]:
        """Give what ``merge`` of another accumulator needs: plain numbers."""
        return {"num_pairs": self.num_pairs, "sum": self._sum}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another accumulator has counted."""
        self.num_pairs += state["num_pairs"]
        self._sum += state["sum"]
