"""Where a runtime's batches are computed: the compute thread of a device, or, for simulations, the thread of trio.

Between `server/runtime`, which calls `Executor.start` on the lab thread and is called back there, and `server/backend`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, Protocol

import torch
import trio

logger = logging.getLogger(__name__)

THREAD_END_TIMEOUT = 0.2  # seconds that closing waits for the batch being computed; a clean stop has waited before

OnComputed = Callable[[Any, BaseException | None, float], object]
"""Called in trio's thread with the outcome of a piece of work: its value or its error, and the seconds that it took."""


class Executor(Protocol):
    """Runs one piece of work at a time."""

    def start(
        self, work: Callable[[], Any], done: OnComputed, nursery: trio.Nursery, *, uid: str, direction: str, rows: int
    ) -> None:
        """Begin a piece of work.

        Args:
            work: Computes, and returns a value or raises.
            done: Called at the end, perhaps before this returns.
            nursery: Where an executor may start a task that waits.
            uid: The expert that computes, for an executor that makes up how long it takes; like the next two.
            direction: "forward", "backward", or "snapshot".
            rows: The rows of the batch.
        """


class InlineCompute:
    """Computes in the thread of trio, for tests and simulations.

    Each piece of work takes `duration(uid, direction, rows)` seconds of trio's clock, so that with a mock clock a busy
    server costs no real time.
    """

    def __init__(self, duration: Callable[[str, str, int], float] | None = None) -> None:
        self._duration = duration

    def start(
        self, work: Callable[[], Any], done: OnComputed, nursery: trio.Nursery, *, uid: str, direction: str, rows: int
    ) -> None:
        if self._duration is None:
            self._compute(work, done, 0.0)
        else:
            nursery.start_soon(self._wait, work, done, self._duration(uid, direction, rows))

    async def _wait(self, work: Callable[[], Any], done: OnComputed, seconds: float) -> None:
        await trio.sleep(seconds)
        self._compute(work, done, seconds)

    def _compute(self, work: Callable[[], Any], done: OnComputed, seconds: float) -> None:
        value, error = None, None
        try:
            value = work()
        except Exception as raised:
            error = raised
        done(value, error, seconds)


def ends_within(seconds: float, work: Callable[[], object]) -> bool:
    """Run this in a thread of its own. Returns whether it has ended by then; if not, the thread is left behind."""
    thread = threading.Thread(target=work, name="labkit-trial", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


class ComputeThread:
    """The compute thread of one device, alive inside `async with`. One hand-over each way per piece of work.

    Args:
        device: The name of the device, for the name of the thread.
        threads: Torch's number of threads for one operation; None leaves it as it is.

    Attributes:
        processor_seconds: Of a processor's time that the thread has taken, up to the end of its last piece of work.
    """

    def __init__(self, device: str = "cpu", *, threads: int | None = None) -> None:
        self.processor_seconds = 0.0
        self._threads = threads
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._main,), name=f"labkit-compute-{device}", daemon=True
        )
        self._ended = trio.Event()

    @property
    def alive(self) -> bool:
        """Whether the thread has not ended yet; it may outlive its block by one batch."""
        return self._thread.is_alive()

    def begin(self) -> None:
        """Start the thread, where there is no `async with`: then `__aexit__` has to be called at the end."""
        self._token = trio.lowlevel.current_trio_token()
        self._thread.start()

    async def __aenter__(self) -> ComputeThread:
        self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._jobs.put(None)
        with trio.move_on_after(THREAD_END_TIMEOUT, shield=True):
            await self._ended.wait()
            self._thread.join(THREAD_END_TIMEOUT)  # at once: its last act was to set the event
            return
        # Python cannot stop a thread; it is a daemon, and ends with its batch or with the process.
        logger.warning("%s is still computing after %s s; left behind", self._thread.name, THREAD_END_TIMEOUT)

    def start(
        self, work: Callable[[], Any], done: OnComputed, nursery: trio.Nursery, *, uid: str, direction: str, rows: int
    ) -> None:
        def job() -> None:
            value, error, started = None, None, time.perf_counter()
            try:
                value = work()
            except BaseException as raised:
                error = raised
            seconds = time.perf_counter() - started
            self.processor_seconds = time.thread_time()
            self._call_back(done, value, error, seconds)

        self._jobs.put(job)

    def _main(self) -> None:
        if self._threads is not None:
            torch.get_num_threads()  # or torch's first operation in this thread would set it once more
            torch.set_num_threads(self._threads)
        torch.set_flush_denormal(True)  # the moments of units that died decay to such numbers, and are ten times slower
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or it would keep a batch's tensors alive until the next
        self._call_back(self._ended.set)

    def _call_back(self, function: Callable[..., object], *args: Any) -> None:
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:  # left behind, and then the lab thread ended
            logger.debug("%s finished after the lab thread", self._thread.name)
