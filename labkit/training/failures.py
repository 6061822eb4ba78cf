"""How a run says why it ended: in one line, in the log and where a person sees it."""

from __future__ import annotations

import logging
import sys
import traceback
from contextvars import Context, copy_context
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

MAX_TEXT = 600  # characters of an error's text in the line
NOT_THE_USERS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<frozen ")


def place_of_caller() -> Context | None:
    """Where what the caller prints is shown, for `say`: the cell that runs now. None for what runs at that time.

    The streams of a Jupyter kernel know their cell from the context. Who runs a notebook without a person, and so
    without input, hears only of the cell that is running, and what comes for an earlier one is lost.
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None or not hasattr(ipython, "get_ipython") else ipython.get_ipython()
    return copy_context() if getattr(getattr(shell, "kernel", None), "_allow_stdin", False) else None


def say(error: BaseException, steps: int, total_steps: int, place: Context | None = None) -> None:
    """Log that a run has ended with an error, and print it, unless the log prints it: nobody may be waiting for it.

    Args:
        error: The error.
        steps: Steps that were done.
        total_steps: Steps that were to be done.
        place: Where to log and print it, from `place_of_caller`.
    """
    if place is not None:
        return place.run(say, error, steps, total_steps)
    text = " ".join(str(error).split())[:MAX_TEXT]
    line = f"the run failed after {steps:,} of {total_steps:,} steps: {type(error).__name__}: {text}{_place(error)}"
    logger.error("%s", line)
    if not _log_is_shown() and sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def _place(error: BaseException) -> str:
    """Where in the user's code it was raised; nothing if it was elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NOT_THE_USERS)]
    return f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""


def _log_is_shown() -> bool:
    """Whether errors in the log go to the terminal or the cell."""
    if not logger.isEnabledFor(logging.ERROR):
        return False
    handlers: list[logging.Handler] = []
    at: logging.Logger | None = logger
    while at is not None:
        handlers += at.handlers
        at = at.parent if at.propagate else None
    if all(getattr(handler, "leaves_printing", False) for handler in handlers):  # to Python, which does it by itself
        return logging.lastResort is not None
    streams = [getattr(handler, "stream", None) for handler in handlers if handler.level <= logging.ERROR]
    return any(stream in (sys.stderr, sys.stdout) for stream in streams)
