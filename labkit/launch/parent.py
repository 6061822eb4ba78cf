"""A child process watches over its parent: whatever becomes of the parent, the child does not stay behind.

The parent holds the child's standard input open, and may write lines to it. When the input ends, the parent is gone,
even if it was killed. All child processes of labkit use this: servers, page servers, workers of a benchmark, runs of an
experiment. It imports nothing but the standard library, so that a child is quick to start.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable


def watch_parent(
    on_end: Callable[[], object] = lambda: None,
    on_line: Callable[[bytes], object] = lambda line: None,
    exit_after: Callable[[], float] = lambda: 0.0,
) -> None:
    """Read standard input in a thread, and end this process after the input ends. Returns at once.

    It takes a thread, since only a thread can read a pipe on every system.

    Args:
        on_end: Called when the input ends: lets the process begin to end by itself.
        on_line: Called with each line. If it returns something true, the line counts as the end of the input.
        exit_after: Called after `on_end`. Returns the seconds that the process then has to end by itself. After that it
            exits at once with status 1, since nobody may be left to kill it.
    """

    def watch() -> None:
        stdin = sys.stdin  # held, or Python would close it at its exit, and abort since this thread is reading
        for line in stdin.buffer:
            if on_line(line):
                break
        on_end()
        time.sleep(exit_after())
        os._exit(1)

    threading.Thread(target=watch, name="labkit-parent", daemon=True).start()


def limit_time(seconds: float) -> None:
    """End this process with status 1 if it still runs after so many seconds. Returns at once."""
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()
