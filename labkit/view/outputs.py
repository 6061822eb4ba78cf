"""The outputs of a swarm's view: what is given scenes, and when. No thread of its own; the time is passed in.

`swarm_view` asks, in the thread that it has while there is an output.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from labkit.view.scene import Scene

logger = logging.getLogger(__name__)

FREE_SCENE_SECONDS = 0.001  # of computing that a scene may take without making scenes rarer
SCENE_CORE_SHARE = 0.001  # of a core that what a scene takes beyond that may use, where the output's period may grow

Show = Callable[[Scene], None]


@dataclass(eq=False, slots=True)
class Output:
    """Something that is given a scene every so many seconds.

    Args:
        show: Called with the scene.
        period: Seconds between two scenes.
        due_at: When the next scene is due, in seconds on a monotonic clock.
        watched: Whether someone sees what it shows.
        max_period: What the period may grow to in a large swarm, where a scene takes long to make and to show.
    """

    show: Show
    period: float
    due_at: float
    watched: bool = True
    max_period: float = 0.0

    def next_after(self, took: float) -> float:
        """Returns the seconds until the next scene, after one that took so many seconds of computing."""
        return max(self.period, min((took - FREE_SCENE_SECONDS) / SCENE_CORE_SHARE, self.max_period))


class Outputs:
    """The outputs of one swarm. Times are seconds on a monotonic clock.

    Args:
        companion: One more output, which is given scenes as long as there is any other.
        name: The name of the swarm, for the log.
    """

    def __init__(self, companion: Output, name: str) -> None:
        self._companion = companion
        self._name = name
        self._all: tuple[Output, ...] = ()
        self._ended = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._all)

    @property
    def watched(self) -> bool:
        """Whether someone sees what one of them shows."""
        return any(output.watched for output in self._all)

    def add(self, output: Output) -> bool:
        """Add an output. Returns False if the swarm's view has ended."""
        with self._lock:
            if not self._ended:
                self._all = (*self._all, output)
            return not self._ended

    def remove(self, output: Output) -> bool:
        """Remove an output. Returns whether it was there."""
        with self._lock:
            known = output in self._all
            self._all = tuple(other for other in self._all if other is not output)
        return known

    def end(self) -> bool:
        """Accept no more outputs. Returns whether any were accepted until now."""
        with self._lock:
            first, self._ended = not self._ended, True
        return first

    def show(
        self, scene: Callable[[], Scene], late_scene: Callable[[], Scene], clock: Callable[[], float],
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> float:  # fmt: skip
        """Give a scene to each output that is due.

        Args:
            scene: Makes a scene of this moment.
            late_scene: Makes one for the companion, which may be a little older.
            clock: The time.
            cpu_clock: Seconds of computing of this thread.

        Returns:
            Seconds until the next output is due.
        """
        outputs, now = (self._companion, *self._all), clock()
        due = [output for output in outputs if output.due_at <= now]
        for output in due:
            began = cpu_clock()
            self._show(output, late_scene() if output is self._companion else scene())
            output.due_at += output.next_after(cpu_clock() - began)
        now = clock()
        for output in due:
            output.due_at = max(output.due_at, now)  # a late output is not called twice to catch up
        return max(0.0, min(output.due_at for output in outputs) - now)

    def show_last(self, scene: Callable[[], Scene]) -> None:
        """Give the last scene to all outputs, and remove them."""
        with self._lock:
            outputs, self._all = self._all, ()
        for output in (self._companion, *outputs) if outputs else ():
            self._show(output, scene())

    def _show(self, output: Output, scene: Scene) -> None:
        try:
            output.show(scene)
        except Exception:
            logger.exception("%r failed to show the swarm %r and was removed", output.show, self._name)
            self.remove(output)
