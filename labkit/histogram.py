"""Histograms of durations: fixed logarithmic buckets, so that any two can be added and subtracted. Numbers, no I/O.

Servers keep them of what their requests took, telemetry of what the calls took; the sampler reads percentiles from
differences of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

import numpy as np
import numpy.typing as npt

PER_OCTAVE = 4
LOWEST = 1e-5  # seconds: bucket 0 is for what is shorter, and for what is no number
BUCKETS = 100
HIGHEST = LOWEST * 2 ** ((BUCKETS - 2) / PER_OCTAVE)  # 237 seconds: the last bucket is for what is longer
RELATIVE_ERROR = 2 ** (0.5 / PER_OCTAVE) - 1  # 9.1 %, of a percentile between LOWEST and HIGHEST

# What a bucket is read as: its geometric middle.
MIDDLES: npt.NDArray[np.float64] = LOWEST * 2 ** ((np.arange(BUCKETS) - 0.5) / PER_OCTAVE)  # [BUCKETS], seconds

_FIRST = 1 - PER_OCTAVE * log2(LOWEST)


def bucket(seconds: float) -> int:
    """The bucket of a duration: 0 to BUCKETS - 1, for any float."""
    if not seconds > LOWEST:
        return 0
    return int(PER_OCTAVE * log2(seconds) + _FIRST) if seconds < HIGHEST else BUCKETS - 1


def percentiles(counts: npt.NDArray[Any], shares: Sequence[float] = (50, 95, 99)) -> npt.NDArray[np.float32]:
    """Counts [..., BUCKETS], whole or weighted -> [..., len(shares)] in milliseconds; NaN where nothing was counted.

    Each is off by RELATIVE_ERROR at most, for durations between LOWEST and HIGHEST.
    """
    below = np.cumsum(counts, axis=-1)  # [..., BUCKETS]
    total = below[..., -1]
    result = np.empty((*total.shape, len(shares)), dtype=np.float32)
    for number, share in enumerate(shares):
        # A little less, since weights are rounded: the rank of all counts must be in the last bucket that has some.
        rank = total * (share / 100 * (1 - 1e-9))
        index = (below < rank[..., None]).sum(axis=-1)
        result[..., number] = 1000 * MIDDLES[np.minimum(index, BUCKETS - 1)]
    result[~(total > 0)] = np.nan
    return result


class Histogram:
    """How often durations fell into each bucket."""

    __slots__ = ("counts",)

    def __init__(self, counts: Sequence[int] | None = None) -> None:
        self.counts = [0] * BUCKETS if counts is None else list(counts)
        if len(self.counts) != BUCKETS:
            raise ValueError(f"a histogram has {BUCKETS} buckets, not {len(self.counts)}")

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bucket(seconds)] += 1

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram([mine + its for mine, its in zip(self.counts, other.counts, strict=True)])

    def __sub__(self, earlier: Histogram) -> Histogram:
        """What has been counted since `earlier`, an older state of the same histogram."""
        return Histogram([mine - its for mine, its in zip(self.counts, earlier.counts, strict=True)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and self.counts == other.counts

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        """How many durations were counted."""
        return sum(self.counts)

    def percentiles(self, shares: Sequence[float] = (50, 95, 99)) -> tuple[float, ...]:
        """In milliseconds; see `percentiles`."""
        return tuple(percentiles(np.array(self.counts), shares).tolist())
