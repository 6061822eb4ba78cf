"""The README's code, as it is printed there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TIMEOUT = 110.0  # seconds; importing torch in five processes takes most of it
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


def run(folder: Path, *command: str, typed: str = "") -> str:
    """Run a program to its end, with what is typed into it. Returns what it printed, errors included."""
    done = subprocess.run(
        [sys.executable, *command], input=typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=TIMEOUT, cwd=folder, env={**os.environ, "IPYTHONDIR": str(folder), "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout and "Error" not in done.stdout, done.stdout
    return done.stdout
