"""Injected faults: the latency and loss of a bad network, added to a server's answers and changeable while it runs.

An expert server applies them to each request before it computes anything, so that a caller sees it as a distant or
failing volunteer. The delays are exponentially distributed, as in the paper's experiments.
"""

from __future__ import annotations

import math
import random


class Faults:
    """Draws a delay for each request, and whether it is lost. Any thread may change the settings, by `set`.

    Args:
        latency: Mean of the delays, seconds.
        loss: Share of requests that are never answered, 0 to 1.
        seed: With the same seed the draws are the same, whatever the settings were in between.

    Raises:
        ValueError: As `set` does.
    """

    def __init__(self, latency: float = 0.0, loss: float = 0.0, seed: int | None = None) -> None:
        self.latency = 0.0
        self.loss = 0.0
        self._random = random.Random(seed)
        self.set(latency, loss)

    def set(self, latency: float | None = None, loss: float | None = None) -> None:
        """Change the settings that are given.

        Raises `ValueError`, and changes none, if one of them is out of its range.
        """
        if latency is not None and not (math.isfinite(latency) and latency >= 0):
            raise ValueError(f"latency={latency!r}: a finite number of seconds, at least 0")
        if loss is not None and not 0 <= loss <= 1:
            raise ValueError(f"loss={loss!r}: a share between 0 and 1")
        self.latency = self.latency if latency is None else float(latency)
        self.loss = self.loss if loss is None else float(loss)

    def draw(self) -> tuple[float, bool]:
        """Draw for the next request: seconds to wait, and whether it is lost."""
        # Both numbers are drawn every time, so that neither setting shifts the sequence of the other.
        wait, chance = self._random.expovariate(1.0), self._random.random()
        return wait * self.latency, chance < self.loss

    def __repr__(self) -> str:
        return f"Faults(latency={self.latency:g}, loss={self.loss:g})"
