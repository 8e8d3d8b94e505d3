"""A latent cache of made-up latents and embeddings, for the tests of what writes and reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltd.data import ViewConfig
from ltd.data.index import Index
from ltd.data.latent_writer import LatentCacheWriter
from ltd.data.latents import CacheIdentity, LatentCache
from ltd.data.windows import Window, Windows

VIEWS = (ViewConfig(num_frames=5, height=24, width=32), ViewConfig(num_frames=1, height=24, width=32))


def identity(index: Index, **fields: Any) -> CacheIdentity:
    given = {
        "autoencoder_hash": "aaaa",
        "compression": (4, 8, 8),
        "latent_channels": 3,
        "data_digest": index.digest,
        "transforms": {"flip": False, "precision": "fp32"},
        "text_encoder": "words",
        "text_encoder_hash": "tttt",
        "dtype": "fp32",
    }
    return CacheIdentity(**{**given, **fields})


def latents(window: Window) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(window.position)
    t = 1 + (window.view.num_frames - 1) // 4
    both = torch.randn(2, 3, t, 3, 4, generator=generator)
    return both[0], both[1]


def features(window: Window) -> Tensor:
    """Maps of a vision network: 5 channels on a 2x2 grid."""
    generator = torch.Generator().manual_seed(1000 + window.position)
    return torch.randn(5, 1 + (window.view.num_frames - 1) // 4, 2, 2, generator=generator)


def embed(caption: str) -> tuple[Tensor, Tensor]:
    words = caption.split() or ["<none>"]
    table = torch.tensor([[float(len(word)), float(ord(word[0]))] for word in words])
    padded = torch.cat([table, torch.full((2, 2), 99.0)])
    return padded, torch.tensor([True] * len(words) + [False] * 2)


def write(
    directory: Path, index: Index, windows: Windows, *, stop: int | None = None, **fields: Any
) -> LatentCacheWriter:
    world = {"global_rank": fields.pop("global_rank", 0), "world_size": fields.pop("world_size", 1)}
    shards = [str(Path(shard).resolve()) for shard in index.shards]
    writer = LatentCacheWriter(directory, identity(index, **fields), windows, shards=shards, **world)
    for window in writer.pending()[:stop]:
        captions = index.captions(window.entry)
        if writer.identity.text_encoder is not None:
            for text in writer.missing_texts(["", *(text for text, _ in captions)]):
                writer.add_text(text, *embed(text))
        mean, logvar = latents(window)
        maps = None if writer.identity.features is None else features(window)
        writer.add(window, captions=captions, mean=mean, logvar=logvar, features=maps)
    writer.close()
    return writer


def check_content(cache: LatentCache, index: Index, windows: list[Window], tolerance: float = 0.0) -> None:
    """Every window in a shuffled order, one call per latent shape, with neighbours in the batch."""
    assert [entry.key for entry in cache.entries] == [window.key for window in windows]
    order = np.random.default_rng(0).permutation(len(windows))
    for t in (1, 2):
        rows = order[cache.latent_shapes[order, 0] == t]
        loaded = cache.load(rows, np.zeros(len(rows)))
        assert loaded.mean.dtype == loaded.logvar.dtype == cache.dtype
        for place, row in enumerate(rows.tolist()):
            mean, logvar = latents(windows[row])
            assert torch.allclose(loaded.mean[place].float(), mean, rtol=tolerance, atol=0)
            assert torch.allclose(loaded.logvar[place].float(), logvar, rtol=tolerance, atol=0)
            assert loaded.captions[place] == index.caption(windows[row].entry)
            assert loaded.fps[place] == windows[row].fps
            assert loaded.text is not None and loaded.text_mask is not None
            expected, mask = embed(loaded.captions[place])
            text = loaded.text[place].float()
            assert torch.allclose(text[loaded.text_mask[place]], expected[mask], rtol=tolerance, atol=0)
            assert not text[~loaded.text_mask[place]].any()
