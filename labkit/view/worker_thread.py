"""A thread that exists only while there is something to do.

The view of a swarm has one that makes scenes; a dashboard has two: one sends messages, the other executes commands.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from labkit.forks import is_forked, this_process
from labkit.interrupts import interrupts_wait

logger = logging.getLogger(__name__)

_END_POLL = 0.005  # seconds between two looks whether the thread has ended


class WorkerThread:
    """Calls `step` in a thread of its own, again and again.

    The thread ends when `step` returns None, and a later `wake` starts a new one; so steps never overlap, and need no
    locks among themselves. A step that raises is logged, and ends the thread as None does.

    Args:
        name: The thread's name.
        step: Does what there is to do. Returns the seconds after which it is called again (earlier if `wake` is
            called), or None when there is nothing left to do.
    """

    def __init__(self, name: str, step: Callable[[], float | None]) -> None:
        self._name = name
        self._process = this_process()
        self._step = step
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether there is a thread now."""
        return self._thread is not None and not self._gone

    @property
    def _gone(self) -> bool:
        """Whether no thread can run any more: this is a forked process, or Python is ending.

        At Python's end a thread that starts never runs, and whoever starts it would wait for it for ever.
        """
        return sys.is_finalizing() or is_forked(self._process)

    def wake(self) -> None:
        """Call `step` soon. Never blocks; may be called from any thread."""
        if self._gone:
            return
        with interrupts_wait(), self._lock:  # a thread that was interrupted while it starts may never run
            self._woken.set()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread = thread
                try:
                    thread.start()
                except RuntimeError:  # Python is ending, or there are too many threads: then there is no step
                    self._thread = None
                    logger.debug("%s could not start", self._name)

    def wait_for_end(self, timeout: float) -> bool:
        """Wait until the thread has ended, unless called from inside it. Returns whether it has within `timeout`."""
        # Not `Thread.join`: if that is interrupted, Python before 3.13 takes the thread for dead (cpython issue 90882).
        deadline = time.monotonic() + timeout
        while (thread := self._thread) is not None and thread is not threading.current_thread() and not self._gone:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_END_POLL)
        return True

    def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                wait = self._step()
            except Exception:
                logger.exception("%s failed", self._name)
                wait = None
            if wait is not None:
                self._woken.wait(wait)
                continue
            with self._lock:
                if not self._woken.is_set():
                    self._thread = None
                    return
