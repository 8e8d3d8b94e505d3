"""Real clips that samples are held against: how many there are, and the draws."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.entries import Entry
from ltd.data.index import Index
from ltd.data.media import decode_cut
from ltd.data.plan import Placement, ViewConfig
from ltd.data.windows import Windows, enumerate_windows
from ltd.evaluation.protocol import Clips, Reference
from ltd.progress import Progress
from ltd.rng import generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairing:
    """Samples of one size and the training windows they can be held against; nothing is read yet."""

    view: ViewConfig  #: Their size.
    num_compared: int  #: n: samples that are compared; as many real windows twice.
    windows: Windows  #: All training windows of the size.


def pair_up(index: Index, view: ViewConfig, num_samples: int, *, max_clips: int) -> Pairing:
    """Say how many samples of one size are compared with real clips, with a warning where these are too few for all.

    Args:
        index: Training tars.
        view: Size of the samples.
        num_samples: Samples of the size.
        max_clips: Compare at most this many.

    Returns:
        The pairing.

    Raises:
        ConfigError: If there are fewer than 2 samples or 4 training windows.
    """
    windows = enumerate_windows(index, [view])
    wanted = min(num_samples, max_clips)
    n = min(wanted, len(windows) // 2)
    if n < 2:
        option = "--reference" if wanted >= 2 else "--max-clips" if num_samples >= 2 else "--samples"
        raise ConfigError(
            f"{option}: Frechet distances of {view} need 2 samples and 4 training windows or more, "
            f"got {num_samples} (--samples), {len(windows)} (--reference) and --max-clips {max_clips}"
        )
    if n < wanted:
        logger.warning(
            "--reference: %d windows of %s for %d samples, needed twice as many; only %d samples are compared",
            len(windows),
            view,
            wanted,
            n,
        )
    return Pairing(view, n, windows)


def read_reference(samples: Clips, index: Index, pairing: Pairing, *, seed: int) -> tuple[Clips, Reference]:
    """Draw real clips for samples, and the samples that are compared at equal n.

    Args:
        samples: All samples of one size.
        index: Training tars.
        pairing: How many are compared, with which windows.
        seed: Seed of the draws.

    Returns:
        ``n`` samples, evenly spread, and the reference: ``2 n`` windows of all training clips and, where every
        compared sample's prompt is a training caption, ``n`` windows of the clips of these captions.

    Raises:
        ConfigError: If a training clip does not decode.
    """
    view, n, windows = pairing.view, pairing.num_compared, pairing.windows
    counted = samples if n == len(samples) else samples.take([i * len(samples) // n for i in range(n)])
    order = torch.randperm(len(windows), generator=generator(seed, "evaluation pool", str(view)))[: 2 * n].tolist()
    by_caption: dict[str, list[Entry]] = {}
    for entry in index.entries:
        if entry.kind == view.kind and entry.frames >= view.span(entry.fps):
            by_caption.setdefault(index.caption(entry).strip(), []).append(entry)
    pool = _read(index, view, [(windows[i].entry, windows[i].placement) for i in order])
    if not set(counted.captions) <= by_caption.keys():
        return counted, Reference(pool, None)
    random = generator(seed, "evaluation matched", str(view))
    cuts = []
    for caption in counted.captions:
        entries = by_caption[caption]
        entry = entries[int(torch.randint(len(entries), (), generator=random))]
        slack = entry.frames - view.span(entry.fps)
        start = int(torch.randint(slack + 1, (), generator=random))
        cuts.append((entry, Placement(start, view.frame_step(entry.fps), (0.5, 0.5), False)))
    return counted, Reference(pool, _read(index, view, cuts))


def _read(index: Index, view: ViewConfig, cuts: list[tuple[Entry, Placement]]) -> Clips:
    pixels = []
    with Progress(len(cuts), "read real clips", unit="clips") as progress:
        for entry, placement in cuts:
            try:
                frames = decode_cut(index.read(entry, entry.media), entry, view, placement)
            except BadSampleError as error:
                raise ConfigError(f"--reference: {entry.key} of {entry.shard} cannot be read: {error}") from None
            pixels.append(torch.from_numpy(frames.copy()))
            progress.update()
    captions = tuple(index.caption(entry).strip() for entry, _ in cuts)
    return Clips(torch.stack(pixels), captions, tuple(f"{entry.shard}/{entry.key}" for entry, _ in cuts))
