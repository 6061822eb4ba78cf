"""The README's code, as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks() -> list[str]:
    """The blocks of Python, in order."""
    found = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(found) == 3, "the README has another number of blocks: see that each is still run as it says"
    return found


def cells() -> list[str]:
    """What somebody runs one after the other: a block at a time, and of the last one, a line at a time."""
    *first, last = blocks()
    return [*first, *last.splitlines()]
