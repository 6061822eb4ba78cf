"""Learning curves: what was measured while training, by name, in bounded memory. The `sampler` feeds them."""

from __future__ import annotations

import logging
import math
from collections import deque

import numpy as np

from labkit.events import MetricsLogged
from labkit.view.scene import Curve

logger = logging.getLogger(__name__)

MAX_CURVES = 24
MAX_POINTS = 240  # of a curve; an even number
MAX_NAME = 60  # characters


class Curves:
    """At most `MAX_CURVES` curves of at most `MAX_POINTS` points. `started`: when their time begins, monotonic.

    Used in one thread at a time. Further names are not shown, which is logged once.
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._points: dict[str, list[tuple[float, int, float]]] = {}  # at, step, value
        self._versions: dict[str, int] = {}
        self._made: dict[str, Curve] = {}  # those that have not changed since they were last read
        self._full = False

    def take(self, events: deque[MetricsLogged]) -> None:
        """Add the points of all waiting events, and remove these."""
        while events:
            event = events.popleft()
            for name, value in event.metrics.items():
                self._add(name[:MAX_NAME], event.at - self._started, event.step, value)

    def _add(self, name: str, at: float, step: int, value: float) -> None:
        points = self._points.get(name)
        if points is None:
            if len(self._points) >= MAX_CURVES:
                if not self._full:
                    logger.warning("%d learning curves are shown; %r and further ones are not", MAX_CURVES, name)
                self._full = True
                return
            points = self._points[name] = []
            self._versions[name] = 0
        if len(points) >= MAX_POINTS:
            points[:] = [_mean(a, b) for a, b in zip(points[::2], points[1::2], strict=True)]
            self._versions[name] += 1
        points.append((at, step, value if math.isfinite(value) else math.nan))
        self._made.pop(name, None)

    def read(self) -> tuple[Curve, ...]:
        """Returns all curves as they are now, in the order of their first points."""
        for name, points in self._points.items():
            if name not in self._made:
                at, step, value = zip(*points, strict=True)
                self._made[name] = Curve(
                    name, self._versions[name], np.array(at), np.array(step, dtype=np.int64), np.array(value)
                )
        return tuple(self._made[name] for name in self._points)


def _mean(a: tuple[float, int, float], b: tuple[float, int, float]) -> tuple[float, int, float]:
    """Returns one point in place of two: at the later one, with the mean of what is known."""
    known = [value for value in (a[2], b[2]) if not math.isnan(value)]
    return b[0], b[1], sum(known) / len(known) if known else math.nan
