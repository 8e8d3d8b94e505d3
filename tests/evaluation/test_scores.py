import math

import numpy as np
import pytest
import torch

from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.scores import ClipScore, inception_score


def _logits(n: int, classes: int = 7, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _bank(logits: torch.Tensor) -> FeatureBank:
    return FeatureBank(logits.shape[1]).update(logits)


def test_inception_score_of_known_predictions():
    sure = _bank(1000 * torch.eye(5).repeat(4, 1))
    assert inception_score(sure, num_splits=1).value == pytest.approx(5, rel=1e-9)  # every class, each for sure
    assert inception_score(_bank(torch.zeros(20, 5)), num_splits=1).value == pytest.approx(1, rel=1e-9)
    one = _bank(1000 * torch.eye(5)[:1].repeat(20, 1))
    assert inception_score(one, num_splits=1).value == pytest.approx(1, rel=1e-9)
    half = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64).log()
    want = math.exp(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert inception_score(_bank(half), num_splits=1).value == pytest.approx(want, rel=1e-9)


def test_inception_score_of_splits_equals_the_original_procedure():
    logits = _logits(103)
    p = logits.softmax(dim=1).numpy()
    scores = []
    for i in range(10):
        part = p[i * 103 // 10 : (i + 1) * 103 // 10]
        kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(kl.sum(axis=1).mean()))
    found = inception_score(_bank(logits), num_splits=10, seed=None)
    assert found.value == pytest.approx(np.mean(scores), rel=1e-9)
    assert found.std == pytest.approx(np.std(scores), rel=1e-9)
    assert (found.num_samples, found.num_splits) == (103, 10)


@pytest.mark.filterwarnings("ignore:std:UserWarning", "ignore:Metric")
def test_inception_score_equals_torchmetrics_on_one_split():
    theirs = pytest.importorskip("torchmetrics.image.inception").InceptionScore(feature=torch.nn.Identity(), splits=1)
    logits = _logits(200, 30)
    theirs.update(logits)
    assert inception_score(_bank(logits), num_splits=1).value == pytest.approx(float(theirs.compute()[0]), abs=1e-6)


def test_splits_are_of_a_fixed_random_order_unless_told():
    logits = 1000 * torch.eye(4).repeat_interleave(25, 0)  # sorted by class: each quarter holds one
    assert inception_score(_bank(logits), num_splits=4, seed=None).value == pytest.approx(1)
    mixed = inception_score(_bank(logits), num_splits=4)
    assert mixed.value > 3.5 and mixed == inception_score(_bank(logits), num_splits=4)
    assert mixed != inception_score(_bank(logits), num_splits=4, seed=1)
    with pytest.raises(ValueError, match="got 9 samples for 10 splits, needed 1 in each or more; .* downwards"):
        inception_score(_bank(_logits(9)))


def test_clip_score_is_100_times_the_cosine_and_never_negative():
    score = ClipScore()
    images = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    texts = torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    score.update(images, texts)
    assert score.value == pytest.approx(100 * (1 + 0 + 0.5**0.5) / 3)
    with pytest.raises(ValueError, match="an embedding is zero"):
        score.update(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="NaN or infinity, of samples 3$"):
        score.update(torch.full((1, 2), torch.nan), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"needs two \(n, dim\), got \(1, 2\) and \(1, 3\)"):
        score.update(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="no pair was counted yet"):
        _ = ClipScore().value


def test_clip_scores_of_shards_equal_the_whole():
    random = torch.Generator().manual_seed(0)
    images = torch.randn(20, 8, generator=random)
    texts = images + 0.5 * torch.randn(20, 8, generator=random)
    whole, merged = ClipScore(), ClipScore()
    whole.update(images, texts)
    for part in (slice(0, 3), slice(3, 20)):
        shard = ClipScore()
        shard.update(images[part], texts[part])
        merged.merge(shard.state())
    assert merged.value == pytest.approx(whole.value, rel=1e-12) and merged.num_pairs == 20
