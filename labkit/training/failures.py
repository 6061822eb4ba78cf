"""How a run says why it ended: in one line, in the log and where a person sees it."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

MAX_TEXT = 600  # characters of an error's text in the line
NOT_THE_USERS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<frozen ")


def say(error: BaseException, steps: int, total_steps: int) -> None:
    """Log that a run has ended with an error, and print it, unless the log prints it: nobody may be waiting for it.

    Args:
        error: The error.
        steps: Steps that were done.
        total_steps: Steps that were to be done.
    """
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
    if not logger.hasHandlers():
        return logging.lastResort is not None
    at: logging.Logger | None = logger
    while at is not None:
        for handler in at.handlers:
            stream = getattr(handler, "stream", None)
            if stream in (sys.stderr, sys.stdout) and handler.level <= logging.ERROR:
                return True
        at = at.parent if at.propagate else None
    return False
