"""The straight path between data and noise. Time is noise-at-1: t = 0 is data, t = 1 is noise."""

from __future__ import annotations

from torch import Tensor


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Give times ``(b,)`` the trailing dimensions that broadcast against ``like`` ``(b, ...)``."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


class LinearPath:
    """x_t = (1 - t) x0 + t eps, with velocity v = dx_t/dt = eps - x0.

    Reference: Lipman et al. (2022), arXiv 2210.02747, Eq. 22-23; Liu et al. (2022), arXiv 2209.03003, Eq. 1 (both with
    time the other way round).
    """

    def interpolate(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Mix data ``x0`` and noise ``eps``, both ``(b, ...)``, at times ``t`` ``(b,)``."""
        t = expand_time(t, x0)
        return (1 - t) * x0 + t * eps

    def velocity(self, x0: Tensor, eps: Tensor) -> Tensor:
        """Compute the velocity, the same at every time."""
        return eps - x0

    def data(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Recover ``x0 = x_t - t v``."""
        return x_t - expand_time(t, x_t) * v

    def noise(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Recover ``eps = x_t + (1 - t) v``."""
        return x_t + (1 - expand_time(t, x_t)) * v
