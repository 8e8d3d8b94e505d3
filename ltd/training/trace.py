"""A trace of one step: sketches of inputs, module outputs and gradients that do not depend on the layout, on disk.

A sketch holds a tensor's norm and 64 sums of its elements with fixed random signs (a count sketch): the distance of two
sketches estimates the distance of the tensors, within a tenth or so, wherever they differ.

Reference: Charikar, Chen and Farach-Colton (2002), Finding frequent items in data streams.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ltd import storage
from ltd.config import ConfigError
from ltd.rng import generator
from ltd.storage import StorageError
from ltd.storage.tensor_file import TensorFileWriter
from ltd.tracking.journal import plain

FORMAT = 1
#: Numbers of a sketch: norm of the finite elements, how many are not finite, signed sums.
WIDTH = 2 + 64

_SUMS = WIDTH - 2
_CHUNK = 1 << 20
_RECORD, _SKETCHES = "trace.json", "sketches.safetensors"

What = Literal["weight", "input", "output", "gradient"]
#: How a tensor was cut into samples: its tokens joined over the sequence group, its real text tokens, or as it is.
#: Where sizes leave it open which of them is right, a trace holds all.
Kind = Literal["tokens", "text", "whole"]


@dataclass(frozen=True)
class Entry:
    """Sketch of one tensor, of one sample where it belongs to one."""

    what: What
    name: str
    #: Slot of the sample in the run; None for weights and gradients.
    draw: int | None
    kind: Kind
    shape: tuple[int, ...]
    #: (WIDTH,), float64.
    values: Tensor


@dataclass(frozen=True)
class Sample:
    """One sample of the global batch."""

    draw: int
    key: str
    #: File or directory that it lies in.
    shard: str
    weight: float
    loss: float


@dataclass(frozen=True)
class Place:
    """Where the sketch of one tensor lies in a trace."""

    row: int
    shape: tuple[int, ...]


class Trace:
    """What happened in one step.

    Args:
        facts: Plain values: ``step``, ``layout``, ``config``, ``packages``, ``code``, ``grad_norm``, ...
        samples: The global batch by draw.
        entries: Sketches in causal order: weights before the step, inputs, outputs in the order of the forward pass,
            gradients in that of the backward pass.
    """

    def __init__(self, facts: dict[str, Any], samples: Iterable[Sample], entries: Iterable[Entry]) -> None:
        self.facts = facts
        self.samples = {sample.draw: sample for sample in sorted(samples, key=lambda sample: sample.draw)}
        kept = list(entries)
        #: (entries, WIDTH), float64.
        self.values = torch.stack([e.values for e in kept]) if kept else torch.zeros(0, WIDTH, dtype=torch.float64)
        #: Sketches of one tensor by draw and kind.
        self.places: dict[tuple[What, str], dict[int | None, dict[Kind, Place]]] = {}
        for row, entry in enumerate(kept):
            draws = self.places.setdefault((entry.what, entry.name), {})
            draws.setdefault(entry.draw, {})[entry.kind] = Place(row, entry.shape)

    def names(self, what: What) -> list[str]:
        """List the tensors of one category in causal order."""
        return [name for category, name in self.places if category == what]

    def write(self, directory: str | Path) -> None:
        """Write the trace as JSON and safetensors, whole or not at all.

        Args:
            directory: Folder to make; a trace that is there is replaced.
        """
        groups = [
            {
                "what": what,
                "name": name,
                "places": [[d, kind, p.row, p.shape] for d, kinds in draws.items() for kind, p in kinds.items()],
            }
            for (what, name), draws in self.places.items()
        ]
        samples = [vars(sample) for sample in self.samples.values()]
        record = {"format": FORMAT, "facts": self.facts, "samples": samples, "tensors": groups}
        Path(directory).resolve().parent.mkdir(parents=True, exist_ok=True)
        with storage.atomic_directory(directory) as incomplete:
            (incomplete / _RECORD).write_text(json.dumps(plain(record), ensure_ascii=False) + "\n", "utf-8")
            shapes = {"sketches": (self.values.dtype, tuple(self.values.shape))}
            with TensorFileWriter(incomplete / _SKETCHES, shapes) as writer:
                writer.write("sketches", self.values)

    @classmethod
    def read(cls, directory: str | Path) -> Trace:
        """Read a trace.

        Args:
            directory: Folder that ``write`` made.

        Returns:
            The trace.

        Raises:
            StorageError: If it is none, is damaged, or of another format.
        """
        directory = Path(directory)
        if not is_trace(directory):
            raise StorageError(f"{directory}: is no trace; needed a folder made by tools/replay.py --trace")
        try:
            record = json.loads((directory / _RECORD).read_bytes())
            if record["format"] != FORMAT:
                raise StorageError(f"{directory}: format {record['format']}, this version of ltd reads {FORMAT}")
            trace = cls(record["facts"], (_sample(row) for row in record["samples"]), ())
            trace.values = load_file(directory / _SKETCHES)["sketches"]
            for group in record["tensors"]:
                draws = trace.places.setdefault((group["what"], group["name"]), {})
                for draw, kind, row, shape in group["places"]:
                    draws.setdefault(draw, {})[kind] = Place(row, tuple(shape))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StorageError(f"{directory}: damaged ({error})") from error
        return trace


def is_trace(directory: str | Path) -> bool:
    """Say whether a folder holds a trace."""
    return (Path(directory) / _RECORD).is_file()


def check_target(directory: str | Path) -> None:
    """Refuse to write a trace over something else.

    Args:
        directory: Folder that a trace will be written to.

    Raises:
        ConfigError: If it exists and is no trace.
    """
    if Path(directory).exists() and not is_trace(directory):
        raise ConfigError(f"--trace: {directory} exists and is no trace; name another folder, or remove it")


def sketch(rows: Tensor) -> Tensor:
    """Sketch the rows of a tensor, each as a flat vector of its own.

    Args:
        rows: ``(b, ...)``, any dtype.

    Returns:
        ``(b, WIDTH)``, float64, on the device of the rows. Equal rows give equal sketches, also in another batch.
    """
    flat = rows.detach().reshape(len(rows), -1)
    return finish(sums(flat, 0, flat.shape[1]))


def sums(rows: Tensor, start: int, numel: int) -> Tensor:
    """Begin the sketches of vectors of which only a part is here; those of all parts add up.

    Args:
        rows: ``(b, n)``, elements ``[start, start + n)`` of each vector.
        start: First element.
        numel: Elements of a whole vector.

    Returns:
        ``(b, WIDTH)``, float64, to be summed over the parts and given to ``finish``.
    """
    size = min(_CHUNK, max(_SUMS, 1 << max(numel - 1, 0).bit_length()))
    order, signs = _pattern(size, rows.device)
    totals = torch.zeros(len(rows), WIDTH, dtype=torch.float64, device=rows.device)
    end = start + rows.shape[1]
    for number in range(start // size, -(-end // size)):
        first, last = max(start, number * size), min(end, (number + 1) * size)
        values = rows[:, first - start : last - start].double()
        finite = torch.isfinite(values)
        values = torch.where(finite, values, 0)
        totals[:, 0] += values.square().sum(1)
        totals[:, 1] += (~finite).sum(1)
        padded = torch.nn.functional.pad(values, (first - number * size, (number + 1) * size - last))
        dealt = (padded[:, order] * signs).view(len(rows), _SUMS, -1).sum(2)
        # Chunks share a pattern: turned and flipped, so that what lies alike in two of them does not add up.
        totals[:, 2:] += dealt.roll(29 * number % _SUMS, 1) * (1 - 2 * (number.bit_count() % 2))
    return totals


def finish(totals: Tensor) -> Tensor:
    """Turn what ``sums`` gave, summed over all parts, into sketches."""
    return torch.cat([totals[:, :1].sqrt(), totals[:, 1:]], 1)


def distances(a: Tensor, b: Tensor, *, floor: float = 0.0) -> list[float]:
    """Estimate how far apart the sketched tensors are.

    Args:
        a: Sketches ``(k, WIDTH)``.
        b: Like ``a``.
        floor: Norm below which a tensor counts as small: distances are in shares of it then.

    Returns:
        Per row the norm of the difference in shares of the larger norm; infinite where one has more elements that are
        not finite.
    """
    gap = torch.maximum((a[:, 2:] - b[:, 2:]).norm(dim=1), (a[:, 0] - b[:, 0]).abs())
    scale = torch.maximum(a[:, 0], b[:, 0]).clamp(min=floor)
    shares = torch.where(gap > 0, gap / scale, 0.0)
    return torch.where(a[:, 1] == b[:, 1], shares, math.inf).tolist()


@functools.lru_cache(maxsize=64)
def _pattern(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw in which order the elements of a chunk are dealt to the sums, and their signs."""
    random = generator(0, "sketch", size)
    order = torch.randperm(size, generator=random)
    signs = torch.randint(0, 2, (size,), generator=random).double() * 2 - 1
    return order.to(device), signs.to(device)


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(int(row["draw"]), row["key"], row["shard"], float(row["weight"]), float(row["loss"]))
