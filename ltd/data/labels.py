"""Class labels: what the members of a sample say, names against a class list, and what a run with classes refuses.

A label is a number, a name, or both. Numbers come from the sample itself or, by name, from the class list
(``data.classes``); where samples have both, they tell the numbers of names that stand alone. Knows no models.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ltd.config import ConfigError
from ltd.data.entries import NO_LABEL, Entries

_MAX_LABEL = 2**31 - 1


def parse_label(value: object) -> tuple[int, str]:
    """Read a label as a number or a name.

    Args:
        value: An integer, or text; digits are a number.

    Returns:
        The number, -1 for none; the name, "" for none. (-1, "") for anything else.
    """
    if isinstance(value, str):
        text = value.strip()
        digits = text.removeprefix("-")
        if not digits.isascii() or not digits.isdigit():
            return NO_LABEL, text if text.isprintable() else ""
        value = int(text) if len(text) <= 10 else _MAX_LABEL + 1
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_LABEL:
        return NO_LABEL, ""
    return value, ""


def label_of_members(cls: bytes | None, about: bytes | None) -> tuple[int, str]:
    """Find the label of a sample: its ``cls`` member, or ``label`` and ``class`` of its ``json``.

    Args:
        cls: Bytes of the ``cls`` member; None for none.
        about: Bytes of the ``json`` member; None for none.

    Returns:
        As ``parse_label``. What is no label counts as none: other tools keep other things under these names.
    """
    try:
        if cls is not None:
            return parse_label(cls.decode("utf-8"))
        found = json.loads(about) if about is not None else {}
    except (ValueError, RecursionError):
        return NO_LABEL, ""
    if not isinstance(found, dict):
        return NO_LABEL, ""
    number, name = parse_label(found.get("label"))
    other = found.get("class")
    return number, other.strip() if isinstance(other, str) and other.isprintable() else name


def read_classes(given: str | Sequence[str] | None, field: str = "data.classes") -> tuple[str, ...] | None:
    """Read a class list: the n-th name is that of class n.

    Args:
        given: UTF-8 file with one name per line, or the names; None for none.
        field: Option it was given by, for messages.

    Returns:
        The names; None for none.

    Raises:
        ConfigError: If the file does not read, or a name is empty or there twice.
    """
    if given is None:
        return None
    names = tuple(given) if not isinstance(given, str) else _read_names(given, field)
    if not names or not all(name.strip() for name in names):
        raise ConfigError(f"{field}: got {len(names)} names, one of them empty or none at all; needed one per class")
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ConfigError(f"{field}: got {repeated[0]!r} twice, needed each name once")
    return names


def _read_names(path: str, field: str) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in Path(path).read_text("utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: {path} does not read: {error}; needed a text file, one name per line") from None


def unknown_class(name: str, known: Sequence[str]) -> str:
    """Say that a class is not in the list, and which one is nearest."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"got the class {name!r}, which is none of the {len(known)} known" + (
        f"; the nearest: {close[0]!r}" if close else ""
    )


def class_names(entries: Entries, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Name the classes of samples by number.

    Args:
        entries: The samples.
        classes: The class list, which has the last word; None takes what the samples say.

    Returns:
        A name per number, "" where none is known; () without any name.
    """
    if classes is not None:
        return tuple(classes)
    pairs = _pairs(entries)
    known = {number: entries.classes[name] for name, number in pairs.tolist()}
    return tuple(known.get(number, "") for number in range(max(known) + 1)) if known else ()


def _pairs(entries: Entries) -> np.ndarray:
    """List the distinct (name, number) of samples that have both."""
    label, name = entries.columns["label"], entries.columns["class_name"]
    both = (label >= 0) & (name >= 0)
    return np.unique(np.stack([name[both], label[both]], axis=1), axis=0)


def numbers_of(entries: Entries, classes: Sequence[str] | None) -> np.ndarray:
    """Give every sample the number of its class; refuses nothing.

    Args:
        entries: The samples.
        classes: The class list; None takes what the samples say.

    Returns:
        int64 ``(n,)``; -1 where a sample has no label, or a name whose number nothing tells.
    """
    label, name = entries.columns["label"].astype(np.int64), entries.columns["class_name"]
    if not entries.classes:
        return label
    by_name = np.full(len(entries.classes) + 1, NO_LABEL, dtype=np.int64)  # the last row: no name
    if classes is None:
        pairs = _pairs(entries)
        by_name[pairs[:, 0]] = pairs[:, 1]
    else:
        places = {text: number for number, text in enumerate(classes)}
        by_name[: len(entries.classes)] = [places.get(text, NO_LABEL) for text in entries.classes]
    return np.where(label >= 0, label, by_name[name])


def check_labels(
    entries: Entries, classes: Sequence[str] | None, num_classes: int, shard_of: Callable[[int], str]
) -> int:
    """Refuse samples whose labels a model with classes cannot take.

    Args:
        entries: The samples.
        classes: The class list; None takes what the samples say.
        num_classes: Classes of the model.
        shard_of: Names the file of a sample by its place.

    Returns:
        How many samples have no label: they train as the null class.

    Raises:
        ConfigError: If no sample has a label, a name is unknown, names and numbers disagree, or a number is too large.
    """

    def at(place: int) -> str:
        return f"sample {entries.keys[place]!r} of {shard_of(place)}"

    if classes is not None and len(classes) > num_classes:
        raise ConfigError(
            f"data.classes: got {len(classes)} names for model.num_classes = {num_classes}, needed at most as many"
        )
    label, name = entries.columns["label"], entries.columns["class_name"]
    numbers = numbers_of(entries, classes)
    nameless = np.flatnonzero((numbers < 0) & (name >= 0))
    if len(nameless):
        place, text = int(nameless[0]), entries.classes[name[nameless[0]]]
        if classes is None:
            raise ConfigError(
                f"data.classes: {at(place)} has the class {text!r} and no number; needed the class list, a file with "
                "one name per line"
            )
        raise ConfigError(f"data.classes: {unknown_class(text, classes)} ({at(place)})")
    if not (numbers >= 0).any():
        raise ConfigError(
            f"model.num_classes: got {num_classes}, but none of the {len(entries)} samples of {shard_of(0)} has a "
            "label; give them .cls members, or label in their .json, and index the tars again (python "
            "tools/make_shards.py --index-only TARS; a latent cache is made again), or set model.num_classes to null"
        )
    _check_agreement(entries, classes, label, name, at)
    too_large = np.flatnonzero(numbers >= num_classes)
    if len(too_large):
        place = int(too_large[0])
        raise ConfigError(
            f"model.num_classes: got {num_classes}, but {at(place)} has label {numbers[place]}; needed "
            f"{int(numbers.max()) + 1} or more"
        )
    return int((numbers < 0).sum())


def _check_agreement(
    entries: Entries,
    classes: Sequence[str] | None,
    label: np.ndarray,
    name: np.ndarray,
    at: Callable[[int], str],
) -> None:
    """Refuse a name that has two numbers, or another one than the class list says."""
    numbers: dict[int, int] = {}
    places = {} if classes is None else {text: number for number, text in enumerate(classes)}
    for which, number in _pairs(entries).tolist():
        text = entries.classes[which]
        expected = numbers.setdefault(which, number) if classes is None else places.get(text)
        if expected != number:
            place = int(np.flatnonzero((label == number) & (name == which))[0])
            if expected is None:
                raise ConfigError(f"data.classes: {unknown_class(text, classes or ())} ({at(place)})")
            source = "data.classes" if classes is not None else "another sample"
            raise ConfigError(
                f"data.classes: {at(place)} has label {number} and the class {text!r}, which is number {expected} by "
                f"{source}; needed one number per name"
            )
