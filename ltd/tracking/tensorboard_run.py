"""TensorBoard event files of a run: the only module that imports torch.utils.tensorboard.

Rows have the names and steps of ``metrics.jsonl``. A resumed run writes a new file that tells TensorBoard to forget
what older ones hold from its first step on. Training must not stop because of it: the first failure is one warning.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ltd.config import ConfigError
from ltd.tracking.histogram import Histogram

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"
#: Media that event files hold; TensorBoard shows no video formats.
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def check_tensorboard() -> None:
    """Refuse ``tracking.tensorboard`` where the package is missing.

    Raises:
        ConfigError: Names the extra that brings it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.tensorboard: true needs the package tensorboard, which is not installed; "
            "pip install 'ltd[tensorboard]', or set it to false"
        )


class TensorboardRun:
    """The event files under ``RUN/tensorboard``.

    Args:
        run_dir: Run directory.
        start_step: First step that will be written; what older files hold from it on counts no more.
    """

    def __init__(self, run_dir: Path, *, start_step: int) -> None:
        self._writer: Any = None
        self._guard("start", lambda: self._start(run_dir / FOLDER, start_step))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers of one row, also those that are not finite; texts are left out."""
        self._guard("log", lambda: self._log(step, values))

    def log_media(self, step: int, name: str, files: Sequence[tuple[Path, str]]) -> None:
        """Write the pictures of one step, numbered where there are several; videos are left out."""
        self._guard("log media", lambda: self._log_media(step, name, files))

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Write histograms of one step."""
        self._guard("log histograms", lambda: self._log_histograms(step, histograms))

    def finish(self) -> None:
        """Write what is still held and close the file; later calls do nothing."""
        self._guard("finish", lambda: self._writer.close())
        self._writer = None

    def _guard(self, what: str, action: Callable[[], Any]) -> None:
        """Run an action; on any failure warn once and write nothing more."""
        if self._writer is None and what != "start":
            return
        try:
            action()
        except Exception as error:
            self._writer = None
            logger.warning(
                "tensorboard failed to %s (%s: %s); metrics go to metrics.jsonl only", what, type(error).__name__, error
            )

    def _start(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Nothing to forget where there is nothing yet.
        purge = start_step if folder.is_dir() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def _log_media(self, step: int, name: str, files: Sequence[tuple[Path, str]]) -> None:
        import numpy as np

        pictures = [path for path, _ in files if path.suffix.lower() in _PICTURES]
        for number, path in enumerate(pictures):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            tag = name if len(pictures) == 1 else f"{name}/{number}"
            self._writer.add_image(tag, pixels, step, dataformats="HWC")
        self._writer.flush()

    def _log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        for name, histogram in histograms.items():
            middles = [(low + high) / 2 for low, high in zip(histogram.edges, histogram.edges[1:], strict=False)]
            pairs = list(zip(middles, histogram.counts, strict=True))
            self._writer.add_histogram_raw(
                name,
                min=histogram.edges[0],
                max=histogram.edges[-1],
                num=sum(histogram.counts),
                sum=sum(middle * count for middle, count in pairs),
                sum_squares=sum(middle**2 * count for middle, count in pairs),
                bucket_limits=histogram.edges[1:],
                bucket_counts=histogram.counts,
                global_step=step,
            )
        self._writer.flush()
