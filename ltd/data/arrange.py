"""Make the plan of a run: which views there are, which samples serve each, and in which order they are drawn."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import fields

import numpy as np

from ltd.config import ConfigError
from ltd.data.batching import (
    Arrangement,
    BucketsConfig,
    FixedConfig,
    PackedConfig,
    arrange_cached,
    arrange_packs,
    step_kinds,
)
from ltd.data.buckets import arrange_buckets
from ltd.data.config import DataConfig
from ltd.data.mixture import MixedSource
from ltd.data.order import Strand
from ltd.data.plan import Plan
from ltd.data.sources import Source

logger = logging.getLogger(__name__)


def arrange(config: DataConfig, source: Source, *, fill: bool = True) -> Arrangement:
    """Find the views of a data section and the samples of each.

    Args:
        config: The data section.
        source: The samples.
        fill: Whether each bucket must have the samples of one batch (held-out data need not).

    Returns:
        The arrangement; views without a sample are kept, empty, with fixed batching only.

    Raises:
        ConfigError: If no view has a sample; names the counts.
    """
    match config.batching:
        case FixedConfig():
            return _arrange_views(config, source)
        case BucketsConfig() | PackedConfig() if not source.random_cuts:
            found = arrange_cached(config.batching, source.entries, fill=fill)
        case BucketsConfig():
            found = arrange_buckets(config.batching, source.entries, fill=fill)
        case PackedConfig():
            found = arrange_packs(config.batching, source.entries)
    if not found.views:
        raise ConfigError(
            f"data.batching: none of the {len(source.entries)} samples has a place ({_counts(found.left_out)}); "
            "change data.batching or data.shards"
        )
    return found


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"


def _arrange_views(config: DataConfig, source: Source) -> Arrangement:
    ids, misfits, empty = [], [], []
    for number, view in enumerate(config.views):
        fits, reasons = source.fits(view)
        ids.append(np.flatnonzero(fits))
        misfits.append(reasons)
        if not fits.any():
            empty.append(
                f"data.views[{number}]: got {view}, but none of the {len(source.entries)} samples fits "
                f"({_counts(reasons)}); needed a view that the data can fill: change data.views or data.shards"
            )
    if len(empty) == len(config.views):
        raise ConfigError(empty[0])
    sizes = tuple(view.shape.num_cells for view in config.views)
    units = (config.global_batch,) * len(config.views)
    return Arrangement(config.views, tuple(ids), sizes, units, misfits=tuple(misfits))


def describe(config: DataConfig, source: Source, arrangement: Arrangement, report: Callable[[str], None]) -> None:
    """Say what the views hold, name the empty ones, and what is left out.

    Args:
        config: The data section.
        source: The samples.
        arrangement: Its arrangement.
        report: Called with one line each.
    """
    total = len(source.entries)
    if source.bad:
        causes = _counts(Counter(record.cause for record in source.bad))
        report(f"data: {len(source.bad)} samples are left out by the index: {causes}")
    if arrangement.left_out:
        logger.warning(
            "data.batching: %d of %d samples have no place: %s",
            arrangement.left_out.total(),
            total,
            _counts(arrangement.left_out),
        )
    _warn_unused(config)
    if config.batching.kind == "packed":
        shapes = len(arrangement.views)
        placed = sum(len(ids) for ids in arrangement.ids)
        report(
            f"data.batching: {placed} of {total} samples in {shapes} sizes, packed to {config.batching.tokens} tokens"
        )
        return
    what = "data.views" if config.batching.kind == "fixed" else "bucket"
    for number, (view, ids) in enumerate(zip(arrangement.views, arrangement.ids, strict=True)):
        if not len(ids):
            logger.warning(
                "%s[%d] %s is empty: none of the %d samples fits (%s); it is left out",
                what,
                number,
                view,
                total,
                _counts(arrangement.misfits[number]),
            )
            continue
        left = f" (left out: {_counts(arrangement.misfits[number])})" if arrangement.misfits else ""
        units = arrangement.units[number]
        report(f"{what}[{number}] {view}: {len(ids)} of {total} samples, {units} a step{left}")


def build_plan(config: DataConfig, source: MixedSource, arrangement: Arrangement, *, seed: int) -> Plan:
    """Plan the global batches of a run.

    Args:
        config: The data section.
        source: The samples.
        arrangement: Views and the samples of each.
        seed: Seed of the run.

    Returns:
        The plan, a function of the seed and the data alone.

    Raises:
        ConfigError: If the data cannot give one global batch; says the numbers.
    """
    _check_sizes(config, arrangement)
    starts = [*source.starts, len(source.entries)]
    sets = [(starts[n], starts[n + 1], dataset.weight) for n, dataset in enumerate(config.sets)]
    shards = source.entries.columns["shard"]
    if not source.random_cuts:  # a cache is one memory map, shuffled whole: the order of media in one tar
        shards = np.zeros_like(shards)

    def strand(ids: np.ndarray, number: int) -> Strand:
        return Strand(ids, shards[ids], seed, ("set", number), config.open_shards, config.mode == "replacement")

    kinds = step_kinds(config.batching, arrangement, sets=sets, strand=strand)
    return Plan(kinds, seed=seed, by_epoch=config.batching.kind == "buckets")


def _check_sizes(config: DataConfig, arrangement: Arrangement) -> None:
    if config.batching.kind == "packed":
        return
    names = {"fixed": "data.views[{}] ({})", "buckets": "bucket {} ({})"}[config.batching.kind]
    field = {"fixed": "data.global_batch", "buckets": "data.batching.tokens"}[config.batching.kind]
    for number, (view, ids, units) in enumerate(
        zip(arrangement.views, arrangement.ids, arrangement.units, strict=True)
    ):
        if 0 < len(ids) < units:
            raise ConfigError(
                f"{field}: a global batch is {units} samples, but {names.format(number, view)} has only {len(ids)} "
                f"samples; needed at least one global batch: lower {field}, drop the view or add data"
            )


def _warn_unused(config: DataConfig) -> None:
    """Name the fields of fixed batching that another kind passes over; a recipe may have them from before."""
    if config.batching.kind == "fixed":
        return
    for item in fields(config):
        if item.name in ("global_batch", "views") and getattr(config, item.name) != item.default:
            logger.warning(
                "data.%s: only of data.batching.kind: fixed; this run is %s, whose sizes are those of data.batching",
                *(item.name, config.batching.kind),
            )
