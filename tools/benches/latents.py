"""Cached latents in a global shuffle against WebDataset tars of the same latents through a shuffle buffer.

Every system hands out batches of torch tensors, mean and log-variance of each window with its caption, and the consumer
sums every value in float32; a row of its own says what that sum alone costs, which all systems pay. Cold rows drop the
page cache of all their files first and open everything anew; warm rows go on with what is open. Ours is a loader on a
latent cache: exact epochs, a shuffle over all windows, and a state per step that resumes exactly. The peer resumes
nothing and shuffles within its buffer.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltd.data import Batch, DataConfig, ViewConfig, build_loader
from ltd.data.entries import Entries, Entry
from ltd.data.latent_join import finish_cache
from ltd.data.latent_writer import LatentCacheWriter
from ltd.data.latents import CacheIdentity
from ltd.data.windows import Windows
from tools.benches.table import Row, System, interleave

KIND = "data"
NAME = "latents"
LAYOUT = "one process, no workers"
BUFFER = 1000
#: Latents (c, t, h, w), how many windows a round reads, and the batches they are read in.
WORKS = {
    "small": ((16, 1, 8, 14), 12800, (64, 256)),
    "middle": ((16, 1, 32, 32), 3200, (64,)),
    "clip": ((16, 5, 16, 28), 1600, (64,)),
}
_TINY = {"tiny": ((4, 1, 2, 2), 64, (8,))}
SHAPES, TINY_SHAPES = (
    f"latents (c, t, h, w), windows a round, batches: {', '.join(f'{name} {work}' for name, work in works.items())}"
    for works in (WORKS, _TINY)
)
_COMPRESSION = (4, 8, 8)
_TARS = 4


def measure(repeats: int, *, tiny: bool = False) -> list[Row]:
    """Time all works, warm and cold.

    Args:
        repeats: Rounds of each.
        tiny: The smallest sizes, to see that it runs.

    Returns:
        Rows per 1,000 windows.
    """
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="ltd-bench-latents-") as folder:
        for name, (shape, count, batches) in (_TINY if tiny else WORKS).items():
            made = _make(Path(folder) / name, shape, count)
            for batch, cold in [(batch, cold) for batch in batches for cold in (False, True)]:
                ours = _Ours(made, batch, reopen=cold)
                size = "x".join(map(str, shape))
                work = f"{name} latents {size} bf16, batch {batch}, {'cold' if cold else 'warm'}"
                rows += interleave(work, _systems(made, ours, batch, cold=cold), repeats=repeats)
                ours.close()
    return rows


@dataclass(frozen=True)
class _Made:
    """The same windows as a cache and as tars."""

    cache: Path
    tars: dict[str, list[Path]]  # by the extension of the latents' member
    view: ViewConfig
    shape: tuple[int, ...]
    count: int


def _latents(shape: tuple[int, ...], number: int) -> Tensor:
    random = torch.Generator().manual_seed(number)
    return torch.randn(2, *shape, generator=random).to(torch.bfloat16)


def _make(folder: Path, shape: tuple[int, int, int, int], count: int) -> _Made:
    t, h, w = (1 + (shape[1] - 1) * _COMPRESSION[0], shape[2] * _COMPRESSION[1], shape[3] * _COMPRESSION[2])
    view = ViewConfig(num_frames=t, height=h, width=w)
    kind = "image" if t == 1 else "video"
    entries = Entries.of([Entry(f"{n:07d}", kind, w, h, t, 24.0, (9,)) for n in range(count)])  # type: ignore[arg-type]
    places = np.zeros((count, 4), dtype=np.int64)
    places[:, 0] = np.arange(count)
    identity = CacheIdentity(
        autoencoder_hash="none",
        compression=_COMPRESSION,
        latent_channels=shape[0],
        data_digest=entries.digest,
        transforms={},
        dtype="bf16",
    )
    writer = LatentCacheWriter(folder / "cache", identity, Windows(entries, [view], places))
    for number, window in enumerate(writer.pending()):
        mean, logvar = _latents(shape, number)
        writer.add(window, captions=[("a caption", 1.0)], mean=mean, logvar=logvar)
    writer.close()
    finish_cache(folder / "cache")
    tars = {name: _make_tars(folder, name, shape, count) for name in ("npy", "pth")}
    return _Made(folder / "cache", tars, view, shape, count)


def _make_tars(folder: Path, extension: str, shape: tuple[int, ...], count: int) -> list[Path]:
    paths = [folder / f"{extension}-{part}.tar" for part in range(_TARS)]
    for part, path in enumerate(paths):
        with tarfile.open(path, "w") as archive:
            for number in range(part, count, _TARS):
                buffer, values = io.BytesIO(), _latents(shape, number)
                if extension == "npy":  # numpy has no bf16: its bits as integers
                    np.save(buffer, values.view(torch.int16).numpy())
                else:
                    torch.save(values, buffer)
                for name, data in ((extension, buffer.getvalue()), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{number:07d}.{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return paths


def _systems(made: _Made, ours: _Ours, batch: int, *, cold: bool) -> list[System]:
    cache = sorted(path for path in made.cache.rglob("*") if path.is_file())
    systems = [
        System(
            name="ltd build_loader, shuffle over all, in step",
            run=ours,
            ours=True,
            before=partial(_drop, cache) if cold else None,
        )
    ]
    for extension, paths in made.tars.items():
        for workers in (0, 1):
            how = f"DataLoader with {workers} worker" if workers else "in process"
            systems.append(
                System(
                    name=f"webdataset {_version()} .{extension}, shuffle({BUFFER}), {how}",
                    run=partial(_peer, paths, extension, workers, batch),
                    before=partial(_drop, paths) if cold else None,
                )
            )
    if not cold:
        systems.append(System(name="the consumer's sum alone", run=partial(_sum_alone, made, batch)))
    return systems


def _version() -> str:
    from importlib.metadata import version

    return version("webdataset")


def _drop(paths: Iterable[Path]) -> None:
    """Take files out of the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _consume(batches: Iterator[tuple[Tensor, Tensor]]) -> int:
    count, total = 0, 0.0
    for mean, logvar in batches:
        # Converted as a whole: far faster than a sum of bf16 that accumulates in float32.
        total += float(mean.float().sum()) + float(logvar.float().sum())
        count += len(mean)
    if not np.isfinite(total):
        raise ValueError("the latents that were read are not finite")
    return count


def _sum_alone(made: _Made, batch: int) -> int:
    halves = torch.randn(2, batch, *made.shape).to(torch.bfloat16)
    return _consume((halves[0], halves[1]) for _ in range(made.count // batch))


class _Ours:
    """One pass of the loader over as many samples as the cache has."""

    def __init__(self, made: _Made, batch: int, *, reopen: bool) -> None:
        self.made, self.batch, self.reopen = made, batch, reopen
        self._loader: Any = None

    def __call__(self) -> int:
        if self._loader is None:
            config = DataConfig(shards=str(self.made.cache), views=(self.made.view,), global_batch=self.batch)
            self._loader = build_loader(config, seed=0, global_rank=0, world_size=1)
            self._steps = iter(self._loader)
        count = _consume(self._batches())
        if self.reopen:
            self.close()
        return count

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.made.count // self.batch):
            (batch,), _ = next(self._steps)
            assert isinstance(batch, Batch) and batch.mean is not None and batch.logvar is not None
            yield batch.mean, batch.logvar

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
        self._loader = self._steps = None


def _from_npy(data: bytes) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(data))).view(torch.bfloat16)


def _from_pth(data: bytes) -> Tensor:
    return torch.load(io.BytesIO(data), weights_only=True)  # type: ignore[no-any-return]


def _stack(samples: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    return torch.stack([latents for latents, _ in samples]), [caption for _, caption in samples]


def _decode(sample: dict[str, Any], *, extension: str, decode: Callable[[bytes], Tensor]) -> tuple[Tensor, str]:
    return decode(sample[extension]), sample["txt"].decode()


def _peer(paths: list[Path], extension: str, workers: int, batch: int) -> int:
    import webdataset

    decode = partial(_decode, extension=extension, decode={"npy": _from_npy, "pth": _from_pth}[extension])
    urls = [str(path) for path in paths]
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(BUFFER).map(decode)
    data = data.batched(batch, collation_fn=_stack, partial=False)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers) if workers else data
    return _consume((latents[:, 0], latents[:, 1]) for latents, _ in loader)
