"""Features of real clips for metrics while training: computed once by all processes, kept on disk by their hash.

A file is named by a hash of the data, the windows cut out of them, the network and its preprocessing, so runs that
measure alike share it. A file that is damaged, or is not what its name says, is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ltd.config import digest
from ltd.data.real_clips import RealClips
from ltd.data.write import write_bytes
from ltd.parallel.layout import Layout
from ltd.progress import Progress

logger = logging.getLogger(__name__)

_FORMAT = 1
_NUMBERS, _ABOUT = "numbers", "about"


class TooFewClipsError(Exception):
    """So few real clips can be read that there are no two sets of them."""


class Extractor(Protocol):
    """Outputs of one network."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain values that its outputs depend on."""
        ...

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """Map uint8 ``(b, t, h, w, 3)`` to ``(b, dim)`` on the CPU by name of the output."""
        ...


@dataclass(frozen=True)
class RealSet:
    """Outputs of a network for a set of real clips."""

    numbers: list[int]  #: Of the clips among all that were drawn, ascending.
    outputs: Mapping[str, Tensor]  #: ``(n, dim)`` by name.


@dataclass(frozen=True)
class RealFeatures:
    """Outputs of a network for two sets of real clips of equal size."""

    #: What clips are held against.
    reference: RealSet
    #: Real clips in the place of what is measured.
    floor: RealSet

    def describe_not_finite(self) -> str:
        """Say how many clips have features that are not finite, and the first of them; empty where none has."""
        broken: list[int] = []
        for part in (self.floor, self.reference):
            sound = torch.stack([rows.flatten(1).isfinite().all(1) for rows in part.outputs.values()]).all(0)
            broken += [number for number, fine in zip(part.numbers, sound.tolist(), strict=True) if not fine]
        total = len(self.floor.numbers) + len(self.reference.numbers)
        return (
            f"features of {len(broken)} of {total} real clips are not finite, first of clip {broken[0]}"
            if broken
            else ""
        )


class ReferenceFeatures:
    """Features of real clips, of a memory, a file, or the clips themselves.

    Args:
        clips: Windows; those behind the first ``2 n`` stand in for clips that cannot be read.
        num_samples: ``n``, clips in each of the two sets.
        directory: Folder of the files, which runs share.
        batch_size: Clips per batch and process.
        layout: Processes that share the work.
        moved: Called at every batch.
    """

    def __init__(
        self,
        clips: RealClips,
        num_samples: int,
        directory: Path,
        *,
        batch_size: int,
        layout: Layout,
        moved: Callable[[], None],
    ) -> None:
        self.clips, self.num_samples, self.directory = clips, num_samples, directory
        self.batch_size, self.layout, self.moved = batch_size, layout, moved
        #: Numbers of the clips of the reference, once ``get`` was called; the same on all processes.
        self.numbers: list[int] = []
        self._kept: list[RealFeatures] = []

    def get(self, extractors: Sequence[Extractor]) -> list[RealFeatures]:
        """Give the features of every network; called by all processes, always with the same networks.

        Args:
            extractors: The networks.

        Returns:
            One for each, on the main process; empty on the others.

        Raises:
            TooFewClipsError: If too few clips can be read; on all processes. The next call tries again.
        """
        if self.numbers:
            return self._kept
        found: list[dict[str, Tensor]] = [{} for _ in extractors]
        files: list[tuple[Path, dict[str, Any]]] = []
        if self.layout.is_main:
            files = [self._file(extractor) for extractor in extractors]
            found = [read_features(path, identity) or {} for path, identity in files]
        for _ in range(2):  # what was missing may turn out to be of other clips than the files
            missing = self.layout.broadcast_object(_missing(found))
            made = self._compute([extractors[number] for number in missing]) if missing else []
            for number, rows in zip(missing, made, strict=True) if self.layout.is_main else ():
                found[number] = rows
                path, identity = files[number]
                write_features(path, identity, rows)
        if self.layout.is_main:
            self._kept = [self._split(rows) for rows in found]
        self.numbers = self.layout.broadcast_object(self._kept[0].reference.numbers if self._kept else [])
        return self._kept

    def _file(self, extractor: Extractor) -> tuple[Path, dict[str, Any]]:
        identity = {"format": _FORMAT, "data": self.clips.digest, "batch_size": self.batch_size, **extractor.identity}
        return self.directory / f"{digest(identity)[:32]}.safetensors", identity

    def _compute(self, extractors: Sequence[Extractor]) -> list[dict[str, Tensor]]:
        """Run the networks over this process's share of the clips, and collect all shares."""
        layout, own = self.layout, []
        batches = self.clips.batches(
            batch_size=self.batch_size, global_rank=layout.global_rank, world_size=layout.world_size
        )
        with Progress(len(self.clips), "features of real clips", unit="clips", enabled=layout.is_main) as bar:
            for batch in batches:
                self.moved()
                kept = batch.weight > 0
                if kept.any():
                    assert batch.pixels is not None  # real clips are media
                    numbers = torch.tensor(batch.draws)[kept]
                    own.append((numbers, [extractor(batch.pixels[kept]) for extractor in extractors]))
                bar.update(min(len(kept) * layout.world_size, bar.total - bar.done))
        parts = [part for parts in layout.gather_objects(own) for part in parts]
        numbers = torch.cat([numbers for numbers, _ in parts]) if parts else torch.zeros(0, dtype=torch.int64)
        if len(numbers) < 2 * self.num_samples:
            raise TooFewClipsError(
                f"metrics.num_samples: of {len(self.clips)} real clips {len(numbers)} can be read, needed "
                f"{2 * self.num_samples}; lower metrics.num_samples or mend the data"
            )
        order = numbers.argsort()
        return [
            {
                _NUMBERS: numbers[order],
                **{
                    name: _plain(torch.cat([outputs[place][name] for _, outputs in parts])[order])
                    for name in parts[0][1][place]
                },
            }
            for place in range(len(extractors))
        ]

    def _split(self, rows: Mapping[str, Tensor]) -> RealFeatures:
        n = self.num_samples
        numbers, outputs = rows[_NUMBERS].tolist(), {name: x for name, x in rows.items() if name != _NUMBERS}
        reference, floor = (
            RealSet(numbers[part], {name: values[part] for name, values in outputs.items()})
            for part in (slice(n, 2 * n), slice(n))
        )
        return RealFeatures(reference, floor)


def _missing(found: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """List the networks whose features are to be computed: those without any, or all if they are not of the same clips.

    A clip that a slow disk gave at one time only is in one file and not in another.
    """
    numbers = {tuple(rows[_NUMBERS].tolist()) for rows in found if rows}
    return [place for place, rows in enumerate(found) if not rows or len(numbers) > 1]


def _plain(rows: Tensor) -> Tensor:
    """Keep float64, and make float32 of the rest."""
    return rows if rows.dtype == torch.float64 else rows.float()


def write_features(path: Path, identity: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
    """Write features, whole or not at all; a disk that takes nothing is a warning, as nothing is lost.

    Args:
        path: The file.
        identity: What they depend on.
        rows: Tensors by name.
    """
    about = json.dumps({"identity": dict(identity), "sha256": _hash(rows)}, sort_keys=True)
    whole = {name: values.contiguous() for name, values in rows.items()}
    try:
        write_bytes(path, safetensors.torch.save(whole, metadata={_ABOUT: about}))
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the next run computes its features anew", path, error)


def read_features(path: Path, identity: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Read features.

    Args:
        path: The file.
        identity: What they should depend on.

    Returns:
        Tensors by name; None, with a warning where there is a file, if they are to be computed.
    """
    if not path.is_file():
        return None
    problem = "is not what its name says"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        if about.get("identity") == dict(identity):
            if about.get("sha256") == _hash(rows):
                return rows
            problem = "is damaged (its checksum does not fit)"
    except (SafetensorError, OSError, ValueError) as error:
        problem = f"is damaged ({error})"
    logger.warning("%s %s: features of real clips are computed anew", path, problem)
    return None


def _hash(rows: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(rows):
        found.update(name.encode())
        found.update(rows[name].contiguous().numpy().tobytes())
    return found.hexdigest()
