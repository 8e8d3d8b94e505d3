"""What a sampling job writes: a file per request, samples.jsonl, failed.jsonl, grid.png, and request.json beside them.

A file appears whole or not at all, so that it alone says that its sample is done, whichever process made it. Its name
is its request's number in the list of requests; rows and grid follow that order. Knows no process group.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltd import storage
from ltd.config import ConfigError
from ltd.data.batch import BadSampleError
from ltd.data.decode import decode_clip, decode_image, probe
from ltd.data.write import VideoEncoder, write_bytes, write_image, write_video
from ltd.inference.generate import Request
from ltd.inference.media import tile

_ROWS, _FAILED, _GRID, _MARKER = "samples.jsonl", "failed.jsonl", "grid.png", "request.json"


class SampleFolder:
    """Samples on disk, kept when the same job runs again.

    Args:
        out: The folder; ``begin`` makes it.
        requests: All that the job makes, in order.
        columns: What every row of samples.jsonl says besides its request.
    """

    def __init__(self, out: Path, requests: Sequence[Request], columns: Mapping[str, Any]) -> None:
        self.out, self.requests, self.columns = out, requests, dict(columns)
        self._seen: set[int] = set()
        self._counts: dict[int, int] = {}
        self._seen_at = -float("inf")

    def missing(self, identity: Mapping[str, str]) -> list[int]:
        """List what is to be made; changes nothing.

        Args:
            identity: All that the samples depend on; a folder that was begun with another one is to be made anew.

        Returns:
            Numbers of the missing samples.

        Raises:
            ConfigError: If the folder holds a file that a sample would replace and that no job wrote.
        """
        numbers = range(len(self.requests))
        before = self._before()
        if before != self._what(identity):
            taken = [self.name(number) for number in numbers if (self.out / self.name(number)).exists()]
            if taken and not before:
                raise ConfigError(f"--out: {self.out} holds {taken[0]}, which no job wrote; needed another folder")
            return list(numbers)
        return sorted(set(numbers) - self.look())

    def begin(self, identity: Mapping[str, str]) -> None:
        """Clear away what another job, or a writer that was killed, left; called by one process before any writes.

        Args:
            identity: All that the samples depend on.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        names = {self.name(number) for number in range(len(self.requests))}
        before, what = self._before(), self._what(identity)
        if before != what:
            self._discard(names, int(before.get("samples", 0)))
            storage.write_json(self.out / _MARKER, what)
        for path in self.out.glob("*.incomplete"):
            if ".".join(path.name.split(".")[:2]) in names | {_ROWS, _FAILED, _GRID}:
                path.unlink()

    @property
    def grid(self) -> Path:
        """The picture with a still of every sample."""
        return self.out / _GRID

    def name(self, number: int) -> str:
        """Name the file of a request."""
        return f"{number:04d}.{'png' if self.requests[number].shape.num_frames == 1 else 'mp4'}"

    def write(self, number: int, frames: np.ndarray) -> None:
        """Write one sample.

        Args:
            number: Of its request.
            frames: uint8 ``(t, h, w, 3)``.
        """
        request = self.requests[number]
        if request.shape.num_frames == 1:
            write_image(self.out / self.name(number), frames[0])
        else:
            write_video(self.out / self.name(number), frames, fps=request.fps)

    def open(self, number: int) -> VideoEncoder:
        """Begin the file of a video whose frames come one by one; ``close`` writes it."""
        request = self.requests[number]
        return VideoEncoder(height=request.shape.height, width=request.shape.width, fps=request.fps)

    def close(self, number: int, encoder: VideoEncoder) -> None:
        """Write the file of a video whose frames were added."""
        write_bytes(self.out / self.name(number), encoder.finish())

    def look(self, every_s: float = 0.0) -> set[int]:
        """Find out which samples there are, of all processes.

        Args:
            every_s: An answer that is younger is given again.

        Returns:
            Their numbers.
        """
        if time.monotonic() - self._seen_at > every_s:
            sizes = {path.name: path.stat().st_size for path in self.out.iterdir() if path.suffix in (".png", ".mp4")}
            self._seen = {number for number in range(len(self.requests)) if sizes.get(self.name(number))}
            self._seen_at = time.monotonic()
        return self._seen

    def write_rows(self) -> None:
        """List in samples.jsonl the samples that ``look`` saw last; one process calls it."""
        _write_rows(self.out / _ROWS, [self._row(number) for number in sorted(self._seen)])

    def finish(self, failures: Mapping[int, str]) -> dict[int, str]:
        """Write samples.jsonl and grid.png of the samples there are, and failed.jsonl if some are not.

        Args:
            failures: By number, why a sample is not there.

        Returns:
            Why each missing sample is missing, with those that nobody reported.
        """
        there = self.look()
        lost = "written by a process, but not in --out here; needed a folder that all hosts share"
        missing = [number for number in range(len(self.requests)) if number not in there]
        failed = {number: failures.get(number, lost) for number in missing}
        self.write_rows()
        if failed:
            _write_rows(self.out / _FAILED, [self._failed_row(number, why) for number, why in failed.items()])
        else:
            (self.out / _FAILED).unlink(missing_ok=True)
        if there:
            write_image(self.grid, tile(list(self._stills(sorted(there)))))
        else:
            self.grid.unlink(missing_ok=True)
        return failed

    def _what(self, identity: Mapping[str, str]) -> dict[str, str]:
        return {**identity, "samples": str(len(self.requests))}

    def _before(self) -> dict[str, str]:
        """Read what the folder was begun with."""
        marker = self.out / _MARKER
        if not marker.is_file():
            return {}
        try:
            before = dict(json.loads(marker.read_text("utf-8")))
            int(before.get("samples", 0))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{marker}: is damaged, so that nobody knows what made {self.out}: {error}; needed another folder, or "
                "remove this one"
            ) from None
        return before

    def _discard(self, names: set[str], count: int) -> None:
        """Delete what an earlier job of other arguments made here: ``count`` samples, as far as it got."""
        made = {f"{number:04d}.{suffix}" for number in range(count) for suffix in ("png", "mp4")}
        with contextlib.suppress(OSError, ValueError, KeyError):
            made |= {Path(json.loads(row)["file"]).name for row in (self.out / _ROWS).read_text("utf-8").splitlines()}
        for name in made | names | {_ROWS, _FAILED, _GRID}:
            (self.out / name).unlink(missing_ok=True)

    def _stills(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Read the middle frame of samples."""
        for number in numbers:
            data, num_frames = (self.out / self.name(number)).read_bytes(), self.requests[number].shape.num_frames
            with self._reading(number):
                still = (
                    decode_image(data) if num_frames == 1 else decode_clip(data, start=num_frames // 2, num_frames=1)
                )
            yield still[0]

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """Say which finished sample is damaged, and what to do."""
        try:
            yield
        except BadSampleError as error:
            path = self.out / self.name(number)
            raise ConfigError(f"{path}: is damaged: {error}; remove it, and the same command makes it anew") from None

    def _row(self, number: int) -> dict[str, Any]:
        request = self.requests[number]
        given = request.given
        return {
            "file": self.name(number),
            "prompt": request.prompt,
            **({} if request.label is None else {"label": request.label}),
            **({"class": request.class_name} if request.class_name else {}),
            "repetition": request.repetition,
            **self.columns,
            "num_frames": self._num_frames(number),
            "height": request.shape.height,
            "width": request.shape.width,
            "fps": request.fps,
            **({} if given is None else {"task": given.task, "condition": list(given.media)}),
        }

    def _num_frames(self, number: int) -> int:
        """Count the frames of a sample; those of a video of several segments are in its file."""
        path = self.out / self.name(number)
        if "segments" not in self.columns or not path.is_file():
            return self.requests[number].shape.num_frames
        if number not in self._counts:
            with self._reading(number):
                self._counts[number] = probe(path.read_bytes()).frames
        return self._counts[number]

    def _failed_row(self, number: int, why: str) -> dict[str, Any]:
        return {"number": number, **self._row(number), "error": why}


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
