"""Who is given scenes of a swarm, and when. No thread of its own, and the time is passed in.

`labkit.view.swarm_view` asks, in the thread that it has while there is an output.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from labkit.view.scene import Scene

logger = logging.getLogger(__name__)

SMALL = 0.001  # seconds of a core that a scene may take; what it takes beyond that is, on average,
SHARE = 0.001  # of a core, where the output's period may grow

Show = Callable[[Scene], None]


@dataclass(eq=False, slots=True)
class Output:
    """`show` is given a scene every `period` seconds, next `at`. `looks`: whether somebody is to see it.

    `longest`: what the period may grow to in a large swarm, where a scene takes long to make and to show.
    """

    show: Show
    period: float
    at: float
    looks: bool = True
    longest: float = 0.0

    def next_after(self, took: float) -> float:
        """Seconds until its next scene, after one that took so many of a core."""
        return max(self.period, min((took - SMALL) / SHARE, self.longest))


class Outputs:
    """The outputs of one swarm, and one more, `beside` them: it is given scenes as long as there is any other. `name`:
    of the swarm. Times: seconds, monotonic."""

    def __init__(self, beside: Output, name: str) -> None:
        self._beside = beside
        self._name = name
        self._all: tuple[Output, ...] = ()
        self._over = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._all)

    @property
    def seen(self) -> bool:
        """Whether one of them is there for somebody to see."""
        return any(output.looks for output in self._all)

    def add(self, output: Output) -> bool:
        """One more. False if it is all over."""
        with self._lock:
            if not self._over:
                self._all = (*self._all, output)
            return not self._over

    def remove(self, output: Output) -> bool:
        """Give it no more. Returns whether it was there."""
        with self._lock:
            known = output in self._all
            self._all = tuple(other for other in self._all if other is not output)
        return known

    def end(self) -> bool:
        """Take no more. Returns whether that is news."""
        with self._lock:
            news, self._over = not self._over, True
        return news

    def show(
        self, scene: Callable[[], Scene], late_scene: Callable[[], Scene], clock: Callable[[], float],
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> float:  # fmt: skip
        """Give a scene to those whose time has come; for the one beside them a late one will do. Returns the seconds
        until the next one's time has come."""
        outputs, now = (self._beside, *self._all), clock()
        due = [output for output in outputs if output.at <= now]
        for output in due:
            began = cpu_clock()
            self._show(output, late_scene() if output is self._beside else scene())
            output.at += output.next_after(cpu_clock() - began)
        now = clock()
        for output in due:
            output.at = max(output.at, now)  # one that was late is not called twice for it
        return max(0.0, min(output.at for output in outputs) - now)

    def show_last(self, scene: Callable[[], Scene]) -> None:
        """Give the last scene to all, and then forget them."""
        with self._lock:
            outputs, self._all = self._all, ()
        for output in (self._beside, *outputs) if outputs else ():
            self._show(output, scene())

    def _show(self, output: Output, scene: Scene) -> None:
        try:
            output.show(scene)
        except Exception:
            logger.exception("%r failed to show the swarm %r and was removed", output.show, self._name)
            self.remove(output)
