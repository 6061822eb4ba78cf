"""Distributions of one-way latencies, for `SimNetwork(latency=…)`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from numbers import Real

Latency = Callable[[random.Random, str, str], float]  # (random, source host, target host) -> seconds


def constant(seconds: float) -> Latency:
    """Always this many seconds. Raises `ValueError`."""
    check_seconds("latency", seconds)
    return lambda draw, source, target: seconds


def exponential(mean: float) -> Latency:
    """Drawn anew for each message, exponentially distributed with this `mean` in seconds. Raises `ValueError`."""
    check_seconds("latency", mean)
    return lambda draw, source, target: draw.expovariate(1.0) * mean


def gamma(mean: float, deviation: float) -> Latency:
    """Drawn anew for each message, gamma-distributed, so never below zero. Raises `ValueError`.

    Args:
        mean: Seconds.
        deviation: The standard deviation, seconds.
    """
    check_seconds("latency", mean)
    check_seconds("deviation", deviation)
    if not mean or not deviation:
        return constant(mean)
    shape = (mean / deviation) ** 2
    return lambda draw, source, target: draw.gammavariate(shape, mean / shape)


def regions(between: Mapping[tuple[str, str], float], within: float = 0.0005) -> Latency:
    """Fixed latencies between regions. A node of a region listens at `tcp://<region>:*`. Raises `ValueError`.

    Args:
        between: Seconds between two regions, in either direction.
        within: Seconds between two nodes of the same region.

    Example:
        regions({("eu", "us"): 0.045, ("us", "asia"): 0.045, ("eu", "asia"): 0.045})
    """
    check_seconds("latency", within)
    table: dict[tuple[str, str], float] = {}
    for pair, seconds in between.items():
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise ValueError(f"between: {pair!r} is not two regions, as in {{('eu', 'us'): 0.045}}")
        check_seconds("latency", seconds)
        one, other = pair
        if one == other:
            raise ValueError(f"between: {pair!r} is one region; `within` says how far apart two nodes of one are")
        table[one, other] = table[other, one] = seconds

    def draw_between(draw: random.Random, source: str, target: str) -> float:
        if source == target:
            return within
        try:
            return table[source, target]
        except KeyError:
            raise ValueError(f"latency: nothing is said of the way between {source} and {target}") from None

    return draw_between


def is_number(value: object) -> bool:
    """Whether this is a real number, one of NumPy included."""
    return isinstance(value, Real)


def check_seconds(name: str, value: float) -> None:
    """Raise `ValueError` that names the argument, unless `value` is a finite number, at least 0."""
    if not (is_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r}: a finite number of seconds, at least 0")
