"""Whether the data of a denoiser with classes have labels that it can take: said before anything is trained."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ltd.data.labels import check_labels, class_names, read_classes
from ltd.data.mixture import open_sources
from ltd.parallel.layout import Layout
from ltd.training.run import open_heldout

if TYPE_CHECKING:
    from ltd.training.denoiser import DenoiserRun

logger = logging.getLogger(__name__)


def check_run_labels(run: DenoiserRun, layout: Layout) -> tuple[str, ...]:
    """Check the labels of the training and held-out samples; called by all processes, one of which reads the indexes.

    Args:
        run: The run; nothing is read for a model without classes.
        layout: Processes of the run.

    Returns:
        Names of the classes by number, "" where none is known; () without any name.

    Raises:
        ConfigError: If a label does not fit the model or the class list, or there is none; on all processes.
    """
    if run.model.num_classes is None:
        return ()
    return layout.decide(lambda: read_run_labels(run))


def read_run_labels(run: DenoiserRun) -> tuple[str, ...]:
    """Check labels as ``check_run_labels`` does, in this process alone."""
    num_classes = run.model.num_classes
    if num_classes is None:
        return ()
    classes = read_classes(run.data.classes)
    names: tuple[str, ...] = ()
    opened = [open_sources(run.data)]
    if run.evaluation.shards:
        opened.append(open_heldout(run))
    for mixed in opened:
        for source in mixed.sources:
            missing = check_labels(source.entries, classes, num_classes, source.shard_of)
            if missing:
                logger.warning(
                    "%d of the %d samples of %s have no label: they train as the null class",
                    *(missing, len(source.entries), source.shard_of(0)),
                )
            names = max(names, class_names(source.entries, classes), key=len)
    return names
