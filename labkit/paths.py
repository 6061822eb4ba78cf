"""Paths as users give them: made absolute at once, so that each means later what it meant when it was given.

A batch passes by. Whatever takes a path from a user, in a notebook or on a command line, asks `user_path` first.
"""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str], what: str = "path") -> Path:
    """The absolute path of what a user has named: `~` is a home directory, and the rest begins at the current folder.

    A later `os.chdir` does not change what it means. Links are not followed: whoever names one means the link.

    Args:
        path: What the user gave.
        what: The name of the argument, for errors.

    Raises:
        ValueError: The path is empty, or `~name` is no user of this machine.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError(f"{what}={text!r}: the path of a file or folder, which is not empty")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{what}={text!r}: {error}") from None
