"""Whether an autoencoder's data are media, and whether the LPIPS it asks for can be measured. Knows no network."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ltd.config import ConfigError
from ltd.data import ViewConfig
from ltd.data.buckets import candidate_sizes
from ltd.data.latents import is_cache
from ltd.training.autoencoder_heldout import LEAST_PIXELS
from ltd.training.run import named_shards
from ltd.training.stages import at_step

if TYPE_CHECKING:
    from ltd.training.autoencoder import AutoencoderRun

logger = logging.getLogger(__name__)


def check_media(run: AutoencoderRun) -> None:
    """Refuse latent caches: they have no pixels to train on.

    Args:
        run: The run, as it is in one stage.

    Raises:
        ConfigError: Names the field.
    """
    for name, shards in named_shards(run).items():
        if name.startswith("evaluation") and not run.evaluation.every:
            continue
        for path in (shards,) if isinstance(shards, str) else shards:
            if is_cache(path):
                raise ConfigError(f"{name}: {path} holds latents; an autoencoder trains on media shards")


def check_lpips(run: AutoencoderRun) -> None:
    """Refuse LPIPS that is never due, or that no size of the data is large enough for.

    Args:
        run: The run, whose ``lpips`` may be null.

    Raises:
        ConfigError: Names ``lpips``.
    """
    if run.lpips is None:
        return
    if not run.evaluation.every:
        raise ConfigError("lpips: is measured of held-out samples; set evaluation.every, or lpips to null")
    batching = run.data.batching
    if batching.kind == "buckets":
        sizes = [size for side in batching.sides for size in candidate_sizes(side, batching.token).tolist()]
        what = "bucket of data.batching.sides"
    else:
        sizes, what = [[view.height, view.width] for view in run.data.views], "view of data.views"
    largest = max(min(size) for size in sizes)
    if largest < LEAST_PIXELS:
        raise ConfigError(
            f"lpips: no {what} has {LEAST_PIXELS} pixels or more on its shorter side, got {largest} at most"
        )


def check_lpips_data(run: AutoencoderRun) -> None:
    """Refuse LPIPS without held-out samples, in whatever stage.

    Args:
        run: The whole run, in which toy data have been filled in.

    Raises:
        ConfigError: Names ``lpips`` and ``evaluation.shards``.
    """
    for step in (0, *(stage.from_step for stage in run.stages)):
        now = at_step(run, step)[0]
        if now.lpips is not None and now.evaluation.shards is None:
            after = f" after step {step}" if step else ""
            raise ConfigError(
                f"lpips: is measured of held-out samples, and evaluation.shards is null{after}; set it, or lpips to "
                "null"
            )


def warn_of_small_views(views: Sequence[ViewConfig]) -> None:
    """Say once which clips and images are too small for LPIPS, and which kind has none at all.

    Args:
        views: What samples are cut to.
    """
    small = [view for view in views if min(view.height, view.width) < LEAST_PIXELS]
    if not small:
        return
    told = []
    for kind in ("video", "image"):
        of_kind = [view for view in views if view.kind == kind]
        if of_kind and all(view in small for view in of_kind):
            told.append(f"{kind}s get no LPIPS")
        elif any(view in small for view in of_kind):
            told.append(f"eval/lpips_{kind} is of the larger {kind}s alone")
    sizes = ", ".join(str(view) for view in small)
    logger.warning("lpips: less than %d pixels on the shorter side of %s: %s", LEAST_PIXELS, sizes, "; ".join(told))
