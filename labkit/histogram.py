"""Histograms of durations, with fixed logarithmic buckets, so that any two can be added and subtracted. No I/O.

Servers keep one of the times of their requests, telemetry keeps them of the times of calls. The view reads percentiles
from differences of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

import numpy as np
import numpy.typing as npt

BUCKETS_PER_OCTAVE = 4
BUCKETS = 100
SHORTEST = 1e-5  # seconds: bucket 0 is for all that is shorter, and for what is no number
LONGEST = SHORTEST * 2 ** ((BUCKETS - 2) / BUCKETS_PER_OCTAVE)  # 237 seconds: the last bucket is for all that is longer
RELATIVE_ERROR = 2 ** (0.5 / BUCKETS_PER_OCTAVE) - 1  # 9.1 %, of percentiles between SHORTEST and LONGEST

# The value that a bucket stands for: its geometric middle.
_OCTAVES = (np.arange(BUCKETS) - 0.5) / BUCKETS_PER_OCTAVE  # above SHORTEST
BUCKET_MIDDLES: npt.NDArray[np.float64] = SHORTEST * 2**_OCTAVES  # [BUCKETS], seconds

_OFFSET = 1 - BUCKETS_PER_OCTAVE * log2(SHORTEST)


def bucket(seconds: float) -> int:
    """Returns the bucket of a duration: 0 to BUCKETS - 1, for any float."""
    if not seconds > SHORTEST:
        return 0
    return int(BUCKETS_PER_OCTAVE * log2(seconds) + _OFFSET) if seconds < LONGEST else BUCKETS - 1


def percentiles(counts: npt.NDArray[Any], shares: Sequence[float] = (50, 95, 99)) -> npt.NDArray[np.float32]:
    """Compute percentiles of histograms. Each is off by RELATIVE_ERROR at most, between SHORTEST and LONGEST.

    Args:
        counts: [..., BUCKETS], whole or weighted.
        shares: Which percentiles, 0 to 100.

    Returns:
        [..., len(shares)] in milliseconds; NaN where nothing was counted.
    """
    below = np.cumsum(counts, axis=-1)  # [..., BUCKETS]
    total = below[..., -1]
    result = np.empty((*total.shape, len(shares)), dtype=np.float32)
    for number, share in enumerate(shares):
        # A little less, since weights are rounded: the rank of 100 % has to be in the last bucket that is not empty.
        rank = total * (share / 100 * (1 - 1e-9))
        index = (below < rank[..., None]).sum(axis=-1)
        result[..., number] = 1000 * BUCKET_MIDDLES[np.minimum(index, BUCKETS - 1)]
    result[~(total > 0)] = np.nan
    return result


class Histogram:
    """Counts how many durations fell into each bucket.

    Args:
        counts: How many so far, one number a bucket; by default none.
    """

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
        """Returns what was counted since `earlier`, an older state of the same histogram."""
        return Histogram([mine - its for mine, its in zip(self.counts, earlier.counts, strict=True)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and self.counts == other.counts

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        """Returns how many durations were counted."""
        return sum(self.counts)

    def percentiles(self, shares: Sequence[float] = (50, 95, 99)) -> tuple[float, ...]:
        """Returns percentiles in milliseconds; see the function `percentiles`."""
        return tuple(percentiles(np.array(self.counts), shares).tolist())
