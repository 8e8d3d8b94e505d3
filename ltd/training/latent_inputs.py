"""What a denoiser trains on: batches of media or of cached latents -> unit-scale latents, text, features."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltd import autoencoders
from ltd.autoencoders import LatentNorm
from ltd.autoencoders.flops import encode_flops
from ltd.config import ConfigError
from ltd.data import Batch
from ltd.data.latents import LatentCache, check_cache, check_source, is_cache
from ltd.denoisers import TIME_CONVENTION, Conditioning, stack_scalars
from ltd.encoders.joined import build_text, text_hash
from ltd.encoders.text import TextEncoder, flops_so_far
from ltd.inference.media import pixels_to_video
from ltd.parallel.layout import Layout
from ltd.rng import DrawRandom
from ltd.training.denoiser_alignment import build_aligner
from ltd.training.label_checks import check_run_labels
from ltd.training.run import check_views, named_shards

if TYPE_CHECKING:
    from ltd.training.denoiser import DenoiserRun

logger = logging.getLogger(__name__)

#: What ``prepare`` makes of a batch that the denoiser is told.
_CONDITIONS = ("text", "text_mask", "label", "scalars")


class LatentInputs:
    """Turn batches of media or of cached latents into what a denoiser trains on.

    Args:
        run: The run.
        layout: This process's device.

    Raises:
        ConfigError: If the cache is of another autoencoder or text encoder, or the model does not fit them.
    """

    def __init__(self, run: DenoiserRun, layout: Layout) -> None:
        self.device = layout.device
        autoencoder = open_autoencoder(run).to(layout.device)
        check_views(run.data, autoencoder.compression, run.model.patch)
        self.norm: LatentNorm = autoencoder.latent_norm
        self.compression = autoencoder.compression
        self.hash = autoencoders.weights_hash(autoencoder)
        self.encoder: TextEncoder | None = None
        self._encoded_flops = 0.0
        opened = self._open_caches(run)
        layout.decide(lambda: _read_sources(opened))  # one process reads the tars' indexes
        caches = list(opened.values())
        trained = caches[: len(run.data.sets)]
        self.aligner = build_aligner(
            run.alignment,
            trained,
            autoencoder.compression,
            run.model.patch,
            layout.device,
            read_features=run.data.read_features,
        )
        all_cached = None not in caches
        self.autoencoder: autoencoders.Autoencoder | None = None if all_cached else autoencoder
        self.classes = check_run_labels(run, layout)
        self.num_classes, self.scalars = run.model.num_classes, run.model.scalars
        self.null = Conditioning()
        if run.text is not None:
            if not all_cached:
                self.encoder = build_text(run.text, run.model.text_join, device=layout.device)
            if caches[0] is not None:
                text, mask = _null_text(caches[0])
            else:
                assert self.encoder is not None
                text, mask = self.encoder.encode([""])
            self.null = Conditioning(text=text.to(self.device), text_mask=mask.to(self.device))
        _check_model(run, autoencoder, None if self.null.text is None else self.null.text.shape[-1])
        self._check_parts(run, caches[0])

    def check_stage(self, run: DenoiserRun) -> None:
        """Refuse data of a later stage that do not fit; in this process alone.

        Args:
            run: The run as it is in that stage.

        Raises:
            ConfigError: If sizes, caches or features are not those of this run's autoencoder, text encoder or
                alignment.
        """
        check_views(run.data, self.compression, run.model.patch)
        opened = self._open_caches(run)
        _read_sources(opened)
        caches = list(opened.values())
        if caches[0] is not None:
            self._check_parts(run, caches[0])
        trained = caches[: len(run.data.sets)]
        if any(cache is not None for cache in trained) or self.aligner is None or self.aligner.teacher is None:
            features = run.data.read_features
            build_aligner(run.alignment, trained, self.compression, run.model.patch, "cpu", read_features=features)

    def embeds_text(self, run: DenoiserRun) -> bool:
        """Say whether a stage reads captions that no cache has embeddings of."""
        return run.text is not None and None in self._open_caches(run).values()

    def _open_caches(self, run: DenoiserRun) -> dict[str, LatentCache | None]:
        """Open the latent caches of training and held-out data, by the field that names them; None for media."""
        opened: dict[str, LatentCache | None] = {}
        for name, shards in named_shards(run).items():
            try:
                opened[name] = self._open_cache(run, shards)
            except ConfigError as error:
                raise ConfigError(_rename(error, name)) from None
        return opened

    def _open_cache(self, run: DenoiserRun, shards: str | tuple[str, ...]) -> LatentCache | None:
        """Open a latent cache and refuse one of another autoencoder or text encoder; None for media."""
        paths = (shards,) if isinstance(shards, str) else shards
        if len(paths) != 1 or not is_cache(paths[0]):
            return None
        cache = LatentCache(paths[0])
        expected: dict[str, Any] = {"autoencoder_hash": self.hash}
        if run.text is not None:
            expected["text_encoder_hash"] = text_hash(run.text, run.model.text_join)
        check_cache(cache.manifest, **expected)
        return cache

    def _check_parts(self, run: DenoiserRun, cache: LatentCache | None) -> None:
        """Refuse a model whose stretches of text are not those of its encoders."""
        if not run.model.text_parts:
            return
        found: object = getattr(self.encoder, "parts", ()) if cache is None else cache.manifest.get("text_parts", ())
        parts = tuple((int(tokens), int(dim)) for tokens, dim in found)  # type: ignore[attr-defined]
        if parts != run.model.text_parts:
            raise ConfigError(
                f"model.text_parts: got {run.model.text_parts}, the text encoders give (tokens, channels) {parts}"
            )

    @property
    def encoder_flops(self) -> float:
        """Operations of autoencoder and text encoder so far, on this process."""
        return self._encoded_flops + flops_so_far(self.encoder)

    def lineage(self) -> dict[str, Any]:
        """Say what the denoiser's latents depend on: a checkpoint keeps it, and sampling checks it."""
        return {
            "time": TIME_CONVENTION,
            "autoencoder_hash": self.hash,
            "latent_norm": self.norm.to_plain(),
            **({"classes": list(self.classes)} if self.classes else {}),
        }

    def prepare(self, batch: Batch, random: DrawRandom) -> dict[str, Tensor]:
        """Make unit-scale latents and text embeddings.

        Args:
            batch: Media or cached latents, on the device.
            random: Random numbers of the batch; stream ``"posterior"``.

        Returns:
            ``latents`` (b, c, t, h, w) drawn from the posterior, ``weight`` (b,) and, on the CPU, ``draws`` (b,); of a
            model that takes them also ``text`` (b, n, d) and ``text_mask`` (b, n), ``label`` (b,), ``scalars`` (b, k).
        """
        if batch.pixels is not None:
            assert self.autoencoder is not None
            with torch.no_grad():
                posterior = self.autoencoder.encode(pixels_to_video(batch.pixels))
            config, rows = self.autoencoder.config, len(batch.pixels)
            self._encoded_flops += float(encode_flops(config, batch.shape, rows).forward)
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
        else:
            assert batch.mean is not None and batch.logvar is not None
            mean, logvar = batch.mean.float(), batch.logvar.float()
        noise = random.normal(mean.shape[1:], "posterior").to(mean.device)
        latents = self.norm.normalize(mean + torch.exp(0.5 * logvar) * noise)
        draws = torch.tensor(batch.draws)  # on the CPU: reading it there waits for no device
        prepared = {"latents": latents}
        if self.null.text is not None:
            prepared["text"], prepared["text_mask"] = self._text(batch)
        prepared |= {"weight": batch.weight, "draws": draws}
        if self.num_classes is not None:
            assert batch.label is not None
            prepared["label"] = batch.label
        if self.scalars:
            assert batch.geometry is not None
            prepared["scalars"] = stack_scalars(self.scalars, batch.fps, batch.geometry)
        return prepared

    def conditioning(self, tensors: dict[str, Tensor]) -> Conditioning:
        """Collect what the denoiser is told."""
        given: dict[str, Any] = {name: tensors.get(name) for name in _CONDITIONS}
        return Conditioning(**given)

    def _text(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.text is not None and batch.text_mask is not None:
            return batch.text.float(), batch.text_mask
        assert self.encoder is not None
        text, mask = self.encoder.encode(list(batch.captions))
        return text.to(self.device), mask.to(self.device)


def pack(groups: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put samples of several sizes into plain tensors, which a sequence group can exchange.

    Args:
        groups: What ``LatentInputs.prepare`` made, per size.

    Returns:
        The same names; ``latents`` is flat and ``shapes`` (b, 4) holds the (c, t, h, w) of each sample; ``features``,
        where there are some, has a row per token, sample after sample.
    """
    names = [name for name in ("weight", "draws", "label", "scalars") if name in groups[0]]
    packed: dict[str, Tensor] = {name: torch.cat([group[name] for group in groups]) for name in names}
    if "features" in groups[0]:
        packed["features"] = torch.cat([group["features"].flatten(0, 1) for group in groups])
    for name in ("text", "text_mask") if "text" in groups[0] else ():
        parts = [group[name] for group in groups]
        longest = max(part.shape[1] for part in parts)
        packed[name] = torch.cat(
            [torch.cat([p, p.new_zeros(len(p), longest - p.shape[1], *p.shape[2:])], dim=1) for p in parts]
        )
    packed["latents"] = torch.cat([group["latents"].flatten() for group in groups])
    shapes = [shape for group in groups for shape in [list(group["latents"].shape[1:])] * len(group["latents"])]
    packed["shapes"] = torch.tensor(shapes)  # on the CPU: reading it there waits for no device
    return packed


def unpack(tensors: dict[str, Tensor]) -> Tensor | list[Tensor]:
    """Take the latents back out: the inverse of ``pack``; latents of one size stay one tensor."""
    if "shapes" not in tensors:
        return tensors["latents"]
    shapes = tensors["shapes"].tolist()
    pieces = tensors["latents"].split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def open_autoencoder(run: DenoiserRun) -> autoencoders.Autoencoder:
    """Load the autoencoder of a run's latents, or make the untrained one of a debug run."""
    if run.autoencoder is not None:
        return autoencoders.load(run.autoencoder)
    assert run.untrained_autoencoder is not None
    logger.warning("untrained_autoencoder: its weights are random; good for a first look at the code only")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return autoencoders.build_autoencoder(run.untrained_autoencoder).eval().requires_grad_(False)


def _read_sources(caches: Mapping[str, LatentCache | None]) -> None:
    """Refuse caches of data that have changed."""
    for name, cache in caches.items():
        if cache is not None:
            try:
                check_source(cache.manifest)
            except ConfigError as error:
                raise ConfigError(_rename(error, name)) from None


def _rename(error: ConfigError, name: str) -> str:
    """Name the field that a cache was opened for, instead of that of a run with one data set."""
    return str(error).replace("data.shards", name, 1)


def _null_text(cache: LatentCache) -> tuple[Tensor, Tensor]:
    text, mask = cache.text("")
    if text is None or mask is None:
        raise ConfigError(f"data.shards: the latent cache {cache.directory} has no text; make it with a text encoder")
    return text[None], mask[None]


def _check_model(run: DenoiserRun, autoencoder: autoencoders.Autoencoder, text_dim: int | None) -> None:
    model, channels = run.model, autoencoder.latent_channels
    if model.latent_channels != channels:
        raise ConfigError(f"model.latent_channels: got {model.latent_channels}, the autoencoder makes {channels}")
    if model.text_dim != text_dim:
        made = "there is no text encoder (text is null)" if text_dim is None else f"the text encoder makes {text_dim}"
        hint = "; set text to null for a model without text" if model.text_dim is None else ""
        raise ConfigError(f"model.text_dim: got {model.text_dim}, {made}{hint}")
