"""A child process watches over its parent: whatever becomes of the parent, the child does not stay behind.

The parent holds the child's standard input open, and may write lines to it. When the input ends, the parent is gone,
even if it was killed. A process that the parent has forked may hold the input open for longer than the parent lives, so
the child also looks whether it still has the parent that it began with. All child processes of labkit use this:
servers, page servers, workers of a benchmark, runs of an experiment. It imports nothing but the standard library, so
that a child is quick to start.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

PARENT_INTERVAL = 0.5  # seconds between two looks whether the parent is the same


def watch_parent(
    on_end: Callable[[], object] = lambda: None,
    on_line: Callable[[bytes], object] = lambda line: None,
    exit_after: Callable[[], float] = lambda: 0.0,
) -> None:
    """Watch standard input and the parent in threads, and end this process after either ends. Returns at once.

    It takes a thread, since only a thread can read a pipe on every system.

    Args:
        on_end: Called once, when the parent is gone: lets the process begin to end by itself.
        on_line: Called with each line. If it returns something true, the line counts as the end of the input.
        exit_after: Called after `on_end`. Returns the seconds that the process then has to end by itself. After that it
            exits at once with status 1, since nobody may be left to kill it.
    """
    parent = os.getppid()
    ended = threading.Lock()  # held from the first end on

    def end() -> None:
        if ended.acquire(blocking=False):
            on_end()
            time.sleep(exit_after())
            os._exit(1)

    def read_input() -> None:
        stdin = sys.stdin  # held, or Python would close it at its exit, and abort since this thread is reading
        for line in stdin.buffer:
            if on_line(line):
                break
        end()

    def watch_process() -> None:
        while os.getppid() == parent:  # where there is no such thing as a new parent, nothing forks either
            time.sleep(PARENT_INTERVAL)
        end()

    threading.Thread(target=read_input, name="labkit-parent", daemon=True).start()
    threading.Thread(target=watch_process, name="labkit-parent-process", daemon=True).start()


def limit_time(seconds: float) -> None:
    """End this process with status 1 if it still runs after so many seconds. Returns at once."""
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()
