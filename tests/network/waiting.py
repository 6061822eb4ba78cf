"""What network tests wait for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tests.network.world import Notebook


def until_answered(notebook: Notebook, experts: Sequence[str], timeout: float = 20) -> float:
    """Call all experts until each of these answers, and there are no others. Returns the seconds that it took."""
    began = time.monotonic()
    while (said := notebook.call()) != dict.fromkeys(experts, ""):
        assert time.monotonic() < began + timeout, said
    return time.monotonic() - began


def until_said(notebook: Notebook, words: str, timeout: float = 20) -> None:
    """Look at a swarm until it shows these words."""
    deadline = time.monotonic() + timeout
    while words not in (said := notebook.look()):
        assert time.monotonic() < deadline, said
