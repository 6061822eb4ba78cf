"""Logging: rows of a swarm and its training on their way to a logger.

The last stop of what is seen: scenes come from the view of a swarm, steps from its events, `rows` makes rows of them,
and the view's thread hands those to one of `loggers`. Trainers never wait for a logger, and one that fails ends its
logging, not them.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any, Protocol

from labkit.events import Emit, Event, StepFinished
from labkit.view.log.loggers import RichLogger
from labkit.view.log.rows import Row, StepQueue, plain, server_table, swarm_row
from labkit.view.picture.canvas import Picture
from labkit.view.scene import Scene

logger = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds that `stop` waits for a logger that is at work


class View(Protocol):
    """What logging needs of a `SwarmView`."""

    def scene(self) -> Scene: ...
    def add(self, show: Callable[[Scene], None], period: float) -> Callable[[], None]: ...
    def on_event(self, listener: Emit) -> Callable[[], None]: ...


class Logging:
    """A swarm's rows on their way to a logger, from now until `stop()` or the swarm's end: what `swarm.log_to` returns.

    `logger`: a `WandbLogger`, a `JsonlLogger`, or any object or module with `log(dict)` and `finish()`, which gets the
    numbers. Each training step is a row, `train/…`; and every `period` seconds there is one of the swarm, `swarm/…`.
    Steps that come faster than they can be written are merged. Raises `TypeError`, `ValueError`.
    """

    def __init__(self, view: View, logger: Any, period: float = 1.0) -> None:
        missing = [name for name in ("log", "finish") if not callable(getattr(logger, name, None))]
        if missing:
            raise TypeError(
                f"a logger needs log(dict) and finish(), and {logger!r} has no {' and no '.join(missing)}; "
                "use WandbLogger(run), JsonlLogger(path), or anything that has both"
            )
        if not 0 < period < math.inf:
            raise ValueError(f"period={period!r}: seconds between two rows, more than 0")
        self._view = view
        self._logger = logger
        self._period = period
        self._picture_every = logger.picture_every if isinstance(logger, RichLogger) else math.inf
        self._pictured: float | None = None  # when, in a scene's seconds
        self._steps = StepQueue()
        self._lock = threading.Lock()  # one row at a time
        self._stopping = False
        self._over = False
        self._remove: list[Callable[[], None]] = [view.on_event(self._hear)]
        self._remove.append(view.add(self._show, period))
        if self._over:  # it failed at once, in the view's thread
            self._disconnect()

    @property
    def running(self) -> bool:
        """Whether it still logs."""
        return not self._over

    def stop(self) -> None:
        """Log what is left, and a last row of the swarm; then call the logger's `finish`. Safe to repeat."""
        self._stopping = True
        self._disconnect()
        if not self._lock.acquire(timeout=PATIENCE):
            logger.warning("%r is still at work, and finishes when it is done", self._logger)
            return
        try:
            if not self._over:
                self._write(self._view.scene())
                self._finish()
        finally:
            self._lock.release()

    def _hear(self, event: Event) -> None:
        """In the thread of a trainer."""
        if isinstance(event, StepFinished):
            self._steps.add(event)

    def _show(self, scene: Scene) -> None:
        """In the view's thread. The last scene of a swarm is not `open`."""
        with self._lock:
            if not self._over:
                self._write(scene)
            if not scene.open or self._stopping:
                self._finish()

    def _write(self, scene: Scene) -> None:
        try:
            self._write_steps()
            row = swarm_row(scene) | self._pictures(scene)
            self._logger.log(row if isinstance(self._logger, RichLogger) else plain(row))
        except Exception:
            logger.exception("%r failed; nothing more is logged to it", self._logger)
            self._end()

    def _write_steps(self) -> None:
        for row in self._steps.take():
            self._logger.log(row)

    def _pictures(self, scene: Scene) -> Row:
        """The heat map and the table of servers, when it is time for them and at the end."""
        at = scene.at
        first = self._pictured is None
        if scene.headline.experts_alive == 0 and first:
            return {}  # there is nothing to see yet
        last = (self._stopping or not scene.open) and not first
        if math.isinf(self._picture_every) or not (first or last or at >= (self._pictured or 0) + self._picture_every):
            return {}
        self._pictured = at
        row: Row = {"swarm/servers_table": server_table(scene)}
        try:
            from labkit.view.picture.heat_map import draw_heat_map

            row["swarm/heat_map"] = Picture(draw_heat_map(scene))
        except ImportError:
            if first:
                logger.warning("no heat map is logged: matplotlib is not installed (pip install matplotlib)")
        return row

    def _finish(self) -> None:
        """Steps that came meanwhile, and the logger's end."""
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
