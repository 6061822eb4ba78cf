"""What a forked process may not touch: a fork copies this process's memory, but none of its threads.

The copy finds swarms whose lab threads it lacks, locks that nobody will release, and folders and server processes that
belong to the original. So each owner keeps `this_process()` from its beginning and compares it later. What a thread
would have to answer is refused, and nothing of the original's is ended or removed. (`multiprocessing`, a `DataLoader`
and `notebook_launcher` fork on Linux; labkit itself never does.)
"""

from __future__ import annotations

import os
from collections.abc import Callable

_process = object()
_private: set[int] = set()  # descriptors that a forked process must not hold open


def this_process() -> object:
    """Returns a mark of this process; a forked process has another one."""
    return _process


def is_forked(process: object) -> bool:
    """Whether `process`, what `this_process` returned once, is one that this process was forked from."""
    return process is not _process


def on_fork(action: Callable[[], object]) -> None:
    """Call `action` in every process that is forked from this one, before anything else runs there."""
    if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
        os.register_at_fork(after_in_child=action)


def keep_private(descriptor: int) -> None:
    """Let no forked process hold this descriptor open, until `release`: whoever waits for its end would wait for it."""
    if descriptor >= 0:
        _private.add(descriptor)


def release(descriptor: int) -> None:
    """Forget a descriptor that is about to be closed."""
    _private.discard(descriptor)


def _begin() -> None:
    global _process
    _process = object()
    if _private:
        # Not closed: the objects that hold these descriptors would close them again, when the numbers mean others.
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in _private:
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
        _private.clear()


on_fork(_begin)
