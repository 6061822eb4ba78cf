"""The runs of this process: one at a time trains a model, all are stopped at exit, and none goes on in a fork.

Beside a batch's way: `Run` enters its trainers here before they start.
"""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from typing import Any

from torch import nn

from labkit.errors import TrainingFailed
from labkit.forks import on_fork
from labkit.interrupts import interrupts_wait
from labkit.training.batches import Stream
from labkit.training.trainer_threads import Trainers

logger = logging.getLogger(__name__)

STOP_TIMEOUT = 10.0  # seconds that batches in flight may take when a run is stopped
EXIT_TIMEOUT = 3.0  # seconds that batches in flight may take when Python exits

runs: weakref.WeakSet[Trainers] = weakref.WeakSet()
saved: weakref.WeakValueDictionary[str, Stream] = weakref.WeakValueDictionary()  # by the folder's name of a moment


def data_saved_with(moment: str) -> Any:
    """The data of the run that saved this moment, if it is one of this process that somebody still has; else None."""
    batches = saved.get(moment)
    return None if batches is None else batches.data


def stop_earlier(model: nn.Module) -> None:
    """Stop a run that still trains this model. Raises `TrainingFailed` if it does not end."""
    for run in list(runs):
        if run.shared.model is model and run.running:
            logger.warning("an earlier run still trained this model; it is stopped now: %r", run)
            run.stop()
            run.join(STOP_TIMEOUT)
            if run.running:
                raise TrainingFailed(
                    f"an earlier run still trains this model, and did not stop in {STOP_TIMEOUT:.0f} s"
                )


@atexit.register
def _stop_all() -> None:
    """Stop all runs at exit: a process that exits while threads of it are inside torch aborts."""
    with interrupts_wait():
        for run in list(runs):
            run.stop()
        deadline = time.monotonic() + EXIT_TIMEOUT
        for run in list(runs):
            run.join(deadline - time.monotonic())


@on_fork
def _leave_behind() -> None:
    for run in list(runs):
        run.leave_behind()
    runs.clear()
