"""Which code a run was trained by: the commit where it lies in a git repository, the package's version otherwise."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ltd import __version__


def find_commit() -> str | None:
    """Ask git for the commit of this code, with ``-dirty`` behind it where files differ; None outside a repository."""
    try:
        asked = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None


def code_version() -> str:
    """Say which code this is: ``commit 0123456789ab``, ``commit 0123456789ab-dirty``, or ``ltd 0.1.0``."""
    commit = find_commit()
    return f"ltd {__version__}" if commit is None else f"commit {commit}"
