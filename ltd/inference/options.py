"""Options of a sampling job that would change nothing beside the others: refused, so that nobody takes them to act."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence

import torch

from ltd.config import ConfigError
from ltd.inference.known import COUNTED
from ltd.inference.requests import Request
from ltd.inference.run_parts import RunParts

#: Option, whether something uses it, and what would.
_Rule = tuple[str, bool, str]


def refuse_idle(args: Namespace, given: Collection[str], parts: RunParts, requests: Sequence[Request]) -> None:
    """Refuse options that were given and that nothing uses.

    Args:
        args: All options.
        given: Names of those that were given.
        parts: What the denoiser was trained with.
        requests: What is to be made.

    Raises:
        ConfigError: Names the option, and the one that it needs.
    """
    for name, used, needed in _rules(args, parts, requests):
        if name in given and not used:
            raise ConfigError(f"--{name.replace('_', '-')}: changes nothing here; needed {needed}, or leave it out")


def _rules(args: Namespace, parts: RunParts, requests: Sequence[Request]) -> Iterator[_Rule]:
    tasks = {request.given.task for request in requests if request.given is not None}
    yield "order", args.solver == "unipc", f"--solver unipc (got {args.solver})"
    yield "noise", args.solver == "sde", f"--solver sde (got {args.solver})"
    yield "overlap", args.segments > 1, "--segments of 2 or more"
    yield "tile_overlap", args.tile is not None, "--tile"
    yield "box", "inpainting" in tasks, "--condition with --task inpainting"
    yield "known", bool(tasks & COUNTED), f"--condition with --task {', '.join(sorted(COUNTED))}"
    told = set(parts.scalars)
    yield "original_size", bool(told & {"height", "width"}), "a denoiser with height or width in model.scalars"
    yield "crop", bool(told & {"crop_top", "crop_left"}), "a denoiser with crop_top or crop_left in model.scalars"
    yield "cut_prompts", parts.text is not None, "a denoiser that takes text (--prompts)"
    yield "negative", parts.text is not None, "a denoiser that takes text (--prompts)"
    yield "negative", args.guide is None, "no --guide, which is led away from in its place"
    for name in ("guidance_interval", "guidance_rescale", "guidance_channels", "guide", "negative"):
        yield name, args.guidance != 1, "--guidance other than 1 (off)"


def check_device(device: torch.device | str) -> torch.device | str:
    """Refuse a device that this process does not have.

    Args:
        device: Its name.

    Returns:
        The same.

    Raises:
        ConfigError: If there is no such device.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device: got {str(device)!r}, needed cpu, cuda or cuda:NUMBER") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: got {str(device)!r}, needed cpu, cuda or cuda:NUMBER")
    count = torch.cuda.device_count() if found.type == "cuda" and torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ConfigError(f"--device: got {device}, but this process sees {count} CUDA devices; needed one, or cpu")
    return device
