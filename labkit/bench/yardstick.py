"""How fast this machine is just now, for what is measured on it meanwhile.

Where others use the same processors, a machine is a third faster in one minute than in the next, and what is compared
is lost in that. So a process for each processor does the same small piece of work again and again: an expert's forward
and backward pass, since others slow some kinds of work more than some. What counts is the processor's time that a piece
takes, which does not grow while the process waits for its turn.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

import torch
from torch import nn

from labkit.bench.processes import ProcessGroup, Worker

MOST_PROCESSES = 4
PIECE = 2  # forward and backward passes
ROWS, HIDDEN = 16, 64
PAUSE = 0.05  # seconds between two pieces, so that they take little from what is measured


class Yardstick:
    """Measures how fast this machine is, beside something else. Made by `open_yardstick`."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        for worker in workers:
            worker.receive()  # it is ready

    def begin(self, seconds: float) -> None:
        """Begin to measure, for so many seconds."""
        for worker in self._workers:
            worker.send(seconds)

    def speed(self) -> float:
        """Returns the pieces of work in a second of a processor's time, when those seconds are over."""
        return fmean(worker.receive() for worker in self._workers)


@contextmanager
def open_yardstick() -> Iterator[Yardstick]:
    """Make a yardstick for a `with` block, with which its processes end."""
    with ProcessGroup() as group:
        yield Yardstick(group.start("yardstick:work_beside", *[None] * min(os.cpu_count() or 1, MOST_PROCESSES)))


def work_beside(_: None) -> Generator[float, float, None]:
    """A `WorkerRole`: for each order, of seconds, work so long, and say how fast that went."""
    torch.set_num_threads(1)
    expert = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))
    x = torch.randn(ROWS, HIDDEN)
    speed = 0.0
    while True:
        seconds = yield speed
        end = time.monotonic() + seconds
        speeds: list[float] = []
        while not speeds or time.monotonic() < end:
            began = time.thread_time()
            for _piece in range(PIECE):
                expert(x).sum().backward()
            speeds.append(1 / max(time.thread_time() - began, 1e-6))
            time.sleep(PAUSE)
        speed = fmean(speeds)


def at_equal_speed(ratios: Sequence[float], speeds: Sequence[float]) -> tuple[float, float] | None:
    """Returns the ratio that pairs would have had on a machine that is equally fast for both of each.

    A line is put through the logarithms: how much faster the machine was for the first of a pair
    explains part of each ratio, and what is left where it was equally fast is returned.

    Args:
        ratios: What was measured, of pairs: the first over the second.
        speeds: The same of the machine's speed.

    Returns:
        The ratio, and how far from the true one it is at most, with 95 % probability. None for
        fewer than four pairs.
    """
    from scipy.stats import linregress, t  # it takes a while

    if len(ratios) < 4:
        return None
    line = linregress([math.log(speed) for speed in speeds], [math.log(ratio) for ratio in ratios])
    ratio = math.exp(line.intercept)
    return ratio, float(ratio * t.ppf(0.975, len(ratios) - 2) * line.intercept_stderr)
