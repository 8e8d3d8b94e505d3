"""Arrays that are used again once nothing refers to them: fresh pages cost more than the copy that fills them."""

from __future__ import annotations

import sys
import threading

import numpy as np

#: References to a kept array that nobody uses: the list, the loop's name and getrefcount's argument.
_IDLE_REFERENCES = 3


class Buffers:
    """Hand out arrays to be filled; one whose every view and tensor is gone is handed out again.

    Args:
        max_bytes: Arrays beyond this are not kept.
    """

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self.max_bytes = max_bytes
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an array with any contents.

        Args:
            shape: Shape.
            dtype: Type.

        Returns:
            The array; whoever holds it, a view of it or a tensor on it keeps it from being used again.
        """
        with self._lock:
            for array in self._kept:
                if array.shape == shape and array.dtype == dtype and sys.getrefcount(array) == _IDLE_REFERENCES:
                    return array
            array = np.empty(shape, dtype)
            self._kept.append(array)
            self._trim()
            return array

    def _trim(self) -> None:
        """Forget the oldest arrays; those in use live on with their users."""
        total = sum(array.nbytes for array in self._kept)
        while total > self.max_bytes and self._kept:
            total -= self._kept.pop(0).nbytes
