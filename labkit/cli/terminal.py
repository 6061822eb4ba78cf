"""What all commands share at their terminal: output in whatever encoding it has, and a clean end however they end.

It imports nothing but the standard library, since options are read before torch is imported.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

END_SIGNALS = ("SIGTERM", "SIGHUP", "SIGBREAK")  # besides Ctrl-C; SIGHUP: the terminal was closed


@contextmanager
def at_terminal() -> Iterator[None]:
    """In this block a command ends as by Ctrl-C when it is told to, or when nobody reads its output any more.

    What the output cannot show, such as "…" in a terminal that knows only ASCII, is shown as "?". A signal that is
    ignored, as SIGHUP under `nohup`, stays ignored. Only in the main thread.
    """
    standard = sys.stdout, sys.stderr
    before = {}
    for name in END_SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, _interrupt)
    sys.stdout, sys.stderr = (None if stream is None else _Output(stream) for stream in standard)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = standard
        for number, handler in before.items():
            if signal.getsignal(number) is _interrupt:  # else they are ignored by now
                signal.signal(number, handler)


def ignore_interrupts() -> None:
    """Let this process, which ends by itself within seconds, end without a word about those who cannot wait."""
    for name in ("SIGINT", *END_SIGNALS):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Do as Ctrl-C does, by way of its own handler: trio has one that waits for a good moment."""
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.SIG_DFL, None):  # of a job in the background
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def output_is_read() -> bool:
    """Whether somebody can still read standard output, as far as can be said without writing to it."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return True  # there is none, or one that is not the system's
    if not hasattr(select, "poll"):  # on Windows
        return True
    look = select.poll()
    look.register(descriptor, 0)  # what makes it useless is told in any case
    return not look.poll(0)


class _Output:
    """Standard output or standard error. When it cannot be written to any more, what is written to it is lost.

    The first time this happens, that ends the command, unless it is ending already.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        ending, context = False, error.__context__
        while context is not None:  # what is being handled while this is written
            ending, context = ending or isinstance(context, KeyboardInterrupt), context.__context__
        lost, self._stream = self._stream, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, to the end
        with suppress(OSError, ValueError):  # or Python would complain at its exit that it cannot be flushed
            os.dup2(self._stream.fileno(), lost.fileno())
        if lost is sys.__stdout__ and not ending:
            _interrupt(signal.SIGTERM, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
