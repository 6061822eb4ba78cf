"""What a run has done so far, and the figures made of it: its steps, their mean loss, rows per second, staleness.

Beside a batch's way: `trainer_threads` adds to it, `Run` shows it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from labkit.events import StepFinished

LAST_LOSSES = 20  # steps whose mean loss is shown
LAST_STALENESS = 100  # steps whose mean staleness is shown


class RunRecord:
    """The record of a run. Trainers write it under their lock, and anybody reads it.

    Attributes:
        history: One `StepFinished` for each of the last 100,000 steps.
        steps: Steps that count: they are in `history`, and every listener has heard of them.
        samples: Rows of all steps.
        failed_batches: Batches that failed and were dropped.
    """

    def __init__(self) -> None:
        self.history: deque[StepFinished] = deque(maxlen=100_000)
        self.steps = 0
        self.samples = 0
        self.failed_batches = 0
        self._started = time.monotonic()
        self._seconds: float | None = None

    def end(self) -> None:
        """The run has ended: its time stands still."""
        self._seconds = time.monotonic() - self._started

    @property
    def seconds(self) -> float:
        """How long the run has been going on, or went on."""
        return self._seconds if self._seconds is not None else time.monotonic() - self._started

    @property
    def loss(self) -> float:
        """Mean loss of the last 20 steps; NaN before the first."""
        last = self._last(LAST_LOSSES)
        return sum(step.loss for step in last) / len(last) if last else math.nan

    @property
    def samples_per_s(self) -> float:
        """Rows per second, over the whole run."""
        return self.samples / max(self.seconds, 1e-9)

    @property
    def staleness(self) -> float:
        """Mean staleness of the last 100 steps."""
        last = self._last(LAST_STALENESS)
        return sum(step.staleness for step in last) / len(last) if last else 0.0

    def _last(self, count: int) -> list[StepFinished]:
        # By place, since trainers append meanwhile; and not a copy of it all, which in a long run takes milliseconds.
        return [self.history[-place] for place in range(min(count, len(self.history)), 0, -1)]

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain numbers and a tensor."""
        steps = [(s.step, s.loss, s.samples, s.seconds, s.staleness) for s in self.history]
        return {
            "steps": self.steps,
            "samples": self.samples,
            "failed_batches": self.failed_batches,
            "seconds": self.seconds,
            "history": torch.tensor(steps, dtype=torch.float64).reshape(-1, 5),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.steps, self.samples, self.failed_batches = state["steps"], state["samples"], state["failed_batches"]
        self._started -= state["seconds"]
        for step, loss, samples, seconds, staleness in state["history"].tolist():
            self.history.append(
                StepFinished(step=int(step), loss=loss, samples=int(samples), seconds=seconds, staleness=int(staleness))
            )
