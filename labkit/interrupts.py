"""Interrupts that wait: what must not stay half done is finished before Ctrl-C, or another signal, is raised.

A signal's handler runs between any two steps of the main thread, and what it raises may come when a thread has just
started, or a folder was just made, that nobody holds yet. Such steps stand in a block of `interrupts_wait`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

# Signals by which a process is asked to end, and which a handler may make an exception of.
_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


@contextmanager
def interrupts_wait() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Put off what signals would raise here until this is left. A wait in it should end within seconds.

    It gives a function that makes an inner block, in which signals are raised as ever, for what may take long; those
    that came before are raised at its beginning.

    Example:
        with interrupts_wait() as interruptible:
            folder = make_folder()
            try:
                with interruptible():
                    download(folder)
            except BaseException:
                folder.remove()
                raise
    """
    if threading.current_thread() is not threading.main_thread():  # no other is interrupted
        yield _nothing
        return
    heard: list[int] = []
    handlers: dict[int, Any] = {}
    waiting = False

    def hear(number: int, frame: FrameType | None) -> None:
        if waiting:
            heard.append(number)
        else:  # the block ends, or this could not be taken back, since a handler raised
            handlers[number](number, frame)

    @contextmanager
    def interruptible() -> Iterator[None]:
        nonlocal waiting
        try:
            waiting = False
            _raise(heard)
            yield
        finally:
            waiting = True

    try:
        waiting = True
        for number in _NUMBERS:
            if callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, hear)
        yield interruptible
    finally:
        waiting = False
        for number, handler in handlers.items():
            if signal.getsignal(number) is hear:  # else somebody has set another meanwhile
                signal.signal(number, handler)
        _raise(heard)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _raise(heard: list[int]) -> None:
    if heard:
        first = heard[0]
        heard.clear()
        signal.raise_signal(first)
