"""Texts as an output can show them."""

from __future__ import annotations

import sys


def for_output(text: str) -> str:
    """A text as standard output can show it: `print(swarm)` must not fail where that is not UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
