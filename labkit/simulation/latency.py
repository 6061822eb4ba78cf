"""How long messages of a simulated network take, one way: what `SimNetwork(latency=…)` is given."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from numbers import Real

Latency = Callable[[random.Random, str, str], float]  # draws the seconds from one host to another


def constant(seconds: float) -> Latency:
    """Always the same. Raises `ValueError`."""
    check_seconds("latency", seconds)
    return lambda draw, source, target: seconds


def exponential(mean: float) -> Latency:
    """Drawn anew for each message, exponentially distributed with this `mean` in seconds. Raises `ValueError`."""
    check_seconds("latency", mean)
    return lambda draw, source, target: draw.expovariate(1.0) * mean


def gamma(mean: float, deviation: float) -> Latency:
    """Drawn anew for each message: a `mean` in seconds with this standard deviation, and never below zero. Raises
    `ValueError`."""
    check_seconds("latency", mean)
    check_seconds("deviation", deviation)
    if not mean or not deviation:
        return constant(mean)
    shape = (mean / deviation) ** 2
    return lambda draw, source, target: draw.gammavariate(shape, mean / shape)


def regions(between: Mapping[tuple[str, str], float], within: float = 0.0005) -> Latency:
    """That of places far apart: a node listens at `tcp://<region>:*`, and `between` says how many seconds lie between
    two regions, in either direction; `within`, how many between two nodes of one. Raises `ValueError`.

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
    """Whether it is one at all, numpy's among them."""
    return isinstance(value, Real)


def check_seconds(name: str, value: float) -> None:
    """Raises `ValueError`, which names the argument."""
    if not (is_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r}: a finite number of seconds, at least 0")
