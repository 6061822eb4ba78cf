"""Injected faults: the latency and loss of a bad network, put before a server's answers and changeable while it runs.

An expert server applies them to each request before it computes anything, so the caller sees what a distant or failing
volunteer would show it. The delays are exponentially distributed, as in the paper's experiments.
"""

from __future__ import annotations

import math
import random


class Faults:
    """Delays with a mean of `latency` seconds, and a share `loss` (0 to 1) of requests that are never answered.

    The same `seed` gives the same draws, whatever the settings were in between. The settings are plain numbers: any
    thread may change them, and the next request sees the change. Raises `ValueError` as `set` does.
    """

    def __init__(self, latency: float = 0.0, loss: float = 0.0, seed: int | None = None) -> None:
        self.latency = 0.0
        self.loss = 0.0
        self._random = random.Random(seed)
        self.set(latency, loss)

    def set(self, latency: float | None = None, loss: float | None = None) -> None:
        """Change what is given, keep the rest. On a `ValueError`, which names the argument, nothing has changed."""
        if latency is not None and not (math.isfinite(latency) and latency >= 0):
            raise ValueError(f"latency={latency!r}: a finite number of seconds, at least 0")
        if loss is not None and not 0 <= loss <= 1:
            raise ValueError(f"loss={loss!r}: a share between 0 and 1")
        self.latency = self.latency if latency is None else float(latency)
        self.loss = self.loss if loss is None else float(loss)

    def draw(self) -> tuple[float, bool]:
        """The next request's fate: seconds to wait, and whether it is lost."""
        # Both numbers are drawn every time, so that one setting does not shift the other's sequence.
        wait, chance = self._random.expovariate(1.0), self._random.random()
        return wait * self.latency, chance < self.loss

    def __repr__(self) -> str:
        return f"Faults(latency={self.latency:g}, loss={self.loss:g})"
