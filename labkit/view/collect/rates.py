"""Rates and means of the last seconds, computed by exponential decay from counters that only grow.

The `sampler` reads the counters whenever it makes a scene. Counts between two readings are taken as spread evenly over
that time, so the results do not depend on how often it reads. These are plain functions of arrays and the time.
"""

# N: rows, whose number only grows; K: columns

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.view.scene import Doubles

NEGLIGIBLE_COUNT = 1e-6  # a decayed count below this is 0


class Rates:
    """How fast counters [N, K] grow: their increments per second, weighted by exp(-age / tau).

    With `tau` = 2.5 seconds the mean age of what counts is that of a five-second window.
    """

    def __init__(self, columns: int, tau: float, started: float) -> None:
        self._tau = tau
        self._started = self._at = started
        self._last = self._sums = np.zeros((0, columns))

    def take(self, counters: Doubles, now: float) -> Doubles:
        """Read the counters and return their rates per second, [N, K]."""
        self._last, self._sums = pad_rows(self._last, len(counters)), pad_rows(self._sums, len(counters))
        passed = max(0.0, now - self._at) / self._tau
        decay = math.exp(-passed)
        self._sums *= decay
        self._sums += (counters - self._last) * ((1 - decay) / passed if passed > 1e-9 else 1.0)
        self._sums[self._sums < NEGLIGIBLE_COUNT] = 0.0
        self._last, self._at = counters, max(now, self._at)
        age = (self._at - self._started) / self._tau  # the weights of a short history sum to less than tau
        return self._sums / (self._tau * max(1 - math.exp(-age), 1e-3))


class RecentSums:
    """Decaying sums [N, K] of recent counts. A row decays only when it grows, so its last counts stay in sight."""

    def __init__(self, columns: int, tau: float) -> None:
        self._tau = tau
        self._last = np.zeros((0, columns))
        self._events = self._at = np.zeros(0)
        self.sums = np.zeros((0, columns))

    def take(self, counters: Doubles, events: Doubles, now: float) -> Doubles:
        """Read the counters and return the sums (not a copy). `events` [N] has grown in each row that has changed."""
        count = len(counters)
        self._last, self.sums = pad_rows(self._last, count), pad_rows(self.sums, count)
        self._events, self._at = pad_rows(self._events, count), pad_rows(self._at, count)
        (changed,) = (events != self._events).nonzero()
        if len(changed):
            decay = np.exp(np.minimum(self._at[changed] - now, 0.0) / self._tau)
            self.sums[changed] = self.sums[changed] * decay[:, None] + (counters[changed] - self._last[changed])
            self._at[changed] = now
        self._last, self._events = counters, events
        return self.sums


def pad_rows(values: npt.NDArray[Any], count: int, fill: float = 0) -> npt.NDArray[Any]:
    """Append rows of `fill` to an array until it has `count` rows."""
    if len(values) >= count:
        return values
    more = np.full((count - len(values), *values.shape[1:]), fill, dtype=values.dtype)
    return np.concatenate([values, more])


def ratio(above: Doubles, below: Doubles) -> Doubles:
    """Returns `above / below`, and NaN where `below` is 0: not known."""
    result: Doubles = np.full(np.shape(above), np.nan)
    np.divide(above, below, out=result, where=np.asarray(below) > 0)
    return result
