"""TensorBoard event files of a run: the only module that imports torch.utils.tensorboard.

Rows have the names and steps of ``metrics.jsonl``. A resumed run writes a new file that tells TensorBoard to forget
what older ones hold from its first step on. Training must not stop because of it: the first failure is one warning.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ltd.config import ConfigError
from ltd.data.decode import decode_clip, probe
from ltd.tracking.histogram import Histogram

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
#: TensorBoard shows no video formats: videos become animated pictures of at most so many frames and pixels a side.
_VIDEOS = (".mp4", ".webm")
_MAX_FRAMES, _MAX_SIDE = 48, 256


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
        run_config: The resolved configuration and the code's version, plain values; written as a text.
    """

    def __init__(self, run_dir: Path, *, start_step: int, run_config: Mapping[str, Any]) -> None:
        self._writer: Any = None
        self._guard("start", lambda: self._start(run_dir / FOLDER, start_step, run_config))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers of one row, also those that are not finite; texts are left out."""
        self._guard("log", lambda: self._log(step, values))

    def log_media(self, step: int, name: str, files: Sequence[tuple[Path, str]]) -> None:
        """Write the pictures and videos of one step, numbered where there are several; videos move, small."""
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

    def _start(self, folder: Path, start_step: int, run_config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Nothing to forget where there is nothing yet.
        purge = start_step if folder.is_dir() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        text = json.dumps(run_config, indent=1, ensure_ascii=False)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), start_step)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def _log_media(self, step: int, name: str, files: Sequence[tuple[Path, str]]) -> None:
        shown = [path for path, _ in files if path.suffix.lower() in _PICTURES + _VIDEOS]
        for number, path in enumerate(shown):
            tag = name if len(shown) == 1 else f"{name}/{number}"
            if path.suffix.lower() in _VIDEOS:
                self._add_encoded(tag, animate(path), step)
            else:
                with Image.open(path) as picture:
                    self._add_encoded(tag, _encode([picture.convert("RGB")], "PNG"), step)
        self._writer.flush()

    def _add_encoded(self, tag: str, picture: bytes, step: int) -> None:
        """Write a picture that is a file's bytes already; the writer's own calls take pixels, and no video."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        with Image.open(io.BytesIO(picture)) as opened:
            width, height = opened.size
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=picture)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

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


def animate(path: Path) -> bytes:
    """Turn a video into an animated GIF.

    Args:
        path: Video file.

    Returns:
        The GIF's bytes, shortened to every n-th frame and made smaller where the video is long or large.
    """
    data = path.read_bytes()
    info = probe(data)
    stride = math.ceil(info.frames / _MAX_FRAMES)
    frames = decode_clip(data, start=0, num_frames=math.ceil(info.frames / stride), stride=stride)
    scale = min(1.0, _MAX_SIDE / max(info.height, info.width))
    size = (max(1, round(info.width * scale)), max(1, round(info.height * scale)))
    pictures = [Image.fromarray(frame).resize(size) for frame in frames]
    return _encode(pictures, "GIF", duration=round(1000 * stride / (info.fps or 24.0)), loop=0)


def _encode(pictures: Sequence[Image.Image], kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    several = {"save_all": True, "append_images": pictures[1:]} if len(pictures) > 1 else {}
    pictures[0].save(out, format=kind, **several, **options)
    return out.getvalue()
