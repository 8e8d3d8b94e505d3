"""What the stages to come read, opened once before the first step: nothing is found missing or unfit hours later.

Knows samples alone; whoever starts a run lists what else there is.
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
#: What a stage reads: a value that tells it from others, and what opens it or raises a ``ConfigError``.
Need: TypeAlias = tuple[object, Callable[[], object]]


def check_later_stages(
    start: Start[R], layout: Layout, needs: Callable[[R], Iterator[Need]], moved: Callable[[], None]
) -> None:
    """Open what later stages read and the one that stands at the start does not; called by all processes.

    What cannot be reached just now, as a store over a network, is only warned of.

    Args:
        start: Where the run stands.
        layout: Its processes; the main one looks, and lets go of what it opened.
        needs: Lists what a stage reads besides its samples and held-out samples; it must not communicate.
        moved: Called on every process each time something was opened, so that none counts as standing still.

    Raises:
        ConfigError: If something is missing, damaged or does not fit; names the stage and the field, on all processes.
    """
    if not start.base.stages:
        return
    problem = layout.lead(lambda step: _find_problem(start, layout, needs, step), moved)
    if problem is not None:
        raise ConfigError(problem)


def _find_problem(
    start: Start[R], layout: Layout, needs: Callable[[R], Iterator[Need]], step: Callable[[], None]
) -> str | None:
    try:
        known = [key for key, _ in _list(start.run, layout, needs)]
    except ConfigError:
        return None  # the present stage finds its own faults, on all processes
    for number, stage in enumerate(start.base.stages):
        if stage.from_step <= start.step:
            continue
        before = len(known)
        try:
            for key, look in _list(at_step(start.base, stage.from_step)[0], layout, needs):
                if key not in known:
                    known.append(key)
                    look()
                    step()
        except ConfigError as error:
            return f"stages[{number}].set.{error}"
        except OSError as error:
            logger.warning("what the stage from step %d reads cannot be looked at now: %s", stage.from_step, error)
            continue
        if len(known) > before:
            logger.info("what the stage from step %d reads is there", stage.from_step)
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
