"""Turns: who may begin a step, and who tells the caller's functions of the steps that were done.

Trainers ask here before each step, so a run can be paused between two of them; and after each step they report here.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from labkit.errors import LabkitError

T = TypeVar("T")

LOOK_INTERVAL = 0.1  # seconds between two looks at what no notice is given of


class Turns(Generic[T]):
    """The trainers' turns.

    Reports are told one at a time, in the order in which they were added, by a trainer that has just made a step: with
    a single trainer before its next step, so that it never runs ahead of them. Many trainers wait where too many
    reports are untold.

    Args:
        tell: Called with each report. What it raises is raised by `report`.
        most: So many reports may wait while others go on.
    """

    def __init__(self, tell: Callable[[T], None], most: int) -> None:
        self.may_be_long = False  # set by `tell` for as long as trainers need not wait for it
        self._tell = tell
        self._most = most
        self._changed = threading.Condition()
        self._steps = 0  # going on
        self._pauses = 0
        self._reports: deque[T] = deque()
        self._reporter: threading.Thread | None = None

    def begin(self, stopped: Callable[[], bool]) -> None:
        """Begin a step, when there is no pause; `end` follows. Returns at once where the run is `stopped`."""
        with self._changed:
            while self._pauses and not stopped():
                self._changed.wait(LOOK_INTERVAL)
            self._steps += 1

    def add(self, report: T) -> None:
        """Let a report be told after all that were added before. Whoever numbers reports adds them in that order."""
        with self._changed:
            self._reports.append(report)

    def end(self) -> None:
        """End a step."""
        with self._changed:
            self._steps -= 1
            self._changed.notify_all()

    def report(self) -> None:
        """Tell what has not been told, or leave it to the trainer who is at it."""
        with self._changed:
            while self._reporter is not None and len(self._reports) > self._most and not self.may_be_long:
                self._changed.wait(LOOK_INTERVAL)
            if self._reporter is not None:
                return
            self._reporter = threading.current_thread()
        try:
            while (report := self._next()) is not None:
                self._tell(report)
        except BaseException:
            with self._changed:
                self._reports.clear()
                self._reporter = None
                self._changed.notify_all()
            raise

    def _next(self) -> T | None:
        with self._changed:
            self._changed.notify_all()
            if self._reports:
                return self._reports.popleft()
            self._reporter = None
            return None

    @contextmanager
    def paused(self, timeout: float) -> Iterator[None]:
        """In this block nobody is in the middle of a step, and all reports but the one that calls this are told.

        Raises:
            LabkitError: It took longer than `timeout` seconds until the steps that had begun were done.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            self._pauses += 1
        try:
            with self._changed:
                while self._busy():
                    if (left := deadline - time.monotonic()) <= 0:
                        raise LabkitError(
                            f"the run could not pause: after {timeout:.0f} s steps or validations are still under way"
                        )
                    self._changed.wait(min(left, LOOK_INTERVAL))
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

    def _busy(self) -> bool:
        if self._reporter is threading.current_thread():
            return self._steps > 0
        return self._steps > 0 or self._reporter is not None or bool(self._reports)
