"""What a denoiser is told of requests: text, class and numbers of each, and what guidance leads away from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ltd.config import ConfigError
from ltd.data.labels import unknown_class
from ltd.denoisers import NULL_LABEL, Conditioning, DitConfig, stack_scalars
from ltd.encoders.text import TextEncoder
from ltd.inference.requests import Request


def find_class(given: int | str, num_classes: int | None, classes: Sequence[str], field: str) -> tuple[int, str]:
    """Find a class by number or name.

    Args:
        given: Number, digits or name.
        num_classes: Classes of the denoiser; None for a denoiser without.
        classes: Their names by number, "" where none is known; () where the run knows no names.
        field: Option it was given by, for messages.

    Returns:
        Its number, and its name, "" where none is known.

    Raises:
        ConfigError: If the denoiser has no such class.
    """
    if num_classes is None:
        raise ConfigError(f"{field}: got {given!r}, but the denoiser was built without classes (model.num_classes)")
    text = str(given).strip()
    if text in classes and text:
        number = list(classes).index(text)
    elif text.isascii() and text.isdigit():
        number = int(text)
    elif classes:
        raise ConfigError(f"{field}: {unknown_class(text, [name for name in classes if name])}")
    else:
        raise ConfigError(f"{field}: got {text!r}, but the run knows no names of classes; needed a number")
    if number >= num_classes:
        raise ConfigError(f"{field}: got {number}, needed 0 to {num_classes - 1} (model.num_classes is {num_classes})")
    return number, classes[number] if number < len(classes) else ""


def label_prompts(
    prompts: Sequence[str], labels: Sequence[int | str], num_classes: int | None, classes: Sequence[str], field: str
) -> list[tuple[int | None, str]]:
    """Say which class each prompt is made in.

    Args:
        prompts: The prompts.
        labels: Classes by number or name: none, one for all, or one per prompt.
        num_classes: As ``find_class``.
        classes: As ``find_class``.
        field: As ``find_class``.

    Returns:
        Number and name for each prompt; (None, "") for no class.

    Raises:
        ConfigError: If there is no such class, or there are more or fewer than prompts.
    """
    found = [find_class(label, num_classes, classes, field) for label in labels]
    if len(found) not in (0, 1, len(prompts)):
        raise ConfigError(f"{field}: got {len(found)} for {len(prompts)} prompts; needed one for all, or one for each")
    return [found[number if len(found) > 1 else 0] if found else (None, "") for number in range(len(prompts))]


def check_guidance(scale: float, config: DitConfig, field: str) -> None:
    """Refuse to lead a denoiser away from no condition that is never told of one.

    Args:
        scale: Of guidance; 1 is off.
        config: The denoiser's.
        field: What it was given by, for messages.

    Raises:
        ConfigError: If the scale is not 1 and the denoiser takes neither text nor classes.
    """
    if scale != 1 and config.text_dim is None and config.num_classes is None:
        raise ConfigError(f"{field}: got {scale:g}, but the denoiser takes neither text nor classes; needed 1")


def conditions_of(
    requests: Sequence[Request],
    config: DitConfig,
    text: TextEncoder | None,
    negative: str,
    device: torch.device,
) -> tuple[Conditioning, Conditioning]:
    """Make what a denoiser is told of a batch.

    Args:
        requests: One or more.
        config: The denoiser's.
        text: Embeds prompts; None for a denoiser without text.
        negative: Prompt that guidance leads away from; in the place of a class it leads away from the null class.
        device: Where to.

    Returns:
        The conditions of the requests, and as many of what guidance leads away from; numbers are the same in both.
    """
    told: dict[str, Any] = {}
    null: dict[str, Any] = {}
    if text is not None and config.text_dim is not None:
        for fields, prompts in ((told, [r.prompt for r in requests]), (null, [negative] * len(requests))):
            embedded, mask = text.encode(prompts)
            fields |= {"text": embedded.to(device), "text_mask": mask.to(device)}
    if config.num_classes is not None:
        numbers = [NULL_LABEL if request.label is None else request.label for request in requests]
        told["label"] = torch.tensor(numbers, device=device)
        null["label"] = torch.full_like(told["label"], NULL_LABEL)
    if config.scalars:
        fps = [0.0 if request.shape.num_frames == 1 else request.fps for request in requests]
        sizes = [(*(r.original or (r.shape.height, r.shape.width)), *r.crop) for r in requests]
        scalars = stack_scalars(config.scalars, torch.tensor(fps), torch.tensor(sizes, dtype=torch.float32))
        told["scalars"] = null["scalars"] = scalars.to(device)
    return Conditioning(**told), Conditioning(**null)


def parse_pair(text: str, separator: str, field: str) -> tuple[int, int]:
    """Read two whole numbers, such as 512x512 or 0,0.

    Args:
        text: What was given.
        separator: What stands between.
        field: Option it was given by, for messages.

    Returns:
        The numbers, 0 or more.

    Raises:
        ConfigError: If it is something else.
    """
    first, found, second = text.partition(separator)
    if not (found and first.strip().isdigit() and second.strip().isdigit()):
        raise ConfigError(f"{field}: got {text!r}, needed two numbers with {separator!r} between")
    return int(first), int(second)
