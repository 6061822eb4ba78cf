"""Time series in bounded memory: sums in bins of equal width. When there are too many, pairs of bins are merged.

Telemetry keeps a series of calls, written in the lab thread, and the sampler one of training steps; `series_of` joins
them for a scene. Nothing is ever dropped, so the sum over all bins is what was counted since the start.
"""

# B: bins, K: columns

from __future__ import annotations

from array import array

import numpy as np

from labkit.errors import CAUSES
from labkit.view.scene import SERIES, Doubles, Series

FIRST_BIN_WIDTH = 0.5  # seconds; it doubles whenever bins are merged
MAX_BINS = 600  # an even number
SETTLING_TIME = 0.1  # seconds from a bin's end until it counts as complete: a writer may be a moment late

# Columns of the bins of calls, and of those of steps.
CALLS, ROWS, SECONDS, BYTES, STALENESS_SUM, STALENESS_COUNT, FAILED = range(7)  # FAILED and on: one for each of CAUSES
CALL_COLUMNS = FAILED + len(CAUSES)
LOSS_SUM, STEPS, SAMPLES, IN_FLIGHT_SUM, IN_FLIGHT_LOOKS = range(5)
STEP_COLUMNS = 5


class Bins:
    """Sums of `columns` quantities by time, since `started` (monotonic seconds).

    One thread writes. It calls `advance(at)` unless `at < until`, and then adds to `current[column]` itself, since a
    method call for each event would cost more than the additions. Other threads may read: completed bins are in an
    array that is replaced as a whole, never resized.
    """

    def __init__(self, columns: int, started: float) -> None:
        self.columns = columns
        self.started = started
        self.current = [0.0] * columns  # the bin that is being written
        self.until = started + FIRST_BIN_WIDTH  # its end
        # Width, all bins, the bin that is being written, and its number: replaced together.
        self._shared = (FIRST_BIN_WIDTH, array("d", bytes(8 * MAX_BINS * columns)), self.current, 0)

    def advance(self, at: float) -> None:
        """Make `current` the bin of the time `at`."""
        width, cells, current, number = self._shared
        # A new array, since a reader may be copying the old one.
        values = _add(np.frombuffer(cells).reshape(MAX_BINS, self.columns), number, current)
        while at >= self.started + MAX_BINS * width:
            values = np.concatenate([merge(values), np.zeros((MAX_BINS // 2, self.columns))])
            width *= 2
        number = min(MAX_BINS - 1, max(0, int((at - self.started) / width)))
        self.current = [0.0] * self.columns
        self._shared = (width, array("d", values.tobytes()), self.current, number)
        self.until = self.started + (number + 1) * width

    def read(self, now: float) -> tuple[float, Doubles]:
        """Returns the width of bins at the time `now`, and a copy of all bins, [MAX_BINS, K]."""
        width, cells, current, number = self._shared
        values = _add(np.frombuffer(cells).reshape(MAX_BINS, self.columns), number, current)
        while now >= self.started + MAX_BINS * width:  # nothing was written for a long time
            values = np.concatenate([merge(values), np.zeros((MAX_BINS // 2, self.columns))])
            width *= 2
        return width, values

    def total(self) -> Doubles:
        """Returns the sums since the start, [K]."""
        _, cells, current, number = self._shared
        total: Doubles = _add(np.frombuffer(cells).reshape(MAX_BINS, self.columns), number, current).sum(axis=0)
        return total


def _add(values: Doubles, number: int, current: list[float]) -> Doubles:
    """Returns a copy of the bins that includes the bin being written."""
    values = values.copy()
    values[number] += current
    return values


def merge(values: Doubles) -> Doubles:
    """Merge pairs of bins: [B, K] -> [B / 2, K]."""
    return values[0::2] + values[1::2]


def series_of(calls: Bins, steps: Bins, now: float) -> Series:
    """Join both for a scene: the bins that are complete at the time `now`."""
    # The later of the two decides the width, where one has got ahead of `now`.
    latest = max(now, calls.until - 1e-6, steps.until - 1e-6)
    width, call = calls.read(latest)
    _, step = steps.read(latest)
    complete = min(MAX_BINS, max(0, int((now - SETTLING_TIME - calls.started) / width)))
    call, step = call[:complete], step[:complete]
    values = np.empty((complete, len(SERIES)), dtype=np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is NaN: not known
        values[:, 0] = step[:, LOSS_SUM] / step[:, STEPS]
        values[:, 1] = step[:, SAMPLES] / width
        values[:, 2] = call[:, CALLS] / width
        values[:, 3] = call[:, BYTES] / width
        looked = step[:, IN_FLIGHT_LOOKS] > 0
        # In a bin without a look: calls/s × seconds per call (Little's law), of the calls that ended in it.
        values[:, 4] = np.where(looked, step[:, IN_FLIGHT_SUM] / step[:, IN_FLIGHT_LOOKS], call[:, SECONDS] / width)
        values[:, 5] = call[:, STALENESS_SUM] / call[:, STALENESS_COUNT]
    values[:, 6:] = call[:, FAILED:]
    return Series(width, 0, values)
