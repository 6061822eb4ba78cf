"""Code of the user's own that runs in a server: experts, their factories, their hooks. What it raises, and where.

Beside a batch's way: `server/batch`, `server/expert_module` and `server/layers` run such code inside `contained`, and
say in their errors what it raised, at which line.
"""

from __future__ import annotations

import sysconfig
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

MAX_SAID = 300  # characters of an error's own text that are sent to a caller
_TORCH = str(Path(torch.__file__).parent)
_LABKIT = str(Path(__file__).parents[1])
_STDLIB = sysconfig.get_path("stdlib")


class CodeWantedOut(RuntimeError):
    """User code raised what is no `Exception` (its `__cause__`), such as the `SystemExit` of `sys.exit()`."""


class contained:  # noqa: N801: used like a function
    """A block of user code. What it raises that is no `Exception` becomes a failure of the block: `CodeWantedOut`.

    `sys.exit()` in an expert must not end the swarm around it. A real Ctrl-C, which reaches no thread but the main one,
    is passed on. Nothing in the block may wait or yield.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if error is None or isinstance(error, Exception):
            return False
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            return False
        raise CodeWantedOut(describe_error(error)) from error


def describe_error(error: BaseException) -> str:
    """An error in one line: its type, its text, and the line of user code that it came from."""
    if isinstance(error, CodeWantedOut) and error.__cause__ is not None:
        error = error.__cause__
    said, place = " ".join(str(error).split())[:MAX_SAID], place_of(error)
    return type(error).__name__ + (f": {said}" if said else "") + (f" ({place})" if place else "")


def place_of(error: BaseException) -> str:
    """The innermost line of user code that an error went through, such as "kinds.py:12, in forward".

    Only the file's name is given, since strangers read it. Where no user code took part, it is the innermost line.
    """
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    code, line = next(
        (
            (code, line)
            for wanted in (_is_own, _is_not_ours)
            for code, line in reversed(frames)
            if wanted(code.co_filename)
        ),
        frames[-1] if frames else (None, 0),
    )
    return "" if code is None else f"{Path(code.co_filename).name}:{line}, in {code.co_name}"


def _is_own(file: str) -> bool:
    installed = "site-packages" in file or "dist-packages" in file or file.startswith((_STDLIB, "<frozen"))
    return not installed and _is_not_ours(file)


def _is_not_ours(file: str) -> bool:
    return not file.startswith((_TORCH, _LABKIT))
