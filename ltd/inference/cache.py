"""Encode a data set once: raw latents and text embeddings into a cache that training reads like media."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ltd import autoencoders
from ltd.autoencoders.alignment import Teacher, features_per_latent, teacher_features
from ltd.config import ConfigError, to_dict
from ltd.data import BucketsConfig, FixedConfig, PackedConfig, ViewConfig
from ltd.data.batching import BatchingConfig, arrange_packs
from ltd.data.buckets import arrange_buckets
from ltd.data.entries import Entries
from ltd.data.index import Index, open_index
from ltd.data.latent_join import finish_cache
from ltd.data.latent_writer import LatentCacheWriter
from ltd.data.latents import CacheIdentity
from ltd.data.store import is_remote
from ltd.data.windows import Window, Windows, enumerate_windows, load_window
from ltd.encoders.joined import TextConfig, build_text
from ltd.encoders.text import TextEncoder, TransformersTextConfig
from ltd.encoders.vision import TeacherConfig, build_teacher, teacher_hash
from ltd.inference.media import pixels_to_video
from ltd.parallel.config import ParallelConfig
from ltd.parallel.layout import Layout
from ltd.progress import Progress

logger = logging.getLogger(__name__)
#: Seconds between looks at how far the other processes are.
_LOOK_S = 5.0
#: So many windows may fail whatever share they are.
_FEW_BAD = 16
#: uint8 frames ``(t, h, w, 3)``, and captions with their weights.
_Decoded = tuple[np.ndarray, tuple[tuple[str, float], ...]]


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What to encode, with what, and where to."""

    #: Folder of tars, or a folder with one folder of tars per split, each of which becomes a cache of its own.
    shards: str
    #: Folder of the cache, or of one cache per split.
    out: str
    #: Run directory or exported folder of the autoencoder.
    autoencoder: str
    #: Text encoder of the captions, or several; null caches no text.
    text: TextConfig = field(default_factory=TransformersTextConfig)
    #: How several text encoders meet, as the denoiser has it: along tokens (``model.text_parts``), or along channels.
    text_join: Literal["tokens", "channels"] = "tokens"
    #: Vision network whose features are cached too, for ``alignment`` of a denoiser; null caches none.
    teacher: TeacherConfig | None = None
    #: Which frames of a clip it sees: of those that belong to one latent frame the middle one, or all, averaged.
    teacher_frames: Literal["middle", "all"] = "middle"
    #: What every sample is cut to; a denoiser that trains on the cache names the same sizes. With fixed batching only.
    views: tuple[ViewConfig, ...] = ()
    #: ``fixed`` takes ``views``; buckets and packs cut each sample to the one size that training with them would take.
    batching: BatchingConfig = field(default_factory=FixedConfig)
    #: At most this many windows of one clip, evenly spread; null takes all that ``window_step`` gives.
    windows_per_clip: int | None = None
    #: Source frames between windows of a clip; null cuts windows that do not overlap.
    window_step: int | None = None
    #: Whether a mirrored copy of each window is cached too.
    flip: bool = False
    #: Stored precision of latents and embeddings.
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    #: Precision the autoencoder runs in.
    precision: Literal["bf16", "fp32"] = "fp32"
    #: Windows per forward pass.
    batch_size: int = 8
    #: Threads that decode ahead.
    num_workers: int = 2
    #: Share of the windows of a process that may fail before the job stops, [0, 1].
    max_bad_fraction: float = 0.05
    #: Whether windows whose bytes could not be read are left out for good; else the command run again retries them.
    accept_unreadable: bool = False

    def __post_init__(self) -> None:
        fixed = self.batching.kind == "fixed"
        if fixed != bool(self.views):
            needed = "at least one with fixed batching" if fixed else f"none with batching.kind: {self.batching.kind}"
            raise ConfigError(f"views: got {len(self.views)}, needed {needed}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction: got {self.max_bad_fraction}, needed a share in [0, 1]")
        for name in ("batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("windows_per_clip", "window_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1 or null, got {value}")


def build_caches(config: CacheConfig) -> list[Path]:
    """Encode every split of the shards; an interrupted job goes on where it stopped.

    Args:
        config: What to encode.

    Returns:
        The caches, one per split.

    Raises:
        ConfigError: If there are no shards, or ``out`` holds a cache of another identity.
    """
    parallel = ParallelConfig(engine="deepspeed")
    layout = Layout.from_environment(parallel)
    try:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        autoencoder = autoencoders.load(config.autoencoder, device=layout.device, dtype=dtype)
        join = config.text_join if isinstance(config.text, tuple) else "channels"
        encoder = build_text(config.text, join, device=layout.device)
        teacher = None if config.teacher is None else build_teacher(config.teacher).to(layout.device)
        job = _Job(config, layout, autoencoder, encoder, teacher)
        return [job.run(shards, out) for shards, out in _splits(config)]
    finally:
        layout.close()


def features_identity(teacher: TeacherConfig, frames: str) -> dict[str, str]:
    """Say what cached features depend on: part of a cache's identity, and what training asks it for.

    Args:
        teacher: The vision network.
        frames: Which frames of a clip it sees.

    Returns:
        Plain values.
    """
    return {"teacher_hash": teacher_hash(teacher), "frames": frames}


def _splits(config: CacheConfig) -> list[tuple[Path, Path]]:
    root, out = Path(config.shards), Path(config.out)
    if not root.is_dir():
        raise ConfigError(f"shards: {root} is no folder; needed a folder of tars, or of one folder per split")
    folders = sorted(folder for folder in root.iterdir() if any(folder.glob("*.tar")))
    if any(root.glob("*.tar")):
        return [(root, out)]
    if not folders:
        raise ConfigError(f"shards: {root} holds no .tar and no folder of tars; make some with tools/make_shards.py")
    return [(folder, out / folder.name) for folder in folders]


class _Job:
    """Models and settings that the splits share."""

    def __init__(
        self,
        config: CacheConfig,
        layout: Layout,
        autoencoder: autoencoders.Autoencoder,
        encoder: TextEncoder | None,
        teacher: Teacher | None,
    ) -> None:
        self.config, self.layout = config, layout
        self.autoencoder, self.encoder, self.teacher = autoencoder, encoder, teacher
        self.num_seen, self.num_bad = 0, 0
        self._check_views(config.views, "views[{}]")
        self.hash = autoencoders.weights_hash(autoencoders.load(config.autoencoder))

    def _check_views(self, views: Sequence[ViewConfig], name: str) -> None:
        for number, view in enumerate(views):
            try:
                self.autoencoder.compression.latent(view.shape)
            except ValueError as error:
                raise ConfigError(f"{name.format(number)}: {error}") from None

    def _cut(self, entries: Entries, split: str) -> tuple[tuple[ViewConfig, ...], tuple[np.ndarray, ...] | None]:
        """Say what samples are cut to, and which samples to each; None is every sample that fits."""
        match self.config.batching:
            case FixedConfig():
                return self.config.views, None
            case BucketsConfig() as buckets:
                found = arrange_buckets(buckets, entries, fill=split != "heldout")
            case PackedConfig() as packs:
                found = arrange_packs(packs, entries)
        self._check_views(found.views, "batching.token: size {} of the data")
        return found.views, found.ids

    def run(self, shards: Path, out: Path) -> Path:
        config, layout = self.config, self.layout
        index = open_index(str(shards))
        views, samples = self._cut(index.entries, shards.name)
        windows = enumerate_windows(
            index,
            views,
            samples=samples,
            windows_per_clip=config.windows_per_clip,
            window_step=config.window_step,
            flip=config.flip,
        )
        if not windows:
            sizes = ", ".join(map(str, config.views)) or "the sizes of batching"
            raise ConfigError(f"views: no sample of {shards} fits any of {sizes}")
        if layout.is_main:
            out.mkdir(parents=True, exist_ok=True)
        layout.barrier()
        writer = LatentCacheWriter(
            out,
            self._identity(index),
            windows,
            global_rank=layout.global_rank,
            world_size=layout.world_size,
            shards=[shard if is_remote(shard) else str(Path(shard).resolve()) for shard in index.shards],
        )
        if not writer.complete:
            self._write(index, writer, f"cache {out.name}")
        writer.close()
        layout.barrier()

        def finish() -> None:
            if not writer.complete:
                manifest = finish_cache(out, accept_unreadable=config.accept_unreadable)
                logger.info("%s: %s", out, manifest["counts"])

        layout.decide(finish)
        return out

    def _identity(self, index: Index) -> CacheIdentity:
        config, model, encoder = self.config, self.autoencoder, self.encoder
        transforms: dict[str, Any] = {
            "views": [to_dict(view) for view in config.views],
            "batching": to_dict(config.batching),
            "windows_per_clip": config.windows_per_clip,
            "window_step": config.window_step,
            "flip": config.flip,
            "precision": config.precision,
        }
        return CacheIdentity(
            autoencoder_hash=self.hash,
            compression=dataclasses.astuple(model.compression),
            latent_channels=model.latent_channels,
            data_digest=index.digest,
            transforms=transforms,
            text_encoder=encoder.name if encoder else None,
            text_encoder_hash=encoder.hash if encoder else None,
            text_parts=getattr(encoder, "parts", ()),
            dtype=config.dtype,
            features=None if config.teacher is None else features_identity(config.teacher, config.teacher_frames),
        )

    @torch.no_grad()
    def _write(self, index: Index, writer: LatentCacheWriter, description: str) -> None:
        pending, world = writer.pending(), self.layout.world_size
        self._write_texts(writer, [""])
        share = len(writer.windows[self.layout.global_rank :: world])
        everyone = Progress(len(writer.windows), "all processes", unit="windows", done=writer.num_done, enabled=False)
        start_s = time.monotonic()

        def everyone_note() -> str:
            writer.refresh(every_s=_LOOK_S)
            everyone.done = writer.num_done
            return everyone.line(time.monotonic() - start_s)

        with Progress(
            share,
            description if world == 1 else f"{description}, process 1 of {world}",
            unit="windows",
            done=share - len(pending),
            enabled=self.layout.is_main,
        ) as progress:
            for windows in pending.by_view():
                for batch in self._decoded(index, windows):
                    self._write_batch(writer, batch)
                    progress.update(len(batch), "" if world == 1 else everyone_note())

    def _write_batch(self, writer: LatentCacheWriter, batch: list[tuple[Window, _Decoded | Exception]]) -> None:
        good: list[tuple[Window, _Decoded]] = []
        for window, decoded in batch:
            if isinstance(decoded, Exception):
                cause = getattr(decoded, "cause", "unreadable" if isinstance(decoded, OSError) else "undecodable")
                writer.skip(window, cause=cause, message=f"{type(decoded).__name__}: {decoded}")
            else:
                good.append((window, decoded))
        self.num_seen, self.num_bad = self.num_seen + len(batch), self.num_bad + len(batch) - len(good)
        if (
            self.num_bad > max(_FEW_BAD, self.config.max_bad_fraction * self.num_seen)
            and self.config.max_bad_fraction < 1
        ):
            last = next(decoded for _, decoded in reversed(batch) if isinstance(decoded, Exception))
            raise ConfigError(
                f"max_bad_fraction: got {self.num_bad} bad windows of {self.num_seen}, needed a share of at most "
                f"{self.config.max_bad_fraction:g}; mend the data and run it again, or raise this; last: {last}"
            )
        if not good:
            return
        self._write_texts(writer, [text for _, (_, captions) in good for text, _ in captions])
        pixels = torch.from_numpy(np.stack([frames for _, (frames, _) in good])).to(self.layout.device)
        video = pixels_to_video(pixels)
        posterior = self.autoencoder.encode(video)
        means, logvars = posterior.mean.cpu(), posterior.logvar.cpu()  # one copy a batch
        features = self._features(video, means.shape[2])
        for (window, (_, captions)), mean, logvar, maps in zip(good, means, logvars, features, strict=True):
            writer.add(window, captions=captions, mean=mean, logvar=logvar, features=maps)

    def _features(self, video: Tensor, latent_frames: int) -> Tensor | list[None]:
        """Ask the vision network, if any, for ``(b, d, t, h, w)``, a map per latent frame, on the CPU."""
        if self.teacher is None:
            return [None] * len(video)
        found = teacher_features(self.teacher, video, self.autoencoder.compression.t, self.config.teacher_frames)
        return features_per_latent(found, (latent_frames, found.shape[3], found.shape[4])).cpu()

    def _write_texts(self, writer: LatentCacheWriter, captions: Sequence[str]) -> None:
        if self.encoder is None:
            return
        missing = writer.missing_texts(captions)
        if missing:
            embeddings, masks = self.encoder.encode(missing)
            for caption, embedding, mask in zip(missing, embeddings, masks, strict=True):
                writer.add_text(caption, embedding, mask)

    def _decoded(self, index: Index, windows: Windows) -> Iterator[list[tuple[Window, _Decoded | Exception]]]:
        """Decode ahead in threads, at most two batches; a window that fails arrives as its exception."""
        size = self.config.batch_size
        ahead: deque[list[tuple[Window, Future[_Decoded]]]] = deque()
        with ThreadPoolExecutor(self.config.num_workers) as pool:
            for start in range(0, len(windows), size):
                chunk = list(windows[start : start + size])
                ahead.append([(window, pool.submit(load_window, index, window)) for window in chunk])
                if len(ahead) > 1:
                    yield [(window, _result(future)) for window, future in ahead.popleft()]
            while ahead:
                yield [(window, _result(future)) for window, future in ahead.popleft()]


def _result(future: Future[_Decoded]) -> _Decoded | Exception:
    try:
        return future.result()
    except Exception as error:  # whatever a decoder makes of a bad file, the others go on
        return error
