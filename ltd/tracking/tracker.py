"""The one place a run's numbers go through: JSON lines always, others when asked, on the main process only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ltd.config import ConfigError
from ltd.tracking.code_version import code_version
from ltd.tracking.histogram import Histogram
from ltd.tracking.journal import Journal, plain, read_journal
from ltd.tracking.tensorboard_run import TensorboardRun, check_tensorboard
from ltd.tracking.wandb_run import WandbRun, resolve_mode

METRICS = "metrics.jsonl"
QUARANTINE = "quarantine.jsonl"
MEDIA = "media.jsonl"
HISTOGRAMS = "histograms.jsonl"
#: How a journal writes numbers that JSON lacks, and what they are.
NOT_FINITE = {text: float(text) for text in ("nan", "inf", "-inf")}


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go beside ``metrics.jsonl``, which is always written."""

    #: ``auto``: online with a W&B key, offline files for ``wandb sync`` without; ``disabled``: no W&B at all.
    wandb: Literal["auto", "online", "offline", "disabled"] = "disabled"
    #: W&B project.
    project: str = "ltd"
    #: W&B user or team; None is the key's default.
    entity: str | None = None
    #: W&B group, for runs that belong together.
    group: str | None = None
    #: W&B job type: what this run is within its group, such as ``trunk`` or ``cooldown``.
    job_type: str | None = None
    #: Name of the run; None is the run directory's name.
    name: str | None = None
    #: W&B tags.
    tags: tuple[str, ...] = ()
    #: Free text shown beside the run.
    notes: str | None = None
    #: Whether to write TensorBoard event files under ``RUN/tensorboard``.
    tensorboard: bool = False
    #: Steps between histograms of weights and of Adam's first moment; 0 is never.
    histograms_every: int = 0

    def __post_init__(self) -> None:
        if self.histograms_every < 0:
            raise ConfigError(f"histograms_every: must be at least 0, got {self.histograms_every}")


class Tracker:
    """Write a run's rows; on every process but the main one, do nothing.

    Args:
        run_dir: Run directory.
        config: Where rows go.
        is_main: Whether this process writes.
        run_config: The resolved configuration of the run, plain values.
        start_step: First step that will be logged; rows at or past it, left by a run that got further, are dropped.
        state: What ``state()`` gave when the checkpoint was saved; None for a new run. ``inherited_bad`` alone, counts
            by cause, is of a fork: the samples that failed before it began.

    Raises:
        ConfigError: If W&B or TensorBoard is asked for and its package is missing.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: TrackingConfig,
        *,
        is_main: bool,
        run_config: Mapping[str, Any],
        start_step: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.is_main = is_main
        self._last_step = start_step - 1
        self._inherited_bad: dict[str, int] = dict((state or {}).get("inherited_bad", {}))
        self._bad: Counter[str] = Counter(self._inherited_bad)
        self._wandb_id: str | None = (state or {}).get("wandb_id")
        self._wandb: WandbRun | None = None
        self._tensorboard: TensorboardRun | None = None
        if not is_main:
            return
        mode = resolve_mode(config.wandb)
        if config.tensorboard:
            check_tensorboard()
        self._metrics = Journal(self.run_dir / METRICS, start_step=start_step)
        self._quarantine = Journal(self.run_dir / QUARANTINE, start_step=start_step)
        self._media = Journal(self.run_dir / MEDIA, start_step=start_step)
        self._histograms: Journal | None = None
        if config.histograms_every or (self.run_dir / HISTOGRAMS).is_file():
            self._histograms = Journal(self.run_dir / HISTOGRAMS, start_step=start_step)
        described = {**plain(run_config), "code_version": code_version()}
        if config.tensorboard:
            self._tensorboard = TensorboardRun(self.run_dir, start_step=start_step, run_config=described)
        self._bad.update(str(row.get("cause", "unknown")) for row in read_journal(self.run_dir / QUARANTINE))
        if mode is not None:
            self._wandb = WandbRun(
                self.run_dir,
                mode=mode,
                settings=_wandb_settings(config, self.run_dir),
                run_config=described,
                run_id=self._wandb_id,
            )
            self._wandb_id = self._wandb.id

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the row of one step; counts of bad samples so far are added as ``data/bad`` and ``data/bad/CAUSE``.

        Args:
            step: Step, larger than every step logged before.
            values: Metric name to number or short string; 0-d tensors are read (a host sync each).

        Raises:
            ValueError: If the step was already logged: a step has exactly one row.
        """
        if not self.is_main:
            return
        if step <= self._last_step:
            raise ValueError(f"step {step} was logged after step {self._last_step}: a step has one row, in order")
        self._last_step = step
        counts = {f"data/bad/{cause}": count for cause, count in sorted(self._bad.items())}
        row = plain({**values, "data/bad": self._bad.total(), **counts})
        self._metrics.append(step, row)
        values = {name: NOT_FINITE.get(str(value), value) for name, value in row.items()}
        if self._wandb is not None:
            self._wandb.log(step, values)
        if self._tensorboard is not None:
            self._tensorboard.log(step, values)

    def quarantine(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """List samples that failed, one row each.

        Args:
            step: Step whose batch they were in.
            records: Plain values: ``key``, ``shard``, ``cause`` (a short word, counted), ``message``.
        """
        if not self.is_main:
            return
        for record in records:
            self._quarantine.append(step, record)
            self._bad[str(record.get("cause", "unknown"))] += 1

    def log_media(self, step: int, name: str, files: Sequence[tuple[str | Path, str]]) -> None:
        """Note sample files of one step for the report page, and send them to W&B.

        Args:
            step: Step they were made at.
            name: Metric name, such as ``samples/video``.
            files: (file, caption) pairs; files already written, best under the run directory.
        """
        if not self.is_main:
            return
        paths = [(Path(path), caption) for path, caption in files]
        for path, caption in paths:
            shown = path.relative_to(self.run_dir) if path.is_relative_to(self.run_dir) else path.resolve()
            self._media.append(step, {"name": name, "path": shown.as_posix(), "caption": caption})
        if self._wandb is not None:
            self._wandb.log_media(step, name, paths)
        if self._tensorboard is not None:
            self._tensorboard.log_media(step, name, paths)

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Write histograms of one step, one row each in ``histograms.jsonl``, without the empty bins at their ends.

        Args:
            step: Step they belong to.
            histograms: By metric name, such as ``histogram/master/decay``.
        """
        if not self.is_main or self._histograms is None:
            return
        trimmed = {name: histogram.trimmed() for name, histogram in histograms.items()}
        for name, histogram in trimmed.items():
            row = {"name": name, "edges": list(histogram.edges), "counts": list(histogram.counts)}
            self._histograms.append(step, row)
        if self._wandb is not None:
            self._wandb.log_histograms(step, trimmed)
        if self._tensorboard is not None:
            self._tensorboard.log_histograms(step, trimmed)

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps of the tracker: the W&B run's id, and counts of bad samples by cause."""
        counts = {"bad": dict(self._bad), "inherited_bad": self._inherited_bad}
        return {"wandb_id": self._wandb_id, **{name: found for name, found in counts.items() if found}}

    def finish(self) -> None:
        """Close the files and end the W&B run; finishing twice does nothing."""
        if not self.is_main:
            return
        for journal in (self._metrics, self._quarantine, self._media, self._histograms):
            if journal is not None:
                journal.close()
        if self._tensorboard is not None:
            self._tensorboard.finish()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_settings(config: TrackingConfig, run_dir: Path) -> dict[str, Any]:
    """Keyword arguments of ``wandb.init`` that the configuration decides."""
    return {
        "project": config.project,
        "entity": config.entity,
        "group": config.group,
        "job_type": config.job_type,
        "name": config.name or run_dir.resolve().name,
        "tags": list(config.tags),
        "notes": config.notes,
    }
