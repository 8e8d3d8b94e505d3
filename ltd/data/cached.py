"""Windows of a latent cache as a source of samples: whole batches are gathered at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ltd.config import ConfigError
from ltd.data.batch import BadSample, Batch, Sample
from ltd.data.labels import numbers_of
from ltd.data.latents import LatentCache
from ltd.data.plan import Placement, ViewConfig
from ltd.data.sources import Items, require_captions


class CacheSource:
    """Windows in a latent cache.

    Args:
        cache: The opened cache.
        caption_required: Whether windows without a caption are left out.
        features: Whether the features of a vision network are read too.
        classes: Names of the classes by number; None takes what the windows say.

    Raises:
        ConfigError: If features are asked for and the cache has none.
    """

    random_cuts = False

    def __init__(
        self,
        cache: LatentCache,
        *,
        caption_required: bool,
        features: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.cache, self.features = cache, features
        if features and cache.num_features is None:
            raise ConfigError(
                f"data.read_features: got true, but the latent cache {cache.directory} has no features; make it again "
                "in another directory with a teacher (tools/cache_latents.py)"
            )
        self.bad: list[BadSample] = []
        self.entries = cache.entries
        if caption_required:
            self.entries = require_captions(self.entries, self.bad, (str(cache.directory),))
        self._labels = numbers_of(self.entries, classes)
        self._bytes = 2 * cache.channels * torch.empty((), dtype=cache.dtype).element_size()

    @property
    def digest(self) -> str:
        """Hash of what was cached and how."""
        return str(self.cache.manifest["identity"])

    def fits(self, view: ViewConfig) -> tuple[np.ndarray, Counter[str]]:
        """Tell which windows can serve a view, by their size in pixels or in latent cells.

        Args:
            view: The view.

        Returns:
            Bool ``(n,)``; the sizes of the others, counted.
        """
        wanted = (view.num_frames, view.height, view.width)
        columns = self.entries.columns
        sizes = np.stack([columns[name] for name in ("frames", "height", "width")], axis=1)
        found = (sizes == wanted).all(axis=1)
        if not found.any():  # never both: a batch has one size
            found = (self.cache.latent_shapes[columns["shard"]] == wanted).all(axis=1)
        others, counts = np.unique(sizes[~found], axis=0, return_counts=True)
        reasons = {
            f"cached at {t}x{h}x{w} pixels": int(n) for (t, h, w), n in zip(others.tolist(), counts, strict=True)
        }
        return found, Counter(reasons)

    def load(self, entry: int, view: ViewConfig, placement: Placement, caption: float) -> Sample:
        """Refuse: windows are loaded by the batch."""
        raise TypeError("windows of a latent cache are loaded by the batch")

    def load_batch(self, items: Items, view: ViewConfig) -> Batch:
        """Read windows of one size in one go.

        Args:
            items: Windows and captions.
            view: What they serve.

        Returns:
            The batch, with ``mean`` and ``logvar`` in the stored dtype and, where cached, text.
        """
        loaded = self.cache.load(self.entries.columns["shard"][items.entries], items.captions, features=self.features)
        return Batch(
            keys=tuple(items.keys),
            draws=tuple(items.draws),
            weight=torch.ones(len(items)),
            captions=loaded.captions,
            fps=loaded.fps,
            mean=loaded.mean,
            logvar=loaded.logvar,
            text=loaded.text,
            text_mask=loaded.text_mask,
            features=loaded.features,
            kinds=(view.kind,) * len(items),
            entries=tuple(items.entries.tolist()),
            caption_columns=loaded.caption_columns,
            label=torch.from_numpy(self._labels[items.entries]),
            geometry=loaded.geometry,
        )

    def num_bytes(self, items: Items, view: ViewConfig) -> int:
        """Count the bytes of the latents and features of windows of one size.

        Args:
            items: The windows.
            view: What they serve.

        Returns:
            Bytes.
        """
        t, h, w = self._shape(int(items.entries[0]))
        features = math.prod(self._features_shape(int(items.entries[0]))) * self.cache.dtype.itemsize
        return len(items) * (t * h * w * self._bytes + features * self.features)

    def _features_shape(self, entry: int) -> tuple[int, ...]:
        return self.cache.features_shape(int(self.entries.columns["shard"][entry])) if self.features else ()

    def _shape(self, entry: int) -> list[int]:
        shape: list[int] = self.cache.latent_shapes[self.entries.columns["shard"][entry]].tolist()
        return shape

    def blank(self, entry: int, view: ViewConfig) -> Sample:
        """Make zeros of the window's latent size.

        Args:
            entry: A window of the batch.
            view: Not looked at.

        Returns:
            The sample.
        """
        text, mask = self.cache.blank_text()
        zeros = torch.zeros(self.cache.channels, *self._shape(entry), dtype=self.cache.dtype)
        features = torch.zeros(self._features_shape(entry), dtype=self.cache.dtype) if self.features else None
        return Sample(mean=zeros, logvar=zeros, text=text, text_mask=mask, features=features)

    def shard_of(self, entry: int) -> str:
        """Name the cache directory."""
        return str(self.cache.directory)
