"""Which code a run was trained by: the commit where it lies in a git repository, the package's version otherwise."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ltd import __version__


def find_commit() -> str | None:
    """Ask git for the commit of this code, with ``-dirty`` behind it where files differ.

    None where git does not know this file: outside a repository, or installed below the folder of another project.
    """
    if _ask_git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _ask_git("describe", "--always", "--dirty", "--abbrev=12")


def _ask_git(*arguments: str) -> str | None:
    """Run git in the folder of this file; None where it fails or says nothing."""
    try:
        asked = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None if asked.returncode == 0 else None


def code_version() -> str:
    """Say which code this is: ``commit 0123456789ab``, ``commit 0123456789ab-dirty``, or ``ltd 0.1.0``."""
    commit = find_commit()
    return f"ltd {__version__}" if commit is None else f"commit {commit}"
