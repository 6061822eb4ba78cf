"""Logging: writes rows about a swarm and its training to a logger.

Scenes come from the swarm's view and steps from its events; `rows` makes rows of them, and the view's thread hands
these to one of `loggers`. Trainers never wait for a logger, and a logger that fails only ends its own logging.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from labkit.errors import SwarmClosed
from labkit.events import Emit, Event, ExpertNews, MetricsLogged, StepFinished
from labkit.forks import is_forked, this_process
from labkit.view.log.loggers import RichLogger
from labkit.view.log.rows import EventQueue, LoggedRow, MetricQueue, StepQueue, numbers_of, server_table, swarm_row
from labkit.view.picture.canvas import Picture
from labkit.view.scene import Scene

logger = logging.getLogger(__name__)

LOGGER_TIMEOUT = 2.0  # seconds that `stop` waits for a logger that is writing


class LoggedView(Protocol):
    """The part of a `SwarmView` that logging uses."""

    def scene(self) -> Scene: ...
    def add(self, show: Callable[[Scene], None], period: float) -> Callable[[], None]: ...
    def on_event(self, listener: Emit) -> Callable[[], None]: ...


class Logging:
    """Logs a swarm until `stop()` or until the swarm is closed: what `swarm.log_to` returns.

    Each training step is a row, `train/…`, and so is what was measured at one, `metrics/…`.
    Every `period` seconds there is a row about the swarm, `swarm/…`. Steps that come faster
    than the logger can write them are merged. For `WandbLogger` and `JsonlLogger` each
    expert that is taken over, handed over or given up, or could not be copied, is a row,
    `event/…`.

    Args:
        view: The swarm's view.
        logger: A `WandbLogger`, a `JsonlLogger`, or any object or module with `log(dict)` and
            `finish()`, which gets the numbers only.
        period: Seconds from one row about the swarm to the next.

    Raises:
        TypeError: The logger lacks `log` or `finish`.
        ValueError: `period` is not a finite number above 0.
    """

    def __init__(self, view: LoggedView, logger: Any, period: float = 1.0) -> None:
        missing = [name for name in ("log", "finish") if not callable(getattr(logger, name, None))]
        if missing:
            raise TypeError(
                f"a logger needs log(dict) and finish(), and {logger!r} has no {' and no '.join(missing)}; "
                "use WandbLogger(run), JsonlLogger(path), or anything that has both"
            )
        if not 0 < period < math.inf:
            raise ValueError(f"period={period!r}: seconds between two rows, more than 0")
        self._process = this_process()
        self._view = view
        self._logger = logger
        self._period = period
        self._picture_every = logger.picture_every if isinstance(logger, RichLogger) else math.inf
        self._pictured: float | None = None  # when the last pictures were logged, in a scene's seconds
        self._steps = StepQueue()
        self._metrics = MetricQueue()
        self._events = EventQueue()
        self._lock = threading.Lock()  # one row at a time
        self._stopping = False
        self._over = False
        self._remove: list[Callable[[], None]] = [view.on_event(self._on_event)]
        self._remove.append(view.add(self._show, period))
        if self._over:  # the logger failed at once, in the view's thread
            self._disconnect()

    @property
    def running(self) -> bool:
        """Whether rows are still being logged."""
        return not self._over

    def stop(self) -> None:
        """Log what is left and a last row, then call the logger's `finish`. Safe to call again."""
        if is_forked(self._process):
            raise SwarmClosed("this logging goes on in the process that this one was forked from, and not here")
        self._stopping = True
        self._disconnect()
        if not self._lock.acquire(timeout=LOGGER_TIMEOUT):
            logger.warning("%r is still at work, and finishes when it is done", self._logger)
            return
        try:
            if not self._over:
                self._write(self._view.scene())
                self._finish()
        finally:
            self._lock.release()

    def _on_event(self, event: Event) -> None:
        """Called in a trainer's thread."""
        if isinstance(event, StepFinished):
            self._steps.add(event)
        elif isinstance(event, MetricsLogged):
            self._metrics.add(event)
        elif isinstance(event, ExpertNews) and isinstance(self._logger, RichLogger):
            self._events.add(event)

    def _show(self, scene: Scene) -> None:
        """Called in the view's thread. The last scene of a swarm is not `open`."""
        with self._lock:
            if not self._over:
                self._write(scene)
            if not scene.open or self._stopping:
                self._finish()

    def _write(self, scene: Scene) -> None:
        try:
            self._write_steps()
            for event in self._events.take(time.monotonic() - scene.at):
                self._logger.log(event)
            row = swarm_row(scene) | self._pictures(scene)
            self._logger.log(row if isinstance(self._logger, RichLogger) else numbers_of(row))
        except Exception:
            logger.exception("%r failed; nothing more is logged to it", self._logger)
            self._end()

    def _write_steps(self) -> None:
        for row in self._steps.take():
            self._logger.log(row)
        for row in self._metrics.take():
            self._logger.log(row)

    def _pictures(self, scene: Scene) -> LoggedRow:
        """The heat map and the table of servers, if they are due: at first, every `picture_every` and at the end."""
        at = scene.at
        first = self._pictured is None
        if scene.headline.experts_alive == 0 and first:
            return {}  # nothing to show yet
        last = (self._stopping or not scene.open) and not first
        if math.isinf(self._picture_every) or not (first or last or at >= (self._pictured or 0) + self._picture_every):
            return {}
        self._pictured = at
        row: LoggedRow = {"swarm/servers_table": server_table(scene)}
        try:
            from labkit.view.picture.heat_map import draw_heat_map

            row["swarm/heat_map"] = Picture(draw_heat_map(scene))
        except ImportError:
            if first:
                logger.warning("no heat map is logged: matplotlib is not installed (pip install matplotlib)")
        return row

    def _finish(self) -> None:
        """Write the steps that came meanwhile, and end the logging."""
        if self._over:
            return
        try:
            self._write_steps()
        except Exception:
            logger.exception("%r failed; nothing more is logged to it", self._logger)
        self._end()

    def _end(self) -> None:
        self._over = True
        self._disconnect()
        try:
            self._logger.finish()
        except Exception:
            logger.exception("%r failed to finish", self._logger)

    def _disconnect(self) -> None:
        for remove in list(self._remove):
            remove()

    def __repr__(self) -> str:
        return (
            f"<logging to {self._logger!r}, {'every ' + format(self._period, 'g') + ' s' if self.running else 'over'}>"
        )
