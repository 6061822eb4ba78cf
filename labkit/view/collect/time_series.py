"""Time series in bounded memory: sums in bins of equal width. When there are too many, bins are merged by two.

Telemetry keeps one of calls, written in the lab thread; the sampler one of training steps; `series_of` joins the two.
Nothing is ever dropped, so the sum over all bins is what was counted since the start.
"""

# B: bins, K: columns

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from labkit.errors import CAUSES
from labkit.view.scene import SERIES, Series

WIDTH = 0.5  # seconds, of a bin at first
MOST = 600  # bins; even
SETTLED = 0.1  # seconds after its end that a bin counts as over: who writes may be a moment late

# Columns of the bins of calls, and of those of steps.
CALLS, ROWS, SECONDS, BYTES, STALENESS, STALENESSES, FAILED = range(7)  # FAILED and on: one for each of CAUSES
CALL_COLUMNS = FAILED + len(CAUSES)
LOSS, STEPS, SAMPLES, IN_FLIGHT, LOOKS = range(5)
STEP_COLUMNS = 5

Values = npt.NDArray[np.float64]


class Bins:
    """Sums of `columns` quantities by time, since `started` (monotonic seconds).

    One thread writes: it sees to it that `at < until`, or else calls `advance(at)`, and then adds to `current[column]`
    itself, since a call each would cost more than all the adding. Another may read: what is over is in an array that
    is replaced as a whole, never resized.
    """

    def __init__(self, columns: int, started: float) -> None:
        self.columns = columns
        self.started = started
        self.current = [0.0] * columns  # the bin that is being written
        self.until = started + WIDTH  # its end
        # Width, all bins, the one that is being written, and its number: replaced together.
        self._shared = (WIDTH, array("d", bytes(8 * MOST * columns)), self.current, 0)

    def advance(self, at: float) -> None:
        """Make `current` the bin of the time `at`."""
        width, cells, current, number = self._shared
        # A new array, since a reader may be copying the old one.
        values = _add(np.frombuffer(cells).reshape(MOST, self.columns), number, current)
        while at >= self.started + MOST * width:
            values = np.concatenate([merge(values), np.zeros((MOST // 2, self.columns))])
            width *= 2
        number = min(MOST - 1, max(0, int((at - self.started) / width)))
        self.current = [0.0] * self.columns
        self._shared = (width, array("d", values.tobytes()), self.current, number)
        self.until = self.started + (number + 1) * width

    def read(self, now: float) -> tuple[float, Values]:
        """The width that bins have at the time `now`, and a copy of all of them, [MOST, K]."""
        width, cells, current, number = self._shared
        values = _add(np.frombuffer(cells).reshape(MOST, self.columns), number, current)
        while now >= self.started + MOST * width:  # nothing has been written for long
            values = np.concatenate([merge(values), np.zeros((MOST // 2, self.columns))])
            width *= 2
        return width, values

    def total(self) -> Values:
        """What was counted since the start, [K]."""
        _, cells, current, number = self._shared
        total: Values = _add(np.frombuffer(cells).reshape(MOST, self.columns), number, current).sum(axis=0)
        return total


def _add(values: Values, number: int, current: list[float]) -> Values:
    """A copy of the bins, with the one that is being written."""
    values = values.copy()
    values[number] += current
    return values


def merge(values: Values) -> Values:
    """Each two bins into one: [B, K] -> [B / 2, K]."""
    return values[0::2] + values[1::2]


def series_of(calls: Bins, steps: Bins, now: float) -> Series:
    """Both, as a scene shows them: the bins that are over at the time `now`."""
    # The later bins make the width, where one of them has got ahead of `now`.
    latest = max(now, calls.until - 1e-6, steps.until - 1e-6)
    width, call = calls.read(latest)
    _, step = steps.read(latest)
    over = min(MOST, max(0, int((now - SETTLED - calls.started) / width)))
    call, step = call[:over], step[:over]
    values = np.empty((over, len(SERIES)), dtype=np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is NaN: nothing is known
        values[:, 0] = step[:, LOSS] / step[:, STEPS]
        values[:, 1] = step[:, SAMPLES] / width
        values[:, 2] = call[:, CALLS] / width
        values[:, 3] = call[:, BYTES] / width
        looked = step[:, LOOKS] > 0
        # Where nobody looked: calls/s × seconds a call (Little's law), of the calls that ended in that bin.
        values[:, 4] = np.where(looked, step[:, IN_FLIGHT] / step[:, LOOKS], call[:, SECONDS] / width)
        values[:, 5] = call[:, STALENESS] / call[:, STALENESSES]
    values[:, 6:] = call[:, FAILED:]
    return Series(width, 0, values)
