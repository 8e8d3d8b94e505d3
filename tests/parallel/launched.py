"""Run a worker's checks on a few processes and read what they measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import launched


def launch(worker: str, processes: int, out: Path, *arguments: str) -> dict[str, Any]:
    """Run a module of ``tests.parallel`` that writes its results to ``out``, check by check."""
    launched.launch(f"tests.parallel.{worker}", str(out), *arguments, processes=processes)
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def get(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Take the results of one check, which must not have failed."""
    assert "error" not in results[name], results[name]["error"]
    found: dict[str, Any] = results[name]
    return found
