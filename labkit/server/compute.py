"""Where a runtime's batches are computed: the compute thread of a device, or, for simulations, the calling task.

Between `Runtime.run`, which awaits `Executor.run` on the lab thread, and `server/backend`, which it calls.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
import trio

logger = logging.getLogger(__name__)
T = TypeVar("T")

THREAD_END_TIMEOUT = 1.0  # seconds that closing waits for the batch being computed


class Executor(Protocol):
    """Runs one piece of work at a time, and says how many seconds it took."""

    async def run(self, work: Callable[[], T], *, uid: str, direction: str, rows: int) -> tuple[T, float]: ...


class InlineCompute:
    """Computes in the calling task, for tests and simulations.

    Each piece of work takes `duration(uid, direction, rows)` seconds of trio's clock, so that with a mock clock a busy
    server costs no real time.
    """

    def __init__(self, duration: Callable[[str, str, int], float] | None = None) -> None:
        self._duration = duration

    async def run(self, work: Callable[[], T], *, uid: str, direction: str, rows: int) -> tuple[T, float]:
        if self._duration is None:
            await trio.lowlevel.checkpoint_if_cancelled()
            return work(), 0.0
        seconds = self._duration(uid, direction, rows)
        await trio.sleep(seconds)
        return work(), seconds


class ComputeThread:
    """The compute thread of one device, alive inside `async with`. One hand-over each way per piece of work.

    `threads`: torch's number of threads for one operation, or None to leave it alone.
    """

    def __init__(self, device: str = "cpu", *, threads: int | None = None) -> None:
        self._threads = threads
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=f"labkit-compute-{device}", daemon=True)
        self._ended = trio.Event()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def __aenter__(self) -> ComputeThread:
        self._token = trio.lowlevel.current_trio_token()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._jobs.put(None)
        with trio.move_on_after(THREAD_END_TIMEOUT, shield=True):
            await self._ended.wait()
            self._thread.join(THREAD_END_TIMEOUT)  # at once: its last act was to set the event
            return
        # Python cannot stop a thread; it is a daemon, and ends with its batch or with the process.
        logger.warning("%s is still computing after %s s; left behind", self._thread.name, THREAD_END_TIMEOUT)

    async def run(self, work: Callable[[], T], *, uid: str, direction: str, rows: int) -> tuple[T, float]:
        done = trio.Event()
        outcome: list[tuple[T, float] | BaseException] = []

        def job() -> None:
            started = time.perf_counter()
            try:
                outcome.append((work(), time.perf_counter() - started))
            except BaseException as error:
                outcome.append(error)
            self._call_back(done.set)

        self._jobs.put(job)
        await (
            done.wait()
        )  # no deadline: a computation cannot be stopped, and what waits for it has deadlines of its own
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _main(self) -> None:
        if self._threads is not None:
            torch.get_num_threads()  # or torch's first operation in this thread would set it once more
            torch.set_num_threads(self._threads)
        torch.set_flush_denormal(True)  # the moments of units that died decay to such numbers, and are ten times slower
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or it would keep a batch's tensors alive until the next
        self._call_back(self._ended.set)

    def _call_back(self, function: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:  # left behind, and then the lab thread ended
            logger.debug("%s finished after the lab thread", self._thread.name)
