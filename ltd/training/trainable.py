"""Which parameters of a denoiser a run trains, by patterns of their names; the others are frozen. Knows no engine."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ltd.config import ConfigError
from ltd.denoisers import DitConfig, SurgeryReport, build_denoiser
from ltd.denoisers.alignment import DenoiserAlignmentConfig, TokenProjector
from ltd.denoisers.surgery import names_match

if TYPE_CHECKING:
    from ltd.training.denoiser import DenoiserRun

logger = logging.getLogger(__name__)

_PROJECTOR = "alignment."
#: Parts behind all blocks.
_LAST = ("final.", "head.", _PROJECTOR)
_OF_BLOCK = re.compile(r"(?:blocks|block_embeddings)\.(\d+)\.")


def check_parts(run: DenoiserRun) -> None:
    """Refuse patterns that name nothing, and parts that cannot be trained alone.

    Args:
        run: The run.

    Raises:
        ConfigError: Names ``trainable``, and what to change.
    """
    if not run.trainable:
        return
    if "" in run.trainable:
        raise ConfigError("trainable: got an empty name, needed names of parameters or modules")
    block = run.alignment.block if run.alignment is not None and run.alignment.weight else None
    names = _parameter_names(run.model, block)
    for pattern in run.trainable:
        if not any(names_match(name, [pattern]) for name in names):
            near = ", ".join(_nearest(pattern, names))
            raise ConfigError(f"trainable: {pattern!r} matches no parameter of the model; the nearest are {near}")
    frozen = set(frozen_names(names, run.trainable))
    if block is not None:
        _check_alignment(names, frozen, block)
    if frozen and run.parallel.zero == 3:
        raise ConfigError("trainable: holds frozen weights, which parallel.zero=3 does not take; use 2 or less")


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Pick the parameters that patterns leave frozen.

    Args:
        names: Of all parameters.
        patterns: Of parameters, or of modules with all of theirs, that are trained; none trains all.

    Returns:
        Names in their order.
    """
    return [name for name in names if patterns and not names_match(name, patterns)]


def check_start(run: DenoiserRun, *, fresh: bool) -> None:
    """Refuse to freeze weights that were never trained.

    Args:
        run: What holds at its start.
        fresh: Whether it begins with neither a checkpoint nor another model's weights.

    Raises:
        ConfigError: If it does, and freezes some.
    """
    if fresh and frozen_names(_parameter_names(run.model, None), run.trainable):
        raise ConfigError("trainable: freezes weights that were never trained; set init_from, or let a stage set it")


def freeze(model: nn.Module, patterns: Sequence[str], report: SurgeryReport | None) -> None:
    """Let a model's parameters take gradients as patterns say.

    Args:
        model: Changed in place.
        patterns: Of ``DenoiserRun.trainable``.
        report: What its first values were made of, for a warning of those that were drawn; None where nothing was.
    """
    if not patterns:
        return
    frozen = set(frozen_names([name for name, _ in model.named_parameters()], patterns))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    drawn = [] if report is None else [t.name for t in report.tensors if t.action == "drawn" and t.name in frozen]
    if drawn:
        more = f" and {len(drawn) - 3} more" if len(drawn) > 3 else ""
        logger.warning("trainable: %s%s are frozen as they were drawn", ", ".join(drawn[:3]), more)


@functools.lru_cache(maxsize=4)
def _parameter_names(model: DitConfig, alignment_block: int | None) -> tuple[str, ...]:
    with torch.device("meta"):
        built = build_denoiser(model)
        if alignment_block is not None:
            built.alignment = TokenProjector(model.width, 1, DenoiserAlignmentConfig(block=alignment_block, hidden=1))
    return tuple(name for name, _ in built.named_parameters())


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """Find names like a pattern, each kind of block once."""
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    modules = (kind.rsplit(".", depth)[0] for kind in kinds for depth in range(kind.count(".") + 1))
    known = list(dict.fromkeys(modules))
    return difflib.get_close_matches(re.sub(r"\.\d+(?=\.|$)", ".*", pattern), known, n=3, cutoff=0.0)


def _check_alignment(names: Iterable[str], frozen: set[str], block: int) -> None:
    """Refuse a projector that nobody trains, and one that teaches the model nothing."""
    if any(name.startswith(_PROJECTOR) for name in frozen):
        raise ConfigError("trainable: leaves the projector of alignment as it was drawn; add alignment to the list")
    for name in names:
        place = _OF_BLOCK.match(name)
        if name not in frozen and not name.startswith(_LAST) and (place is None or int(place[1]) < block):
            return
    raise ConfigError(
        f"trainable: nothing before the end of block {block} (alignment.block), so the term of alignment would train "
        "its projector alone; add such parts, or set alignment to null"
    )
