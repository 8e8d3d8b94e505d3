"""Data and networks of the stages to come, opened once before the first step: none is found missing hours later.

Knows what is opened by name only; whoever starts a run lists it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeVar

from ltd.config import ConfigError
from ltd.data import build_loader
from ltd.parallel.layout import Layout
from ltd.training.run import RunConfig, open_heldout
from ltd.training.stages import at_step
from ltd.training.start import Start

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=RunConfig)
#: What a stage opens: a value that tells it from others, and what opens it or raises a ``ConfigError``.
Need: TypeAlias = tuple[object, Callable[[], object]]


def check_later_stages(start: Start[R], layout: Layout, needs: Callable[[R], Iterator[Need]]) -> None:
    """Open what later stages read and the one that begins does not; called by all processes.

    Args:
        start: Where the run stands.
        layout: Its processes; the main one looks, and lets go of what it opened.
        needs: Lists what a stage opens besides its data and held-out data.

    Raises:
        ConfigError: If something is missing, damaged or does not fit; names the stage and the field, on all processes.
    """
    problem = _find_problem(start, layout, needs) if layout.is_main and start.base.stages else None
    problem = layout.broadcast_object(problem)
    if problem is not None:
        raise ConfigError(problem)


def _find_problem(start: Start[R], layout: Layout, needs: Callable[[R], Iterator[Need]]) -> str | None:
    known = [key for key, _ in _list(start.run, layout, needs)]
    for number, stage in enumerate(start.base.stages):
        if stage.from_step <= start.step:
            continue
        logger.info("looking at what the stage from step %d reads", stage.from_step)
        try:
            for key, look in _list(at_step(start.base, stage.from_step)[0], layout, needs):
                if key not in known:
                    known.append(key)
                    look()
        except ConfigError as error:
            return f"stages[{number}].set.{error}"
    return None


def _list(run: R, layout: Layout, needs: Callable[[R], Iterator[Need]]) -> Iterator[Need]:
    accumulation = run.parallel.accumulation

    def load() -> None:
        loader = build_loader(
            run.data,
            seed=run.seed,
            global_rank=layout.global_rank,
            world_size=layout.world_size,
            accumulation=accumulation,
        )
        loader.close()

    yield ("data", run.data, accumulation), load
    if run.evaluation.every and run.evaluation.shards is not None:
        yield ("heldout", run.data, run.evaluation.shards), lambda: open_heldout(run)
    yield from needs(run)
