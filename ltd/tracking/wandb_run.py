"""Weights & Biases behind four calls that never raise: the only module that imports wandb.

Training must not stop because a tracking service does: the first failure is one warning, and nothing more is sent.
"""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from ltd.config import ConfigError
from ltd.tracking.histogram import Histogram

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline"]
VIDEO_SUFFIXES = (".mp4", ".webm", ".gif")


def resolve_mode(wanted: Literal["auto", "online", "offline", "disabled"]) -> Mode | None:
    """Decide how W&B is used.

    Args:
        wanted: ``auto`` is online with a key (``WANDB_API_KEY`` or netrc) and offline without.

    Returns:
        The mode, or None where nothing is sent: ``disabled``, or ``auto`` without the package (with a warning).

    Raises:
        ConfigError: If W&B is asked for by mode and the package is missing.
    """
    if wanted == "disabled":
        return None
    if importlib.util.find_spec("wandb") is None:
        hint = "pip install 'ltd[train]', or set tracking.wandb=disabled"
        if wanted != "auto":
            raise ConfigError(f"tracking.wandb: {wanted!r} needs the package wandb, which is not installed; {hint}")
        logger.warning("wandb is not installed: metrics go to metrics.jsonl only (%s)", hint)
        return None
    if wanted == "auto":
        return "online" if has_key() else "offline"
    return wanted


def has_key() -> bool:
    """Look for a W&B key in the environment and in netrc, without asking anyone."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbRun:
    """One W&B run, kept over resumes by its id.

    Args:
        run_dir: Run directory; W&B writes under ``wandb/`` in it.
        mode: Whether to send now or write for ``wandb sync``.
        settings: Keyword arguments of ``wandb.init``: project, entity, group, name, tags, notes, job_type.
        run_config: The resolved configuration, plain values.
        run_id: Id of the run to go on with; None starts a new one.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: Mode,
        settings: Mapping[str, Any],
        run_config: Mapping[str, Any],
        run_id: str | None = None,
    ) -> None:
        self.id = run_id
        self._run: Any = None
        self._module: Any = None
        self._guard("start", lambda: self._start(run_dir, mode, settings, run_config))

    @property
    def active(self) -> bool:
        """Whether rows still reach W&B."""
        return self._run is not None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send one row; a step that W&B is known to have is left out, as steps only grow.

        Online that holds for a step that is run again after a resume; offline each start of a run knows its own rows.

        Args:
            step: Step of the row.
            values: Metrics by name.
        """
        if self._run is not None:
            self._guard("log", lambda: self._log(step, values))

    def log_media(self, step: int, name: str, files: Sequence[tuple[Path, str]]) -> None:
        """Send videos and pictures of one step.

        Args:
            step: Step they belong to.
            name: Metric name.
            files: (file, caption) pairs; mp4, webm, gif are videos, the rest pictures.
        """
        if self._run is not None:
            self._guard("log media", lambda: self._log_media(step, name, files))

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Send histograms of one step, by metric name."""
        if self._run is not None:
            self._guard("log histograms", lambda: self._log_histograms(step, histograms))

    def finish(self) -> None:
        """End the run; later calls do nothing."""
        if self._run is not None:
            self._guard("finish", lambda: self._run.finish())
            self._run = None

    def _guard(self, what: str, action: Callable[[], Any]) -> None:
        """Run an action; on any failure warn once and send nothing more."""
        try:
            action()
        except Exception as error:
            self._run = None
            logger.warning(
                "wandb failed to %s (%s: %s); metrics go to metrics.jsonl only", what, type(error).__name__, error
            )

    def _start(self, run_dir: Path, mode: Mode, settings: Mapping[str, Any], run_config: Mapping[str, Any]) -> None:
        import wandb

        self._module = wandb
        self._run = wandb.init(
            **settings,
            id=self.id,
            dir=str(run_dir),
            mode=mode,
            # Offline files of one id are joined by `wandb sync`; asking for a resume offline only makes W&B complain.
            resume="allow" if mode == "online" else None,
            config=dict(run_config),
            settings=wandb.Settings(silent=True, console="off", save_code=False, init_timeout=60.0),
        )
        self.id = self._run.id
        self._run.define_metric("*", step_metric="step")

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._run.step:
            self._run.log({"step": step, **values}, step=step)

    def _log_media(self, step: int, name: str, files: Sequence[tuple[Path, str]]) -> None:
        media = [
            self._module.Video(str(path), caption=caption, format=path.suffix[1:])
            if path.suffix in VIDEO_SUFFIXES
            else self._module.Image(str(path), caption=caption)
            for path, caption in files
        ]
        self._log(step, {name: media})

    def _log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        make = self._module.Histogram
        row = {name: make(np_histogram=(list(h.counts), list(h.edges))) for name, h in histograms.items()}
        self._log(step, row)
