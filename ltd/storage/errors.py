"""What is raised when something on disk cannot be read or written."""

from __future__ import annotations


class StorageError(ValueError):
    """A checkpoint or exported folder that cannot be read or written; says which file, what was found and needed."""


class StorageWriteError(OSError):
    """A file that could not be written; says which, the bytes it needed, the bytes free and why."""
