"""Lately: rates and means of the last seconds, from counters that only grow, by exponential decay.

The `sampler` looks at the counters whenever a scene is made. What was counted between two looks is taken as spread
evenly over that time, so the numbers do not depend on how often it looks. Plain arrays, the time passed in.
"""

# N: rows, which only become more; K: columns

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

NEGLIGIBLE = 1e-6  # events that are left of what was: none


class Rates:
    """How fast counters [N, K] grow: their increments, weighted by exp(-age / tau), per second.

    With `tau` = 2.5 the mean age is that of a window of five seconds.
    """

    def __init__(self, columns: int, tau: float, started: float) -> None:
        self._tau = tau
        self._started = self._at = started
        self._last = self._sums = np.zeros((0, columns))

    def take(self, counters: Values, now: float) -> Values:
        """Look at the counters. Returns the rates, per second, [N, K]."""
        self._last, self._sums = longer(self._last, len(counters)), longer(self._sums, len(counters))
        passed = max(0.0, now - self._at) / self._tau
        decay = math.exp(-passed)
        self._sums *= decay
        self._sums += (counters - self._last) * ((1 - decay) / passed if passed > 1e-9 else 1.0)
        self._sums[self._sums < NEGLIGIBLE] = 0.0
        self._last, self._at = counters, max(now, self._at)
        age = (self._at - self._started) / self._tau  # at first there is less to be weighted
        return self._sums / (self._tau * max(1 - math.exp(-age), 1e-3))


class RecentSums:
    """Sums [N, K] of the last of what was counted. A row decays only while it grows, so the last ones stay in sight."""

    def __init__(self, columns: int, tau: float) -> None:
        self._tau = tau
        self._last = np.zeros((0, columns))
        self._events = self._at = np.zeros(0)
        self.sums = np.zeros((0, columns))

    def take(self, counters: Values, events: Values, now: float) -> Values:
        """Look at the counters; `events` [N] has grown where they have. Returns the sums; not a copy."""
        count = len(counters)
        self._last, self.sums = longer(self._last, count), longer(self.sums, count)
        self._events, self._at = longer(self._events, count), longer(self._at, count)
        (changed,) = (events != self._events).nonzero()
        if len(changed):
            decay = np.exp(np.minimum(self._at[changed] - now, 0.0) / self._tau)
            self.sums[changed] = self.sums[changed] * decay[:, None] + (counters[changed] - self._last[changed])
            self._at[changed] = now
        self._last, self._events = counters, events
        return self.sums


def longer(values: npt.NDArray[Any], count: int, fill: float = 0) -> npt.NDArray[Any]:
    """The same with rows added at its end, so that it has `count`."""
    if len(values) >= count:
        return values
    more = np.full((count - len(values), *values.shape[1:]), fill, dtype=values.dtype)
    return np.concatenate([values, more])


def ratio(above: Values, below: Values) -> Values:
    """`above / below`; NaN where that is 0: nothing is known."""
    result: Values = np.full(np.shape(above), np.nan)
    np.divide(above, below, out=result, where=np.asarray(below) > 0)
    return result
