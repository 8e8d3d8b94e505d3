"""Metrics against reference libraries or closed forms on the same features; shards, and wrong variants."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltd.evaluation.banks import FeatureBank
from ltd.evaluation.fidelity import PairedDistance, Psnr, Ssim
from ltd.evaluation.frechet import FeatureMoments, FrechetDistance
from ltd.evaluation.kernel import kernel_distance
from ltd.evaluation.manifold import manifold_metrics
from ltd.evaluation.motion import MotionStatistics, WarpingError
from ltd.evaluation.scores import ClipScore, inception_score
from tools.proofs.table import Cell, Proof

NAME = "metrics"
LIMIT = 1e-6
#: A wrong variant must differ from the reference by more than this many limits, relative as the equality is.
_CAUGHT = 10.0
_SHARDS = (0, 13, 13, 70)
_NOTES = f"""*reference*: a library's own code on the same features, or a closed form. *n*: samples and reference.
*difference*: largest over the numbers of the metric, relative where they exceed 1; limit {LIMIT:g}. *shards*: the same
accumulators fed in four shards (one empty), merged in another order, against the whole, relative alike, limit 1e-9.
*wrong variant*: the mistake that the row below it makes on purpose; its difference from the reference has to exceed
{_CAUGHT * LIMIT:g}. Precision, recall, density and coverage are counts, so that their differences are exact.
LPIPS is summed here from a stand-in network; `tests/encoders/test_perceptual.py` holds its network against the
published one. The networks of FID and FVD cannot be had here: `tests/encoders/test_torchscript.py` holds their input
contract on small stand-ins."""


@dataclass(frozen=True)
class Comparison:
    """One metric computed here and elsewhere on the same inputs."""

    metric: str
    reference: str
    n: str
    dims: str
    ours: dict[str, float]
    theirs: dict[str, float]
    #: The same from merged shards; None where another row shows it.
    merged: dict[str, float] | None = None
    #: A mistake and what it gives.
    wrong: tuple[str, dict[str, float]] | None = None


def difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Give the largest difference, relative where the reference exceeds 1."""
    assert ours.keys() == theirs.keys()
    return max(abs(ours[key] - theirs[key]) / max(1.0, abs(theirs[key])) for key in theirs)


def features(n: int, dim: int, seed: int, *, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Give correlated random features ``(n, dim)`` in float32, as a network's."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    return scale * torch.randn(n, dim, generator=random) @ mixing + shift


def bank(x: Tensor) -> FeatureBank:
    """Count features in one go."""
    return FeatureBank(x.shape[1]).update(x, range(len(x)))


def sharded_bank(x: Tensor) -> FeatureBank:
    """Count features in shards, merged from the last to the first."""
    merged = FeatureBank(x.shape[1])
    for part in reversed(torch.arange(len(x)).tensor_split(_SHARDS[1:])):
        merged.merge(FeatureBank(x.shape[1]).update(x[part], part.tolist()).state())
    return merged


def sharded(kind: Callable[[], Any], *inputs: Tensor) -> Any:
    """Feed an accumulator in shards, merged from the last to the first."""
    merged = kind()
    cuts = [1, 1, 3]
    for parts in reversed(list(zip(*(x.tensor_split(cuts) for x in inputs), strict=True))):
        if len(parts[0]):
            shard = kind()
            shard.update(*parts)
            merged.merge(shard.state())
    return merged


def whole(kind: Callable[[], Any], *inputs: Tensor) -> Any:
    """Feed an accumulator at once."""
    metric = kind()
    metric.update(*inputs)
    return metric


def _frechet(n: int, m: int, dim: int) -> Iterator[Comparison]:
    from torchmetrics.image.fid import _compute_fid

    x, y = features(n, dim, 0, scale=1.1, shift=0.1), features(m, dim, 1)
    ours = FrechetDistance(bank(y).moments()).to(bank(x).moments()).value
    shards = [FeatureMoments(dim) for _ in range(2)]
    for moments, rows in zip(shards, (x, y), strict=True):
        for part in rows.tensor_split(_SHARDS[1:]):
            moments.merge(FeatureMoments(dim).update(part).state())
    merged = FrechetDistance(shards[1]).to(shards[0]).value

    def theirs(correction: int) -> float:
        stats = [(a.double().mean(0), torch.cov(a.double().T, correction=correction)) for a in (x, y)]
        return float(_compute_fid(*stats[0], *stats[1]))

    yield Comparison(
        "FID, sFID, FVD", "torchmetrics 1.9 `_compute_fid`", f"{n}, {m}", str(dim), {"fid": ours}, {"fid": theirs(1)},
        {"fid": merged}, ("covariance over n (ddof 0)", {"fid": theirs(0)}),
    )  # fmt: skip


def _closed_frechet() -> Iterator[Comparison]:
    dim = 64
    random = torch.Generator().manual_seed(5)
    q = torch.linalg.qr(torch.randn(dim, dim, generator=random, dtype=torch.float64)).Q
    s1, s2 = torch.rand(2, dim, generator=random, dtype=torch.float64) + 0.1
    shift = torch.randn(dim, generator=random, dtype=torch.float64)
    sides = []
    for mean, s in ((torch.zeros(dim, dtype=torch.float64), s1), (shift, s2)):
        moments = FeatureMoments(dim)
        moments.merge({"num_samples": 101, "mean": mean, "scatter": (q * s**2) @ q.T * 100})
        sides.append(moments)
    want = float(shift.square().sum() + (s1 - s2).square().sum())
    ours = FrechetDistance(sides[0]).to(sides[1]).value
    rooted = float(shift.square().sum() + (s1**2 - s2**2).square().sum())
    yield Comparison(
        "FID, sFID, FVD", "closed form: covariances that commute", "-", str(dim), {"fid": ours}, {"fid": want},
        wrong=("variances in place of deviations", {"fid": rooted}),
    )  # fmt: skip


def _kernel(n: int, dim: int) -> Iterator[Comparison]:
    from torchmetrics.image.kid import poly_mmd

    x, y = features(n, dim, 0, scale=1.1, shift=0.1), features(n, dim, 1)
    found = kernel_distance(bank(x), bank(y), subset_size=n, num_subsets=1)
    theirs = float(poly_mmd(y.double(), x.double()))
    a, b = x.double(), y.double()

    def mean(p: Tensor, q: Tensor) -> float:
        return float(((p @ q.T / dim + 1) ** 3).mean())

    biased = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    parts = [kernel_distance(f(x), f(y), subset_size=n // 2, num_subsets=20) for f in (bank, sharded_bank)]
    yield Comparison(
        "KID, all samples", "torchmetrics 1.9 `poly_mmd`", f"{n}, {n}", str(dim), {"kid": found.value}, {"kid": theirs},
        wrong=("biased: pairs of a sample with itself", {"kid": biased}),
    )  # fmt: skip
    deviation = _subsets(a, b, n // 2, 20, ddof=1)
    yield Comparison(
        "KID, 20 subsets: mean, std", "numpy over the same subsets", f"{n}, {n}", str(dim),
        {"mean": parts[0].value, "std": parts[0].std}, _subsets(a, b, n // 2, 20, ddof=0),
        {"mean": parts[1].value, "std": parts[1].std}, ("std over subsets less one (ddof 1)", deviation),
    )  # fmt: skip


def _subsets(x: Tensor, y: Tensor, size: int, count: int, *, ddof: int) -> dict[str, float]:
    """Compute KID over the documented draws with numpy and torchmetrics."""
    from torchmetrics.image.kid import poly_mmd

    from ltd.rng import generator

    values = []
    for subset in range(count):
        drawn = []
        for rows, stream in ((x, "kid samples"), (y, "kid reference")):
            drawn.append(rows[torch.randperm(len(rows), generator=generator(0, stream, subset))[:size]])
        values.append(float(poly_mmd(drawn[1], drawn[0])))
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=ddof))}


def _inception(n: int, classes: int) -> Iterator[Comparison]:
    from torchmetrics.image.inception import InceptionScore

    logits = 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(0))
    theirs = InceptionScore(feature=nn.Identity(), splits=1)
    theirs.update(logits.double())
    found, merged = (inception_score(f(logits), num_splits=1) for f in (bank, sharded_bank))
    p = logits.double().softmax(dim=1)
    entropy = float(-(p * p.log()).sum(dim=1).mean())
    yield Comparison(
        "Inception score", "torchmetrics 1.9 `InceptionScore`", str(n), str(classes), {"is": found.value},
        {"is": float(theirs.compute()[0])}, {"is": merged.value}, ("entropy's sign turned", {"is": math.exp(entropy)}),
    )  # fmt: skip
    part = [a.numpy() for a in p.tensor_split([i * n // 10 for i in range(1, 10)])]
    scores = [np.exp((a * (np.log(a) - np.log(a.mean(0, keepdims=True)))).sum(1).mean()) for a in part]
    ten = inception_score(bank(logits), num_splits=10, seed=None)
    yield Comparison(
        "Inception score, 10 splits in order: mean, std", "numpy, Salimans et al.", str(n), str(classes),
        {"mean": ten.value, "std": ten.std}, {"mean": float(np.mean(scores)), "std": float(np.std(scores))},
        wrong=("std over splits less one (ddof 1)", {"mean": ten.value, "std": float(np.std(scores, ddof=1))}),
    )  # fmt: skip


def _manifolds(n: int, m: int, dim: int, k: int) -> Iterator[Comparison]:
    import prdc

    x, y = features(n, dim, 0, scale=0.8, shift=0.15), features(m, dim, 1)

    def ours(a: FeatureBank, b: FeatureBank) -> dict[str, float]:
        found = manifold_metrics(a, b, neighbours=k)
        return {name: getattr(found, name) for name in ("precision", "recall", "density", "coverage")}

    with contextlib.redirect_stdout(io.StringIO()):
        want = prdc.compute_prdc(y.double().numpy(), x.double().numpy(), k)
    yield Comparison(
        f"precision, recall, density, coverage, k = {k}", "prdc 0.2", f"{n}, {m}", str(dim), ours(bank(x), bank(y)),
        {key: float(value) for key, value in want.items()}, ours(sharded_bank(x), sharded_bank(y)),
        ("samples and reference swapped", ours(bank(y), bank(x))),
    )  # fmt: skip


def _clip(n: int, dim: int) -> Iterator[Comparison]:
    from torchmetrics.functional import pairwise_cosine_similarity

    images = features(n, dim, 0)
    texts = images + features(n, dim, 1)
    cosines = pairwise_cosine_similarity(images.double(), texts.double()).diagonal()
    assert (cosines > 0).all()
    yield Comparison(
        "CLIP score", "torchmetrics 1.9 `pairwise_cosine_similarity`, times 100", str(n), str(dim),
        {"clip": whole(ClipScore, images, texts).value}, {"clip": float(100 * cosines.mean())},
        {"clip": sharded(ClipScore, images, texts).value},
        ("embeddings not of unit length", {"clip": float(100 * (images * texts).double().sum(1).mean())}),
    )  # fmt: skip


def _fidelity() -> Iterator[Comparison]:
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    random = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (6, 3, 32, 40, 3), generator=random).to(torch.uint8)
    noisy = (clips.float() + 9 * torch.randn(clips.shape, generator=random)).clamp(0, 255).to(torch.uint8)
    x, y = noisy.double(), clips.double()
    psnr = {
        "clips": sum(float(peak_signal_noise_ratio(a, b, data_range=255.0)) for a, b in zip(x, y, strict=True)) / 6,
        "overall": float(peak_signal_noise_ratio(x, y, data_range=255.0)),
    }

    def both(metric: Psnr) -> dict[str, float]:
        return {"clips": metric.clip_mean, "overall": metric.overall}

    loud = {key: value + 20 * math.log10(256 / 255) for key, value in psnr.items()}
    yield Comparison(
        "PSNR", "torchmetrics 1.9", "6 clips", "3x32x40", both(whole(Psnr, noisy, clips)), psnr,
        both(sharded(Psnr, noisy, clips)), ("peak of 256", loud),
    )  # fmt: skip

    def theirs(sigma: float) -> dict[str, float]:
        options: dict[str, Any] = {"gaussian_weights": True, "use_sample_covariance": False, "channel_axis": 2}
        pairs = zip(noisy.flatten(0, 1).numpy(), clips.flatten(0, 1).numpy(), strict=True)
        values = [structural_similarity(a, b, data_range=255, sigma=sigma, **options) for a, b in pairs]
        return {"ssim": float(np.mean(values))}

    yield Comparison(
        "SSIM", "scikit-image", "6 clips", "3x32x40", {"ssim": whole(Ssim, noisy, clips).clip_mean}, theirs(1.5),
        {"ssim": sharded(Ssim, noisy, clips).clip_mean}, ("window of width 1.4", theirs(1.4)),
    )  # fmt: skip
    images = [frames.flatten(0, 1).permute(0, 3, 1, 2) for frames in (x, y)]
    mean, everywhere = structural_similarity_index_measure(*images, data_range=255.0, return_full_image=True)
    yield Comparison(
        "SSIM", "torchmetrics 1.9, windows inside the image", "6 clips", "3x32x40",
        {"ssim": whole(Ssim, noisy, clips).clip_mean}, {"ssim": float(everywhere[..., 5:-5, 5:-5].mean())},
        {"ssim": sharded(Ssim, noisy, clips).clip_mean}, ("its mean with mirrored edges", {"ssim": float(mean)}),
    )  # fmt: skip
    weights = torch.tensor([0.2, 0.3, 0.5]).view(3, 1, 1, 1)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (weights * (a - b) ** 2).mean(dim=(1, 2, 3, 4))

    want = float((weights.squeeze() * ((x - y) / 127.5) ** 2).mean())
    kind = lambda: PairedDistance(distance)  # noqa: E731
    yield Comparison(
        "LPIPS (sum over clips)", "closed form of a stand-in network", "6 clips", "3x32x40",
        {"d": whole(kind, noisy, clips).clip_mean}, {"d": want}, {"d": sharded(kind, noisy, clips).clip_mean},
        ("pixels in [0, 1]", {"d": want / 4}),
    )  # fmt: skip


def _motion() -> Iterator[Comparison]:
    y, x = torch.meshgrid(torch.arange(64).double(), torch.arange(64).double(), indexing="ij")
    picture = 125 + 65 * torch.stack([torch.sin(x / a) * torch.cos(y / b) for a, b in ((5, 7), (9, 4), (6, 11))], -1)
    jumps = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0)
    clips = torch.stack(
        [
            torch.stack([picture[8 + k : 40 + k, 8 + 2 * k : 40 + 2 * k] + jump * (-1) ** k for k in range(4)])
            for jump in jumps
        ]
    )
    flow = -torch.tensor([2.0, 1.0], dtype=torch.float64).expand(6, 3, 32, 32, 2)
    want = sum((2 * jump / 255) ** 2 for jump in jumps) / 6
    yield Comparison(
        "warping error, known flow and flicker", "closed form", "6 clips", "4x32x32",
        {"error": whole(WarpingError, clips, flow, -flow).value}, {"error": want},
        {"error": sharded(WarpingError, clips, flow, -flow).value},
        ("flow of the other direction", {"error": whole(WarpingError, clips, -flow, flow).value}),
    )  # fmt: skip
    still = picture[:32, :32].expand(6, 4, 32, 32, 3).clone()
    still[:, 1::2] += torch.tensor(jumps).view(6, 1, 1, 1, 1)
    swift = torch.zeros(6, 3, 32, 32, 2)
    swift[1:3, ..., 0] = 3.0

    def numbers(metric: MotionStatistics) -> dict[str, float]:
        return {name: getattr(metric, name) for name in ("magnitude", "dynamic_degree", "flicker")}

    known = {"magnitude": 1.0, "dynamic_degree": 2 / 6, "flicker": sum(jumps) / 6 / 255}
    yield Comparison(
        "motion: magnitude, dynamic degree, flicker", "closed form", "6 clips", "4x32x32",
        numbers(whole(MotionStatistics, still, swift)), known, numbers(sharded(MotionStatistics, still, swift)),
        ("flicker of 256 levels", known | {"flicker": known["flicker"] * 255 / 256}),
    )  # fmt: skip


def comparisons() -> Iterator[Comparison]:
    """Compare every metric."""
    for n, m, dim in ((2500, 2600, 64), (600, 500, 512)):
        yield from _frechet(n, m, dim)
    yield from _closed_frechet()
    for n, dim in ((200, 64), (400, 2048)):
        yield from _kernel(n, dim)
    for n, classes in ((1000, 1008), (203, 10)):
        yield from _inception(n, classes)
    for n, m, dim, k in ((500, 500, 64, 3), (500, 400, 64, 5), (300, 300, 2048, 3)):
        yield from _manifolds(n, m, dim, k)
    yield from _clip(300, 512)
    yield from _fidelity()
    yield from _motion()


def measure() -> Proof:
    """Measure every difference and hold it against its limit."""
    rows: list[list[Cell]] = []
    misses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for item in comparisons():
            found = difference(item.ours, item.theirs)
            merged = None if item.merged is None else difference(item.merged, item.ours)
            rows.append([item.metric, item.reference, item.n, item.dims, found, LIMIT, merged, None])
            if not found <= LIMIT:
                misses.append(f"{item.metric} against {item.reference}: {found:.2e}, limit {LIMIT:g}")
            if merged is not None and not merged <= 1e-9:
                misses.append(f"{item.metric}: shards differ from the whole by {merged:.2e}")
            if item.wrong is not None:
                name, values = item.wrong
                off = difference(values, item.theirs)
                rows.append([f"  wrong on purpose: {name}", item.reference, item.n, item.dims, off, None, None, True])
                if not off > _CAUGHT * LIMIT:
                    rows[-1][-1] = False
                    misses.append(f"{item.metric}: '{name}' would pass, it differs by {off:.2e} only")
    columns = ["metric", "reference", "n", "dims", "largest difference", "limit", "shards against whole", "caught"]
    return Proof("Metrics equal reference libraries and closed forms", columns, rows, misses, _NOTES)
