"""Texts as standard output can show them, whatever its encoding is. A batch passes by."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    """A text as standard output can show it: `print(swarm)` must not fail where that is not UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
