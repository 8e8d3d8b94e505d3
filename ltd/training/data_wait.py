"""How long training waits for its data: a share per step, and a warning that says what to raise."""

from __future__ import annotations

import logging
from collections import deque

from ltd.data import DataConfig

logger = logging.getLogger(__name__)

#: Share of the time above which waiting is worth a warning.
LIMIT = 0.05
_WINDOW = 50
_LEAST = 10
_AGAIN = 1000


class DataWait:
    """Watch the share of the last 50 steps that the slowest process spent waiting for data.

    Args:
        config: The data section, for the advice.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._steps: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._seen, self._silent_until = 0, 0

    def add(self, waits_s: list[float], step_s: float) -> dict[str, float]:
        """Note one step.

        Args:
            waits_s: Seconds each process waited for its batches.
            step_s: Seconds of the whole step.

        Returns:
            ``perf/data_wait_share`` of the last steps, and ``perf/data_wait_rank``, the slowest process of this one.
        """
        slowest = max(range(len(waits_s)), key=waits_s.__getitem__)
        self._steps.append((waits_s[slowest], step_s))
        self._seen += 1
        share = sum(wait for wait, _ in self._steps) / max(sum(step for _, step in self._steps), 1e-9)
        if share > LIMIT and len(self._steps) >= _LEAST and self._seen >= self._silent_until:
            self._silent_until = self._seen + _AGAIN
            logger.warning(
                "training waits for data %.0f %% of the time (the slowest process: %d); %s",
                100 * share,
                slowest,
                self._advice(),
            )
        return {"perf/data_wait_share": share, "perf/data_wait_rank": float(slowest)}

    def _advice(self) -> str:
        data = self.config
        if not data.num_workers:
            return "raise data.num_workers (0 loads a step only when it is asked for)"
        return (
            f"raise data.num_workers (now {data.num_workers}), data.prefetch (now {data.prefetch}) or data.prefetch_mb "
            f"(now {data.prefetch_mb}), or cache the latents (tools/cache_latents.py)"
        )
